"""Several students and teacher score matching where the answer is known: float64, expectations without samples.

Quadratics are averaged over the sigma points of :func:`toys.sigma_points`, exactly.  The capacity test has classes
N(M_y, S) and a student whose mean is affine in a scalar code of the class.
"""

from __future__ import annotations

import numpy as np
import pytest
import tiny
import torch
from toys import linear_betas, sigma_points, zero_snr

from stepdistill.analytic import GaussianMixture
from stepdistill.config import merge
from stepdistill.data.partition import PartitionSettings, make_router
from stepdistill.denoiser import Prediction
from stepdistill.objectives.denoising import denoising_loss
from stepdistill.objectives.distribution_matching import distribution_matching_gradient
from stepdistill.sampler import FewStepSampler, few_step_times
from stepdistill.schedule import EDMSchedule, FlowSchedule, expand
from stepdistill.trainers.plans.build import build_trainer
from stepdistill.trainers.plans.job import make_job

MEANS = torch.tensor([[0.0, 0.0], [1.0, 0.3], [0.2, 1.0], [1.5, 1.2]], dtype=torch.float64)
CODE = torch.arange(4, dtype=torch.float64)
COVARIANCE = torch.tensor([[0.5, 0.2], [0.2, 0.3]], dtype=torch.float64)
LEVEL = 1.0
"""The one noise level: sigma = 1 on a schedule with alpha = 1."""


# -- capacity ----------------------------------------------------------------------------------------------


def difference(x0, teacher_x0, fake_score_x0):
    """The distribution-matching gradient without its normaliser, which depends on the sample."""
    return fake_score_x0 - teacher_x0


def basis(labels: list[int]) -> torch.Tensor:
    """[1, phi] of each class, (n, 2)."""
    return torch.stack([torch.ones(len(labels), dtype=torch.float64), CODE[labels]], 1)


def fitted(labels: list[int], gradient=difference, rounds: int = 150) -> tuple[torch.Tensor, torch.Tensor]:
    """[a; b] (2, 2) and A A^T of a student trained on these classes, its fake score exact.

    Gradient descent, the means' in the metric of their own normal equations: every stationary point stays one.
    """
    schedule, points = EDMSchedule(), sigma_points(4)
    label = torch.tensor(labels).repeat_interleave(len(points))
    z, noise = points[:, :2].repeat(len(labels), 1), points[:, 2:].repeat(len(labels), 1)
    t = torch.full((len(label),), LEVEL, dtype=torch.float64)
    teacher = GaussianMixture(MEANS, COVARIANCE, labels=range(4)).denoiser(schedule)
    metric = torch.linalg.inv(basis(labels).T @ basis(labels) / len(labels))
    line = torch.tensor([[0.3, -0.2], [0.1, 0.4]], dtype=torch.float64, requires_grad=True)
    factor = torch.tensor([[1.0, 0.0], [-0.2, 0.8]], dtype=torch.float64, requires_grad=True)
    for _ in range(rounds):
        means, covariance = (basis([0, 1, 2, 3]) @ line).detach(), (factor @ factor.T).detach()
        fake_score = GaussianMixture(means, covariance, labels=range(4)).denoiser(schedule)
        x0 = basis([0, 1, 2, 3])[label] @ line + z @ factor.T
        x_t = schedule.add_noise(x0.detach(), noise, t)
        predictions = [denoiser(x_t, t, {"label": label}).x0 for denoiser in (teacher, fake_score)]
        loss = (gradient(x0.detach(), *predictions) * x0).sum(1).mean()
        of_line, of_factor = torch.autograd.grad(loss, (line, factor))
        line.data -= 0.8 * metric @ of_line
        factor.data -= 0.8 * of_factor
    return line.detach(), covariance


def least_squares(labels: list[int]) -> torch.Tensor:
    return torch.linalg.lstsq(basis(labels), MEANS[labels]).solution


def residual(line: torch.Tensor, labels: list[int]) -> float:
    """Root mean square distance of the student's means to the classes'."""
    return (basis(labels) @ line - MEANS[labels]).square().sum(1).mean().sqrt().item()


def parts(students: int) -> list[list[int]]:
    return make_router(PartitionSettings(students=students), [0, 1, 2, 3], "label").parameters["labels"]


def test_one_student_of_too_little_capacity_is_the_least_squares_fit():
    (labels,) = parts(1)
    line, covariance = fitted(labels)
    torch.testing.assert_close(line, least_squares(labels), rtol=0, atol=1e-8)
    torch.testing.assert_close(covariance, COVARIANCE, rtol=0, atol=1e-8)
    assert residual(line, labels) == pytest.approx(0.4544, abs=5e-5)


def test_two_students_of_the_same_capacity_are_exact():
    divided = parts(2)
    assert divided == [[0, 1], [2, 3]]
    for labels in divided:
        line, covariance = fitted(labels)
        assert residual(line, labels) < 1e-8
        torch.testing.assert_close(covariance, COVARIANCE, rtol=0, atol=1e-8)


def test_the_normaliser_biases_one_student_and_not_two():
    """It depends on the sample, so it weights classes; where an exact fit exists it is neutral."""
    (labels,) = parts(1)
    line, covariance = fitted(labels, distribution_matching_gradient)
    assert (line - least_squares(labels)).abs().max() > 1e-3
    assert (covariance - COVARIANCE).abs().max() > 0.1
    for labels in parts(2):
        line, covariance = fitted(labels, distribution_matching_gradient)
        assert residual(line, labels) < 1e-6
        torch.testing.assert_close(covariance, COVARIANCE, rtol=0, atol=1e-6)


# -- all students together ---------------------------------------------------------------------------------


class ExactStudent:
    """G(z, y) = mu_y + L_y z on the labels of this student, and far off on all others."""

    def __init__(self, schedule, means, covariances, labels: list[int]):
        self.schedule, self.means, self.factors = schedule, means.clone(), torch.linalg.cholesky(covariances)
        self.means[[y for y in range(len(means)) if y not in labels]] = 1e3

    def __call__(self, x_t, t, condition):
        label = condition["label"]
        x0 = self.means[label] + torch.einsum("bij,bj->bi", self.factors[label], x_t)
        return Prediction(self.schedule, x_t, t, x0, "x0")


@pytest.mark.parametrize("how", ["order", "random"])
def test_routed_students_that_match_their_conditionals_make_the_whole_mixture(how):
    """Conditions of the full prior: mean = sum p mu, covariance = sum p (S + (mu_y - mu)(mu_y - mu)^T)."""
    router = make_router(PartitionSettings(students=2, partition=how, seed=1), [0, 1, 2, 3], "label")
    covariances = COVARIANCE * torch.tensor([1.0, 0.4, 2.0, 0.7], dtype=torch.float64)[:, None, None]
    schedule = zero_snr()
    sampler = FewStepSampler(schedule, few_step_times(schedule, 1))
    drawn = [2, 0, 0, 1, 3, 2, 0, 3]  # p = 3/8, 1/8, 2/8, 2/8
    points = sigma_points(2)
    label = torch.tensor(drawn).repeat_interleave(len(points))
    noise = points.repeat(len(drawn), 1)
    pooled = torch.full_like(noise, torch.nan)
    routes = torch.tensor(router.route_labels(label.tolist()))
    for k, labels in enumerate(router.parameters["labels"]):
        student = ExactStudent(schedule, MEANS, covariances, labels)
        mine = routes == k
        pooled[mine] = sampler.sample(student, noise[mine], {"label": label[mine]}, torch.randn_like)
    share = torch.tensor([drawn.count(y) / len(drawn) for y in range(4)], dtype=torch.float64)
    mean = share @ MEANS
    apart = MEANS - mean
    expected = torch.einsum("y,yij->ij", share, covariances + apart[:, :, None] * apart[:, None])
    torch.testing.assert_close(pooled.mean(0), mean, rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.cov(pooled.T, correction=0), expected, rtol=0, atol=1e-12)


# -- teacher score matching --------------------------------------------------------------------------------


def noised(schedule, t: float, mean, covariance):
    """x0, eps, x_t and t (B,) at the sigma points of (x0, eps)."""
    dim = len(mean)
    points = sigma_points(2 * dim)
    x0 = mean + points[:, :dim] @ torch.linalg.cholesky(covariance).T
    time = torch.full((len(points),), t, dtype=torch.long if t == int(t) and t > 1 else torch.float64)
    return x0, points[:, dim:], schedule.add_noise(x0, points[:, dim:], time), time


@pytest.mark.parametrize("sigma", [0.3, 1.0, 4.0])
def test_denoising_exceeds_score_matching_by_the_posterior_variance(sigma):
    """E|s - x|^2 - E|s - T|^2 = tr(sigma^2 S P), P = (S + sigma^2 I)^-1, for any affine s."""
    schedule = EDMSchedule()
    x0, _, x_t, t = noised(schedule, sigma, MEANS[3], COVARIANCE)
    teacher = GaussianMixture(MEANS[3:], COVARIANCE).denoiser(schedule)(x_t, t, {}).x0
    eye = torch.eye(2, dtype=torch.float64)
    expected = torch.trace(sigma**2 * COVARIANCE @ torch.linalg.inv(COVARIANCE + sigma**2 * eye)).item()
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        weight, bias = (torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((2, 2), (2,)))
        student = x_t @ weight + bias
        gap = ((student - x0).square() - (student - teacher).square()).sum(1).mean().item()
        assert gap == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("curve", [torch.sin, torch.exp, lambda x: x**3])
def test_the_identity_holds_for_curved_students_too(curve):
    """In one dimension, by Gauss-Hermite quadrature over sample and noise."""
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(60))
    z, eps = (part.reshape(-1) for part in torch.meshgrid(nodes, nodes, indexing="ij"))
    weight = torch.outer(weights, weights).reshape(-1) / (2 * torch.pi)
    variance, sigma, schedule = 0.4, 0.8, EDMSchedule()
    x0 = 0.3 + variance**0.5 * z
    t = torch.full((len(z),), sigma, dtype=torch.float64)
    x_t = schedule.add_noise(x0[:, None], eps[:, None], t)
    teacher = GaussianMixture([[0.3]], variance).denoiser(schedule)(x_t, t, {}).x0[:, 0]
    student = curve(x_t[:, 0])
    gap = (weight * ((student - x0).square() - (student - teacher).square())).sum().item()
    assert gap == pytest.approx(sigma**2 * variance / (variance + sigma**2), abs=1e-9)


KINDS = {
    "edm": (EDMSchedule(), 0.7, "edm"),
    "x0 on edm": (EDMSchedule(), 2.5, "x0"),
    "eps": (linear_betas(), 300, "eps"),
    "v": (linear_betas(), 600, "v"),
    "v at pure noise": (zero_snr(), 999, "v"),
    "flow": (FlowSchedule(), 0.4, "flow"),
}


@pytest.mark.parametrize("name", KINDS)
def test_score_matching_has_the_gradient_of_denoising_and_its_optimum_is_zero(name):
    schedule, time, kind = KINDS[name]
    x0, eps, x_t, t = noised(schedule, time, MEANS[3], COVARIANCE)
    target = GaussianMixture(MEANS[3:], COVARIANCE).denoiser(schedule)(x_t, t, {})
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 2), (2,))
    weight, bias = (torch.randn(*s, dtype=torch.float64, generator=generator).requires_grad_() for s in shapes)
    prediction = Prediction(schedule, x_t, t, x_t @ weight + bias, kind)
    matching, denoising = (
        denoising_loss(prediction, target.x0, target.eps, kind),
        denoising_loss(prediction, x0, eps, kind),
    )
    slopes = [torch.autograd.grad(loss, (weight, bias), retain_graph=True) for loss in (matching, denoising)]
    for slope, expected in zip(*slopes, strict=True):
        assert slope.abs().max() > 1e-3
        torch.testing.assert_close(slope, expected, rtol=1e-9, atol=1e-12)
    assert denoising - matching > 1e-3
    exact = Prediction(schedule, x_t, t, target.of(kind), kind)
    assert denoising_loss(exact, target.x0, target.eps, kind) < 1e-20


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_a_linear_student_of_low_rank_ends_at_the_truncated_singular_values(rank):
    """min E|(W - K) x_t|^2 over rank W <= r is the sum of the other squared singular values of K Sigma_t^(1/2)."""
    dim, schedule, level = 6, linear_betas(), 400
    generator = torch.Generator().manual_seed(2)
    root = torch.randn(dim, dim, dtype=torch.float64, generator=generator) / dim**0.5
    covariance = root @ root.T + 0.05 * torch.eye(dim, dtype=torch.float64)
    zero = torch.zeros(dim, dtype=torch.float64)
    _, _, x_t, t = noised(schedule, level, zero, covariance)
    target = GaussianMixture(zero[None], covariance).denoiser(schedule)(x_t, t, {})
    alpha, sigma = (c[0].item() for c in schedule.alpha_sigma(t))
    marginal = alpha**2 * covariance + sigma**2 * torch.eye(dim, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(marginal)
    half = vectors @ values.sqrt().diag() @ vectors.T
    left, singular, right = torch.linalg.svd(alpha * covariance @ torch.linalg.inv(marginal) @ half)
    best = left[:, :rank] @ singular[:rank].diag() @ right[:rank] @ torch.linalg.inv(half)

    factors = [torch.randn(*shape, dtype=torch.float64, generator=generator) for shape in ((dim, rank), (rank, dim))]
    up, down = (factor.requires_grad_() for factor in factors)
    optimizer = torch.optim.LBFGS(
        [up, down], max_iter=800, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        prediction = Prediction(schedule, x_t, t, x_t @ (up @ down).T, "x0")
        loss = dim * denoising_loss(prediction, target.x0, target.eps, "x0")
        loss.backward()
        return loss

    optimizer.step(closure)
    assert closure().item() == pytest.approx(singular[rank:].square().sum().item(), rel=1e-9)
    torch.testing.assert_close((up @ down).detach(), best, rtol=0, atol=1e-6)


# -- the trainer -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tsm")
    for kind in ("eps", "v", "edm"):
        tiny.save_pixels(folder / kind, kind, labels=3, null=True)
    pixels = np.random.default_rng(0).integers(0, 255, (12, 8, 8), dtype=np.uint8)
    np.savez(folder / "images.npz", images=pixels, labels=np.arange(12) % 3)
    return folder


def tsm_trainer(root, output, kind: str, **changes):
    raw = {
        "method": "tsm",
        "output": str(output),
        "teacher": {"path": str(root / kind)},
        "data": {"images": {"npz": str(root / "images.npz")}},
        "train": {"updates": 2, "batch_size": 4, "trackers": []},
        "evaluation": {"enabled": False},
    }
    return build_trainer(make_job(merge(raw, changes)), None)


def spied(trainer, monkeypatch) -> list[torch.Tensor]:
    """The times that the trainer draws."""
    times, draw_time = [], trainer.method.draw_time

    def spied_draw(*arguments):
        times.append(draw_time(*arguments))
        return times[-1]

    monkeypatch.setattr(trainer.method, "draw_time", spied_draw)
    return times


@pytest.mark.parametrize("kind", ["eps", "v", "edm"])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient(kind, root, tmp_path):
    trainer = tsm_trainer(root, tmp_path, kind)
    batch = trainer.method.next_batch()
    loss = trainer.method.total("student", trainer.method.student_losses(batch))
    loss.backward()
    parameters = trainer.roles.student.parameters().values()
    largest = max(p.grad.abs().max().item() for p in parameters)
    assert all(p.grad is None for p in trainer.roles.teacher.network.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1)
            parameter.grad = None
    other = trainer.method.total("student", trainer.method.student_losses(batch))
    other.backward()
    assert loss.item() < 1e-12 * other.item()  # float32 rounds what is converted to v
    assert largest < 1e-5 * max(p.grad.abs().max().item() for p in parameters)
    assert all(p.grad is None for p in trainer.roles.teacher.network.parameters())


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["eps", "v", "edm"])
def test_the_loss_is_the_distance_to_the_teacher_weighted_as_its_own_training(kind, scale, root, tmp_path, monkeypatch):
    """By hand: eps and v errors on VP; (sigma^-2 + sigma_data^-2) |x0_s - x0_T|^2 on EDM."""
    changes = {"tsm": {"guidance_scale": scale, "min_level": 100, "max_level": 700}}
    trainer = tsm_trainer(root, tmp_path, kind, roles={"network": {"block_out_channels": [4, 8]}}, **changes)
    times = spied(trainer, monkeypatch)
    batch = trainer.method.next_batch()
    loss = trainer.method.student_losses(batch)["score_matching"][1]
    (t,) = times
    levels = [trainer.family.schedule.level(torch.tensor(n)) for n in (100, 700)]
    assert levels[0] <= t.min() < t.max() <= levels[1]
    schedule, networks = trainer.family.schedule, (trainer.roles.student.network, trainer.family.network)
    alpha, sigma = (expand(c, batch.real) for c in schedule.alpha_sigma(t))
    x_t = (alpha * batch.real + sigma * batch.noise).float()

    def predict(network, label):
        with torch.no_grad():
            return network(schedule.network_input(x_t, t), schedule.network_time(t), class_labels=label).sample.double()

    label, null = batch.condition["label"], torch.full((4,), 3)
    assert label.tolist() == batch.items
    student, teacher, unguided = predict(networks[0], label), predict(networks[1], label), predict(networks[1], null)
    error = (student - (unguided + scale * (teacher - unguided))).square()
    if kind == "edm":
        error = error * (sigma * 0.5 / (sigma**2 + 0.25).sqrt()) ** 2 * (sigma**-2 + 0.5**-2)
    assert loss.item() == pytest.approx(error.mean().item(), rel=2e-5)
