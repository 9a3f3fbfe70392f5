"""SIM through its real trainer: where its gradient goes, the laws of its draws, and that it arrives."""

import math

import pytest
import torch
from toys import MLP, assert_reaches_the_mixture, linear_betas, sigma_points, toy_family, toy_trainer

from stepdistill.analytic import GaussianMixture
from stepdistill.errors import UserError
from stepdistill.families.analytic import AnalyticFamily
from stepdistill.objectives.score_divergence import PseudoHuber, SquaredL2, score_terms, sid_weight, sim_loss
from stepdistill.schedule import EDMSchedule
from stepdistill.trainers.methods.sim import SIM

F64 = torch.float64
POINTS = sigma_points(2)


def on_a_line(**sim):
    """Teacher N(0, 1) and fake score of the student x0 = 0.7 + 0.5 z at alpha = sigma = 1, noise on sigma points."""
    schedule = EDMSchedule()
    torch.manual_seed(0)
    teacher = GaussianMixture([[0.0]], 1.0).denoiser(schedule)
    family = AnalyticFamily(teacher, MLP(1, 8).double(), "x0", (1, 1, 1))
    trainer = toy_trainer(family, method="sim", sim={"distance": "squared_l2", "space": "score", **sim})
    trainer.roles.fake_score = GaussianMixture([[0.7]], 0.25).denoiser(schedule)
    trainer.roles.student.schedule = schedule
    trainer.method.draw_time = lambda low, high, count: torch.ones(count, dtype=F64)
    trainer.noise.randn_like = lambda like: POINTS[:, 1].reshape(-1, 1, 1, 1)
    z = POINTS[:, 0].reshape(-1, 1, 1, 1)
    return trainer, 0.7 + 0.5 * z, z


def vector(trainer, x0, z):
    """(d_a, d_b) of the trainer's loss; exact, as the loss is quadratic in (z, n)."""
    gradient = trainer.method.sample_gradient(x0.clone(), trainer.method.next_batch())
    return gradient.sum().item(), (gradient * z).sum().item()


VECTORS = [
    ({}, (0.56, -0.48)),
    ({"objective": "full"}, (0.35, -0.39)),
    ({"objective": "sid", "sid_alpha": 1.2}, (0.322, -0.258)),
    ({"objective": "sid", "sid_alpha": 0.5}, (0.175, -0.195)),
]


@pytest.mark.parametrize(("sim", "expected"), VECTORS)
def test_the_trainers_gradient_is_the_closed_form(sim, expected):
    assert vector(*on_a_line(**sim)) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(("sim", "expected"), VECTORS)
def test_networks_under_no_grad_would_not_pass(sim, expected):
    trainer, x0, z = on_a_line(**sim)
    compare = trainer.method.predict_both
    trainer.method.predict_both = torch.no_grad()(compare)
    assert vector(trainer, x0, z) != pytest.approx(expected, abs=1e-2)


def test_distance_space_weight_and_mean_are_those_of_the_settings():
    trainer = toy_trainer(toy_family(dtype=F64), method="sim", sim={"c": 0.3, "weight": "sid"})
    batch = trainer.method.next_batch()
    x0 = trainer.method.make_sample(batch).detach()
    state = trainer.noise.get_state()
    ((weight, loss),) = trainer.method.student_losses(x0, batch).values()
    trainer.noise.set_state(state)
    prediction = trainer.method.predict_both(x0, batch.condition)
    settings = sim_loss(*score_terms(prediction.teacher, prediction.fake_score, x0, "x0"), PseudoHuber(0.3))
    torch.testing.assert_close(weight * loss, (settings * sid_weight(x0, prediction.teacher.x0)).mean() / 2)
    assert trainer.method.distance == PseudoHuber(0.3)
    assert toy_trainer(method="sim", sim={"distance": "squared_l2"}).method.distance == SquaredL2()
    assert toy_trainer(method="sim").method.distance == PseudoHuber(0.00054 * 2**0.5)


def test_gradients_pass_through_both_networks_and_stay_out_of_their_weights():
    family = toy_family()
    family.teacher_denoiser = lambda: None  # the network itself is the teacher
    trainer = toy_trainer(family, method="sim", sim={"objective": "full"})
    with torch.no_grad():
        for parameter in trainer.roles.fake_score.parameters().values():
            parameter.add_(0.1)
    reached = {"teacher": False, "fake_score": False}
    for name in reached:
        role = getattr(trainer.roles, name)

        def spy(x, t, condition, role=role, name=name):
            x.register_hook(lambda grad: reached.__setitem__(name, bool(grad.abs().sum() > 0)))
            return type(role).__call__(role, x, t, condition)

        spied = type("Spied", (), {"__call__": lambda self, *a, spy=spy: spy(*a), "schedule": role.schedule})()
        setattr(trainer.roles, name, spied)
    batch = trainer.method.next_batch()
    x0 = trainer.method.make_sample(batch)
    x0.backward(trainer.method.sample_gradient(x0.detach(), batch))
    assert reached == {"teacher": True, "fake_score": True}
    assert all(p.grad is not None for p in trainer.trained["student"].values())
    assert all(p.grad is None for p in trainer.trained["fake_score"].values())
    assert all(p.grad is None for p in trainer.family.network.parameters())


def test_student_and_fake_score_have_time_laws_of_their_own():
    schedule = EDMSchedule()
    teacher = GaussianMixture([[0.0]], 1.0).denoiser(schedule)
    family = AnalyticFamily(teacher, MLP(1, 8), "x0", (1, 1, 1))
    trainer = toy_trainer(family, method="sim", sim={"fake_score_law": {"mean": -1.2, "std": 1.2}})
    t, eps = trainer.method.fake_score_draw(torch.zeros(100_000, 1, 1, 1))
    assert (t.log().mean().item(), t.log().std().item()) == pytest.approx((-1.2, 1.2), abs=0.02)
    assert eps.std().item() == pytest.approx(1, abs=0.02)
    student = trainer.method.draw_time(trainer.method.settings.min_level, trainer.method.settings.max_level, 100_000)
    # SiD: u uniform in [0, 0.8] on Karras' grid from 0.002, so sigma up to 24.41 with median 0.97
    assert student.max().item() == pytest.approx(24.41, rel=0.01)
    assert student.median().item() == pytest.approx(0.97, rel=0.03)
    assert student.min().item() == pytest.approx(0.002, rel=0.05)


def test_init_sigma_is_the_generators_input():
    schedule = EDMSchedule()
    teacher = GaussianMixture([[0.0]], 1.0).denoiser(schedule)
    family = AnalyticFamily(teacher, MLP(1, 8), "x0", (1, 1, 1))
    trainer = toy_trainer(family, method="sim", sampler={"init_sigma": 2.5})
    batch = trainer.method.next_batch()
    x_t, t = trainer.method.student_input(batch)
    torch.testing.assert_close(x_t, 2.5 * batch.noise)
    assert (t == 2.5).all()
    # on Stable Diffusion's schedule sigma/alpha = 2.5 is timestep 625, SiD-LSG's
    vp = toy_trainer(toy_family(schedule=linear_betas(), kind="eps"), method="sim", sampler={"init_sigma": 2.5})
    assert vp.sampler.times == (625.0,)
    alpha, sigma = vp.family.schedule.alpha_sigma(torch.tensor([625]))
    assert math.isclose(sigma / alpha, 2.5, rel_tol=3e-3)


@pytest.mark.parametrize(
    ("sim", "says"),
    [
        ({"c": 0.1, "distance": "squared_l2"}, "sim.c is of distance"),
        ({"c": 0.1, "objective": "sid"}, "sim.c is of distance"),
        ({"space": "score"}, "set sim.c"),
        ({"c": 0.0}, "sim.c = 0.0"),
        ({"distance": "l1"}, "sim.distance = 'l1'"),
        ({"fake_score_law": {}, "fake_score_max_level": 979}, "fake_score_max_level are of fake_score_law = uniform"),
        ({"fake_score_law": {}, "fake_score_min_level": 20}, "fake_score_min_level and"),
    ],
)
def test_settings_that_do_not_go_together(sim, says):
    with pytest.raises(UserError, match=says):
        toy_trainer(method="sim", sim=sim)


@pytest.mark.slow
def test_reaches_a_mixture_through_the_real_loop():
    assert_reaches_the_mixture(method="sim", sim={"c": 0.1})


@pytest.mark.slow
def test_sid_reaches_it_too():
    assert_reaches_the_mixture(0.05, method="sim", sim={"objective": "sid", "weight": "sid", "fake_score_updates": 2})


def test_the_method_is_registered_as_itself():
    assert type(toy_trainer(method="sim").method) is SIM
