"""Teachers in closed form, small networks, and trainers around them."""

from __future__ import annotations

import dataclasses

import torch
from accelerate import Accelerator
from torch import nn

from stepdistill.analytic import GaussianMixture
from stepdistill.data.images import ImageSet
from stepdistill.data.streams import ConditionSource, RealSource
from stepdistill.denoiser import Prediction
from stepdistill.families.analytic import AnalyticFamily
from stepdistill.judges.perception import load_perceptual
from stepdistill.judges.rewards import load_rewards
from stepdistill.objectives.score_divergence import score_terms
from stepdistill.roles.recorded import NodeStore
from stepdistill.roles.roles import Roles
from stepdistill.schedule import EDMSchedule, VPSchedule
from stepdistill.trainers.loop.trainer import Trainer
from stepdistill.trainers.methods.base import Parts
from stepdistill.trainers.plans.build import Fit, make_pair_source
from stepdistill.trainers.plans.job import make_job


def linear_betas(count: int = 1000, low: float = 0.00085, high: float = 0.012) -> VPSchedule:
    """Stable Diffusion's schedule: abar[999] = 0.00466."""
    betas = torch.linspace(low**0.5, high**0.5, count, dtype=torch.float64) ** 2
    return VPSchedule(torch.cumprod(1 - betas, 0))


def zero_snr() -> VPSchedule:
    """A cosine schedule whose last alpha is exactly 0."""
    u = torch.linspace(0, 1, 1000, dtype=torch.float64)
    return VPSchedule((torch.cos(u * torch.pi / 2) ** 2).clamp(max=0.9999) * (u < 1))


class MLP(nn.Module):
    """A small network on (B, D, 1, 1) with time and label; ``features`` is its middle."""

    def __init__(self, dim: int, hidden: int = 64, num_labels: int = 0, time_scale: float = 1000.0):
        super().__init__()
        self.time_scale = time_scale
        self.label = nn.Embedding(num_labels + 1, 8) if num_labels else None
        self.into = nn.Linear(dim + 17 + (8 if num_labels else 0), hidden)
        self.middle = nn.Sequential(nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU())
        self.features = nn.Unflatten(1, (hidden, 1, 1))
        self.out = nn.Linear(hidden, dim)

    def forward(self, x, time, label=None):
        t = (time / self.time_scale).to(x.dtype)[:, None]
        waves = torch.cat([t, *[f(t * torch.pi * 2**k) for k in range(8) for f in (torch.sin, torch.cos)]], 1)
        parts = [x.flatten(1), waves]
        if self.label is not None:
            parts.append(self.label(label))
        hidden = self.features(self.middle(self.into(torch.cat(parts, 1))))
        return self.out(hidden.flatten(1)).reshape(x.shape)


def toy_config(**changes) -> dict:
    """A raw DMD2 config for toys; ``changes`` are sections to merge."""
    from stepdistill.config import merge

    raw = {
        "method": "dmd2",
        "output": "unused",
        "teacher": {"path": "unused"},
        "optimizer": {
            "student": {"lr": 1e-3, "weight_decay": 0.0, "betas": [0.0, 0.99]},
            "fake_score": {"lr": 2e-3, "weight_decay": 0.0, "betas": [0.0, 0.99]},
        },
        "train": {"updates": 4, "batch_size": 8, "trackers": []},
        "evaluation": {"enabled": False},
    }
    return merge(raw, changes)


def toy_family(
    mixture: GaussianMixture | None = None, schedule=None, kind="v", hidden: int = 64, dtype=torch.float32
) -> AnalyticFamily:
    """A mixture teacher with an MLP for student and fake score."""
    mixture = mixture or GaussianMixture([[-1.0, 0.5], [1.0, -0.5]], 0.05)
    dim, labels = mixture.means.shape[1], mixture.num_labels
    torch.manual_seed(0)
    network = MLP(dim, hidden, labels).to(dtype)
    teacher = mixture.denoiser(schedule or zero_snr())
    return AnalyticFamily(teacher, network, kind, (dim, 1, 1), labels, feature_module="features")


def toy_trainer(family: AnalyticFamily | None = None, real=None, run=None, **changes) -> Trainer:
    """A trainer of the config's method on a toy family; ``changes`` are sections, or parts by name (``noise=...``)."""
    family = family or toy_family()
    replaced = {name: changes.pop(name) for name in [*changes] if name in PARTS}
    job = make_job(toy_config(**changes))
    config, needs = job.config, job.needs
    roles = Roles(family, config.roles, fake_score=job.method.has_fake_score)
    sampler = job.method.make_sampler(config, family)
    items = list(range(family.num_labels))
    parts = {
        "conditions": ConditionSource(family, items, config.seed),
        "real": real,
        "decode": family.decoder(needs.decoder) if needs.pixels else None,
        "rewards": load_rewards(list(needs.rewards)),
        "perceptual": None if needs.perceptual is None else load_perceptual(needs.perceptual),
        "nodes": NodeStore(run.nodes if run else None),
        **replaced,
    }
    if needs.teacher_pairs is not None:
        parts["teacher_pairs"] = make_pair_source(
            needs.teacher_pairs, job, family, Fit(items, items), Accelerator(cpu=True)
        )
    return Trainer(job.method, Parts(config, family, roles, sampler, **parts), run)


PARTS = {field.name for field in dataclasses.fields(Parts)} - {"config", "family", "roles", "sampler", "real"}


def real_source(family: AnalyticFamily, count: int = 32, labels: list[int] | None = None) -> RealSource:
    """Seeded samples in place of pictures."""
    latents = torch.randn(count, *family.sample_shape, generator=torch.Generator().manual_seed(3))
    return RealSource(family, ImageSet("toy", None, count, labels, ""), latents, 0)


class Gaussians:
    """One noise level with exact scores; expectations over points (z, n) with weights."""

    def __init__(self, schedule, t, m, S, a, B, points, weights=None):
        dim = len(m)
        self.schedule, self.m, self.S = schedule, m, S
        self.a, self.B = a.clone().requires_grad_(), B.clone().requires_grad_()
        self.z, self.n = points[:, :dim], points[:, dim:]
        self.weights = torch.full((len(points),), 1 / len(points), dtype=torch.float64) if weights is None else weights
        self.t = torch.full((len(points),), t, dtype=torch.float64 if isinstance(schedule, EDMSchedule) else torch.long)
        self.alpha, self.sigma = (c[0] for c in schedule.alpha_sigma(self.t))
        eye = torch.eye(dim, dtype=torch.float64)
        self.P_inverse = torch.linalg.inv(self.alpha**2 * B @ B.T + self.sigma**2 * eye)
        self.Q_inverse = torch.linalg.inv(self.alpha**2 * S + self.sigma**2 * eye)
        self.teacher = GaussianMixture(m[None], S).denoiser(schedule)
        self.fake_score = GaussianMixture(a.detach()[None], (B @ B.T).detach()).denoiser(schedule)
        self.delta = self.alpha * (a - m)

    def terms(self, space="score", detach=False):
        x0 = self.z @ self.B.T + self.a
        x_t = self.schedule.add_noise(x0, self.n, self.t)
        if detach:
            x_t = x_t.detach()
        predictions = [denoiser(x_t, self.t, {}) for denoiser in (self.teacher, self.fake_score)]
        return (*score_terms(*predictions, x0, space), x0, predictions[0].x0)

    def gradient(self, loss):
        """d/da and d/dB of the weighted mean of ``loss`` (N,)."""
        return torch.autograd.grad((self.weights * loss).sum(), (self.a, self.B))


def sigma_points(dim: int) -> torch.Tensor:
    """2 dim points (2 dim, dim) with mean 0 and covariance exactly I: means of quadratics over them are exact."""
    points = dim**0.5 * torch.eye(dim, dtype=torch.float64)
    return torch.cat([points, -points])


def fit_to_teacher(family: AnalyticFamily, mixture: GaussianMixture, steps: int, batch: int = 256) -> None:
    """Train the family's network to be the teacher, as a real run starts from it."""
    from stepdistill.objectives.denoising import denoising_loss

    generator = torch.Generator().manual_seed(0)
    network = family.network.requires_grad_(True)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    denoiser = family.denoiser()
    for _ in range(steps):
        x0 = mixture.sample(batch, generator).float().reshape(batch, *family.sample_shape)
        eps = torch.randn(x0.shape, generator=generator)
        t = family.schedule.level(torch.randint(family.schedule.num_levels, (batch,), generator=generator))
        prediction = denoiser(family.schedule.add_noise(x0, eps, t), t, {})
        optimizer.zero_grad()
        denoising_loss(prediction, x0, eps, family.kind).backward()
        optimizer.step()
        schedule.step()


class ByLabel:
    """Conditional N(mean[label], variance): a class of its own mean, a null label of its own too."""

    def __init__(self, means, variance, schedule):
        self.means, self.schedule = torch.tensor(means, dtype=torch.float64), schedule
        self.unit = GaussianMixture([[0.0]], variance).denoiser(schedule)

    def __call__(self, x_t, t, condition):
        mean = self.means[condition["label"]].reshape(-1, 1, 1, 1)
        alpha = self.schedule.alpha_sigma(t)[0].reshape(-1, 1, 1, 1)
        x0 = self.unit(x_t - alpha * mean, t, {}).x0 + mean
        return Prediction(self.schedule, x_t, t, x0, "x0")


def energy_distance(a, b):
    """2 E|a-b| - E|a-a'| - E|b-b'| (Szekely & Rizzo), 0 iff the distributions are the same."""
    mean = lambda x, y: torch.cdist(x, y).mean().item()  # noqa: E731
    return 2 * mean(a, b) - mean(a, a) - mean(b, b)


def students_samples(trainer, count=4000):
    noise = torch.randn(count, *trainer.family.sample_shape, generator=torch.Generator().manual_seed(5))
    with torch.no_grad(), trainer.exported():
        x0 = trainer.sampler.sample(trainer.roles.student, noise, {}, trainer.noise.randn_like)
    return x0.flatten(1).double()


def assert_reaches_the_mixture(most: float = 0.03, steps: int = 1500, **changes) -> None:
    """A learned teacher copy, student and fake score on a 2-D mixture of three, through a method's real loop.

    The distance is the energy distance of 4,000 samples to 4,000 of the mixture; two samples of it are below 0.001
    apart.  ``changes``: what :func:`toy_trainer` takes.
    """
    from stepdistill.config import merge

    mixture = GaussianMixture([[-1.0, 0.3], [0.9, 0.6], [0.1, -1.0]], 0.03, weights=[0.4, 0.3, 0.3])
    family = toy_family(mixture, zero_snr(), hidden=128)
    fit_to_teacher(family, mixture, steps)
    defaults = {
        "train": {"updates": 400, "batch_size": 256, "ema_decay": 0.98},
        "optimizer": {"student": {"lr": 5e-4, "warmup": 50}, "fake_score": {"lr": 1e-3, "warmup": 50}},
    }
    trainer = toy_trainer(family, **merge(defaults, changes))
    truth = mixture.sample(4000, torch.Generator().manual_seed(1))
    before = energy_distance(students_samples(trainer), truth)
    trainer.fit()
    after = energy_distance(students_samples(trainer), truth)
    assert before > 0.5
    assert after < most, f"energy distance {before:.3f} -> {after:.4f}"


def take_all(trainer: Trainer, updates) -> None:
    """Take a step for each of a method's updates."""
    for update in updates:
        trainer.take(update)


def send_backward(terms) -> None:
    """Gather the gradients of a method's terms, without a step."""
    for term in terms:
        term.value.backward(term.gradient)
