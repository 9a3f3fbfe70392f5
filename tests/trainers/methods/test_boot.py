"""BOOT through its real trainer: the fixed point of a tabular student against DDIM, where gradients go, and a mixture.

A tabular student has a gain and a bias of its own for each label, so for data N(mu, c^2) it can be the trajectory's
signal at every label exactly, and shares nothing between labels.
"""

from __future__ import annotations

import types
from itertools import pairwise

import pytest
import torch
from torch import nn
from toys import (
    MLP,
    ByLabel,
    energy_distance,
    fit_to_teacher,
    linear_betas,
    students_samples,
    toy_config,
    toy_family,
    toy_trainer,
    zero_snr,
)

from stepdistill.analytic import GaussianMixture
from stepdistill.denoiser import Prediction
from stepdistill.errors import UserError
from stepdistill.families.analytic import AnalyticFamily
from stepdistill.sampler import SignalSampler
from stepdistill.schedule import EDMSchedule, FlowSchedule, VPSchedule
from stepdistill.trainers.methods import boot
from stepdistill.trainers.methods.base import Batch
from stepdistill.trainers.methods.boot import BOOT
from stepdistill.trainers.plans.build import check_fit
from stepdistill.trainers.plans.job import make_job

F64 = torch.float64
LEVELS, DELTA, LOW = 41, 5, 1
LAST = LEVELS - 1
MU, C = (0.5, -1.0), (0.3, 2.0)


def short_schedule(name):
    """Schedules of 41 levels; ``vp`` ends at alpha 0.048, ``sharp`` begins at sigma 0.00005."""
    u = torch.linspace(0, 1, LEVELS, dtype=F64)
    return {
        "vp": lambda: linear_betas(LEVELS, 0.02, 0.3),
        "sharp": lambda: VPSchedule(torch.sigmoid(20 - 26 * u)),
        "zero_snr": lambda: VPSchedule((torch.cos((u * 0.98 + 0.02) * torch.pi / 2) ** 2) * (u < 1)),
        "flow": lambda: FlowSchedule(num_train_timesteps=LEVELS),
        "edm": lambda: EDMSchedule(num_levels=LEVELS),
    }[name]()


class Table(nn.Module):
    """Output = gain[label] x + bias[label], per dimension."""

    def __init__(self, schedule, dim=2):
        super().__init__()
        self.register_buffer("times", schedule.network_time(schedule.level(torch.arange(LEVELS))))
        self.gain, self.bias = (nn.Parameter(torch.zeros(LEVELS, dim)) for _ in range(2))

    def forward(self, x, time, label=None):
        index = (time[:, None] - self.times).abs().argmin(1)
        return (self.gain[index] * x.flatten(1) + self.bias[index]).reshape(x.shape)


def thousandths(levels):
    """What the config says for so many of the LEVELS."""
    return -(-1000 * levels // LEVELS)


def tabular(name, kind, updates=4, lr=0.02, teacher=None, delta=DELTA, **settings):
    """A trainer whose float64 student is a table, and whose data are N(MU, C^2)."""
    schedule = short_schedule(name)
    gaussian = GaussianMixture([MU], torch.diag(torch.tensor(C, dtype=F64) ** 2))
    family = AnalyticFamily(teacher or gaussian.denoiser(schedule), Table(schedule), kind, (2, 1, 1))
    if teacher is not None:
        teacher.schedule = family.schedule = schedule
    trainer = toy_trainer(
        family,
        method="boot",
        boot={"delta": thousandths(delta), "min_level": thousandths(LOW), **settings},
        train={"updates": updates, "batch_size": 128, "log_every": 1000},
        optimizer={"student": {"lr": lr, "betas": [0.0, 0.99], "decay": updates, "clip": 1e9}},
    )
    trainer.roles.student.network.double()
    return trainer


def made_of(noise):
    return Batch({}, noise, [])


def noise_of(count, seed=0, dim=2):
    return torch.randn(count, dim, 1, 1, dtype=F64, generator=torch.Generator().manual_seed(seed))


def levels_at(trainer, level, count):
    return trainer.roles.student.schedule.level(torch.full((count,), level))


def recursion(schedule, solver="euler", delta=DELTA):
    """Gains and biases (LEVELS, 2) of the signal: the teacher's steps from x_T = alpha_T f(eps, T) + sigma_T eps.

    By hand: x is held as A eps + B.  Levels come in chains that end at T, the last step of a chain being shorter.
    """
    mu, c = torch.tensor(MU, dtype=F64), torch.tensor(C, dtype=F64)
    alpha, sigma = schedule.alpha_sigma(schedule.level(torch.arange(LEVELS)))

    def f(A, B, i):
        m = alpha[i] * c**2 / (alpha[i] ** 2 * c**2 + sigma[i] ** 2)
        return m * A, mu + m * (B - alpha[i] * mu)

    K, b = torch.zeros(2, LEVELS, 2, dtype=F64)
    K[LAST], b[LAST] = f(schedule.start_scale(schedule.level(torch.tensor(LAST)).item()), 0.0, LAST)
    for s in reversed(range(LAST)):
        t = min(s + delta, LAST)
        x_t = (alpha[t] * K[t] + sigma[t], alpha[t] * b[t])
        x0 = f(*x_t, t)
        e = [(x - alpha[t] * y) / sigma[t] for x, y in zip(x_t, x0, strict=True)]
        x_s = [alpha[s] * y + sigma[s] * n for y, n in zip(x0, e, strict=True)]
        if solver == "heun":
            then = f(*x_s, s)
            e_s = [(x - alpha[s] * y) / sigma[s] for x, y in zip(x_s, then, strict=True)]
            d_alpha, d_sigma = (alpha[s] - alpha[t]) / 2, (sigma[s] - sigma[t]) / 2
            parts = zip(x_t, x0, then, e, e_s, strict=True)
            x_s = [x + d_alpha * (y + y_s) + d_sigma * (n + n_s) for x, y, y_s, n, n_s in parts]
        K[s], b[s] = (x_s[0] - sigma[s]) / alpha[s], x_s[1] / alpha[s]
    return K, b


def signals(trainer):
    """The student's own gains and biases (LEVELS, 2)."""
    t = trainer.roles.student.schedule.level(torch.arange(LEVELS))
    with torch.no_grad():
        b, y = (trainer.roles.student.signal(torch.full((LEVELS, 2, 1, 1), v, dtype=F64), t, {}) for v in (0.0, 1.0))
    return (y - b)[..., 0, 0], b[..., 0, 0]


@torch.no_grad()
def teach(trainer, K, b, labels=None):
    """Write the table that says the signals K eps + b, whatever the head; T's coefficients for every label."""
    schedule, kind, table = trainer.roles.student.schedule, trainer.family.kind, trainer.roles.student.network
    last = levels_at(trainer, LAST, LEVELS)
    ones = torch.ones(LEVELS, 2, 1, 1, dtype=F64) * schedule.start_scale(last[0].item())
    K, b = K.reshape(ones.shape), b.reshape(ones.shape)
    bias = schedule.from_x0(b, kind, 0 * ones, last)
    gain = (schedule.from_x0(K + b, kind, ones, last) - bias) / schedule.network_input(ones, last)
    rows = slice(None) if labels is None else labels
    table.gain[rows], table.bias[rows] = gain[rows, :, 0, 0], bias[rows, :, 0, 0]


def solve(trainer, delta=DELTA):
    """Make each label's bootstrapping loss zero, from T down, by the trainer's own targets; y_T is left as it is."""
    zero_one = torch.stack([torch.zeros(2, 1, 1, dtype=F64), torch.ones(2, 1, 1, dtype=F64)])
    for s in reversed(range(LOW, LAST)):
        t = min(s + delta, LAST)
        b, y = trainer.method.bootstrapped(made_of(zero_one), levels_at(trainer, t, 2), levels_at(trainer, s, 2))
        K, bias = signals(trainer)
        K[s], bias[s] = (y - b)[:, 0, 0], b[:, 0, 0]
        teach(trainer, K, bias, [s])


def error(trainer, expected):
    """The largest difference of the student's signals to those expected, for each label from LOW to T."""
    parts = [(got - target).abs().amax(1)[LOW:] for got, target in zip(signals(trainer), expected, strict=True)]
    return torch.maximum(*parts)


def start_solved(trainer, delta=DELTA):
    """The fixed point that the trainer's targets have, from y_T = f(eps, T); its largest difference to DDIM's."""
    expected = recursion(trainer.roles.student.schedule, trainer.method.settings.solver, delta)
    teach(trainer, *expected, [LAST])
    solve(trainer, delta)
    return error(trainer, expected).max().item()


def gradients(trainer, name, batch):
    """Rows of the table that the loss ``name`` reaches, and the largest gradient."""
    _, loss = trainer.method.student_losses(batch)[name]
    result = torch.autograd.grad(loss, [trainer.roles.student.network.gain, trainer.roles.student.network.bias])
    rows = {i for gradient in result for i in gradient.abs().amax(1).nonzero()[:, 0].tolist()}
    return rows, max(gradient.abs().max().item() for gradient in result)


HEADS = [("vp", "x0"), ("vp", "eps"), ("vp", "v"), ("zero_snr", "v"), ("flow", "flow"), ("edm", "edm")]


# -- the discrete fixed point ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("vp", "x0", {}),
        ("flow", "flow", {"weight_floor": 1.0}),
        ("zero_snr", "v", {"solver": "heun"}),
    ],
)
def test_fit_reaches_the_teachers_recursion_at_every_label(name, kind, settings):
    """A floor of 1 is the unweighted loss: the weight has no part in the fixed point."""
    trainer = tabular(name, kind, updates=600, **settings)
    expected = recursion(trainer.roles.student.schedule, settings.get("solver", "euler"))
    before, off = error(trainer, expected), []
    trainer.watchers.append(lambda t: off.append(error(t, expected)) if t.counters["student"] % 10 == 0 else None)
    trainer.fit()
    assert before.min() > 0.05
    assert error(trainer, expected).max() < 1e-4
    assert torch.equal(trainer.roles.student.network.gain[:LOW], torch.zeros(LOW, 2, dtype=F64))  # never asked for
    if "weight_floor" not in settings:  # the frontier moves from T down the chain: each label waits for the one above
        arrived = (torch.stack(off) > 1e-2).sum(0)
        chain = [arrived[level - LOW].item() for level in range(LAST, LOW, -DELTA)]
        assert chain == sorted(chain)
        assert chain[0] < chain[3] < chain[-1]


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(("name", "kind"), HEADS)
def test_fixed_point_is_the_teachers_recursion_for_every_head(name, kind, solver):
    trainer = tabular(name, kind, solver=solver)
    assert start_solved(trainer) < 1e-8
    other = "heun" if solver == "euler" else "euler"
    assert error(trainer, recursion(trainer.roles.student.schedule, other)).max() > 1e-3


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize(("name", "kind"), HEADS)
def test_a_student_that_obeys_the_recursion_has_no_loss_and_no_gradient(name, kind, solver):
    trainer = tabular(name, kind, solver=solver)
    K, b = recursion(trainer.roles.student.schedule, solver)
    teach(trainer, K, b)
    batch = made_of(noise_of(500))
    for loss in ("bootstrap", "boundary"):
        assert trainer.method.student_losses(batch)[loss][1] < 1e-18
        assert gradients(trainer, loss, batch)[1] < 1e-7
    teach(trainer, K * 1.01, b + 0.01)
    for loss in ("bootstrap", "boundary"):
        assert trainer.method.student_losses(batch)[loss][1] > 1e-8
        assert gradients(trainer, loss, batch)[1] > 1e-5


def test_losses_are_weighted_by_the_settings():
    trainer = tabular("vp", "x0", boundary_weight=0.3, weight_floor=0.15)
    torch.nn.init.normal_(trainer.roles.student.network.gain)
    batch = made_of(noise_of(200))
    state = trainer.noise.get_state()
    losses = trainer.method.student_losses(batch)
    assert {name: weight for name, (weight, _) in losses.items()} == {"bootstrap": 1.0, "boundary": 0.3}
    trainer.noise.set_state(state)
    s, t = trainer.method.draw_levels(200)
    schedule = trainer.roles.student.schedule
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.alpha_sigma(s), schedule.alpha_sigma(t)
    weight = 1 - alpha_t * sigma_s / (sigma_t * alpha_s)
    K, b = signals(trainer)
    y_s, y_t = ((K[i] * batch.noise[..., 0, 0] + b[i]) for i in (s, t))
    x_t = alpha_t[:, None] * y_t + sigma_t[:, None] * batch.noise[..., 0, 0]
    x0 = trainer.family.teacher(x_t, t, {}).x0
    squares = (y_s - y_t - weight[:, None] * (x0 - y_t)).square()
    assert (weight.square() < 0.15).any()
    expected = (squares / weight.square().clamp(min=0.15)[:, None]).mean()
    torch.testing.assert_close(losses["bootstrap"][1], expected, rtol=1e-9, atol=0)
    y_T, f_T = K[LAST] * batch.noise[..., 0, 0] + b[LAST], trainer.family.teacher(batch.noise, 0 * t + LAST, {}).x0
    torch.testing.assert_close(losses["boundary"][1], (y_T - f_T[..., 0, 0]).square().mean(), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("name", "kind"), [("zero_snr", "v"), ("flow", "flow"), ("vp", "x0")])
def test_one_step_over_the_whole_range_is_the_teachers_word_at_the_noise(name, kind):
    """Exactly where alpha_T = 0; elsewhere the step starts at alpha_T f(eps, T) + sigma_T eps, and f is asked there."""
    trainer = tabular(name, kind, delta=LAST - LOW)
    assert start_solved(trainer, LAST - LOW) < 1e-9
    K, b = signals(trainer)
    off = max((K[LOW:] - K[LAST]).abs().max().item(), (b[LOW:] - b[LAST]).abs().max().item())
    assert off < 1e-9 if name != "vp" else 1e-3 < off < 0.2


class Says:
    """A teacher whose x0 is always ``a``."""

    def __init__(self, a):
        self.a, self.schedule = a, None

    def __call__(self, x_t, t, condition):
        return Prediction(self.schedule, x_t, t, torch.full_like(x_t, self.a), "x0")


@pytest.mark.parametrize("delta", [1, 7, 39])
@pytest.mark.parametrize(("name", "kind"), [("vp", "eps"), ("edm", "edm")])
def test_a_teacher_that_says_one_thing_gives_an_exact_exponential(name, kind, delta):
    """y_t - a = exp(lambda_t - lambda_T) (y_T - a), for every delta and a y_T that is not even the teacher's."""
    trainer = tabular(name, kind, teacher=Says(0.4), delta=delta)
    K, b = torch.full((LEVELS, 2), 1.7, dtype=F64), torch.full((LEVELS, 2), -0.6, dtype=F64)
    teach(trainer, K, b)
    solve(trainer, delta)
    schedule = trainer.roles.student.schedule
    alpha, sigma = schedule.alpha_sigma(schedule.level(torch.arange(LEVELS)))
    decay = ((sigma / alpha).log() - (sigma[LAST] / alpha[LAST]).log()).exp()[:, None]
    assert error(trainer, (decay * 1.7 * torch.ones(2), 0.4 + decay * -1.0 * torch.ones(2))).max() < 1e-9


# -- wrong ones, by the same checks ------------------------------------------------------------------------------


def with_predicted_noise(trainer, monkeypatch):
    """y_s = (x_s - sigma_s eps_phi) / alpha_s, the teacher's noise in place of the path's own, is f(x_t, t)."""
    monkeypatch.setattr(boot, "signal_target", lambda y_t, x0, weight: x0)


def with_the_papers_euler_form(trainer, monkeypatch):
    """delta lambda' (here exactly integrated: lambda_t - lambda_s) in place of w."""
    schedule = trainer.roles.student.schedule

    def rates(t, s):
        (alpha_t, sigma_t), (alpha_s, sigma_s) = schedule.alpha_sigma(t), schedule.alpha_sigma(s)
        return (sigma_t / alpha_t).log() - (sigma_s / alpha_s).log()

    monkeypatch.setattr(schedule, "signal_weight", rates)


def without_the_noise_in_the_teachers_input(trainer, monkeypatch):
    schedule = trainer.roles.student.schedule
    add_noise = schedule.add_noise
    monkeypatch.setattr(schedule, "add_noise", lambda x0, eps, t: add_noise(x0, 0 * eps, t))


def with_the_label_of_s(trainer, monkeypatch):
    """The teacher is told s at the point of t."""
    ask = trainer.method.teacher_x0
    lower = lambda x, t, c: ask(x, (t - DELTA).clamp(min=0), c)  # noqa: E731
    monkeypatch.setattr(trainer.method, "teacher_x0", lower)


@pytest.mark.parametrize(
    "mutate",
    [
        with_predicted_noise,
        with_the_papers_euler_form,
        without_the_noise_in_the_teachers_input,
        with_the_label_of_s,
    ],
)
def test_wrong_targets_have_another_fixed_point(mutate, monkeypatch):
    trainer = tabular("vp", "x0")
    assert start_solved(trainer) < 1e-9
    mutate(trainer, monkeypatch)
    assert start_solved(trainer) > 0.05


def test_another_samples_noise_in_the_teachers_input_is_a_loss(monkeypatch):
    trainer = tabular("flow", "flow")
    teach(trainer, *recursion(trainer.roles.student.schedule))
    batch = made_of(noise_of(200))
    assert trainer.method.student_losses(batch)["bootstrap"][1] < 1e-18
    schedule = trainer.roles.student.schedule
    add_noise = schedule.add_noise
    monkeypatch.setattr(schedule, "add_noise", lambda x0, eps, t: add_noise(x0, eps.roll(1, 0), t))
    assert trainer.method.student_losses(batch)["bootstrap"][1] > 0.1


def test_without_the_boundary_any_start_is_a_fixed_point():
    trainer = tabular("vp", "x0")
    schedule = trainer.roles.student.schedule
    K, b = recursion(schedule)
    teach(trainer, K + 0.5, b)
    solve(trainer)
    losses = trainer.method.student_losses(made_of(noise_of(200)))
    assert losses["bootstrap"][1] < 1e-18
    assert losses["boundary"][1] > 0.1
    assert error(trainer, recursion(schedule))[0] > 0.005  # and it ends elsewhere


def read_at_its_own_label(trainer):
    """The wrong head: converted with the label's alpha and sigma though its input is the noise."""
    role = trainer.roles.student

    def signal(eps, t, condition):
        output = role._forward(eps, role.schedule.network_time(t), condition)
        return role.schedule.to_x0(output, role.kind, eps, t)

    role.signal = signal


def test_an_eps_head_read_with_its_labels_own_coefficients_would_diverge():
    """It would have to say (eps - alpha_t y_t) / sigma_t; so it does not get there, and ours does."""
    schedule = short_schedule("sharp")
    alpha, sigma = schedule.alpha_sigma(torch.arange(LEVELS))
    assert sigma[0] < 1e-4
    K, _ = recursion(schedule)
    settings = ((1 - alpha[:, None] * K) / sigma[:, None]).abs().amax(1)
    assert settings[LAST // 2] < 50
    assert settings[LOW] > 5e3
    trainer = tabular("sharp", "eps")
    teach(trainer, *recursion(schedule))
    assert trainer.roles.student.network.gain.abs().max() < 2
    result = []
    for wrong in (False, True):
        trainer = tabular("sharp", "eps", updates=300, lr=0.05)
        if wrong:
            read_at_its_own_label(trainer)
        trainer.fit()
        result.append(error(trainer, recursion(schedule)).max().item())
    assert result[0] < 1e-4
    assert result[1] > 0.5


# -- where gradients go, and who is asked ------------------------------------------------------------------------


def at_levels(trainer, s, t):
    trainer.method.draw_levels = lambda count: (torch.full((count,), s), torch.full((count,), t))


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_target_carries_no_gradient(solver):
    trainer = tabular("vp", "v", solver=solver)
    for parameter in trainer.roles.student.network.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))
    at_levels(trainer, 10, 15)
    batch = made_of(noise_of(50))
    assert gradients(trainer, "bootstrap", batch)[0] == {10}
    assert gradients(trainer, "boundary", batch)[0] == {LAST}
    target = trainer.method.bootstrapped(batch, levels_at(trainer, 15, 50), levels_at(trainer, 10, 50))
    assert not target.requires_grad
    with_graph = BOOT.bootstrapped.__wrapped__  # without its no_grad
    trainer.method.bootstrapped = types.MethodType(with_graph, trainer.method)
    assert gradients(trainer, "bootstrap", batch)[0] == {10, 15}


NETWORKS = [
    ("eps", linear_betas()),
    ("v", zero_snr()),
    ("flow", FlowSchedule()),
    ("flow", FlowSchedule(shift=3.0)),
    ("edm", EDMSchedule()),
]


def copied(kind, schedule, num_labels=0, **settings):
    """A trainer whose teacher is the network that the student is a copy of."""
    labels = list(range(num_labels)) or None
    mixture = GaussianMixture([[-1.0, 0.5], [1.0, -0.5]], 0.05, labels=labels)
    family = toy_family(mixture, schedule, kind, hidden=16)
    family.teacher_denoiser = lambda: None
    return toy_trainer(family, method="boot", boot=settings, train={"updates": 3, "batch_size": 16})


@pytest.mark.parametrize(("kind", "schedule"), NETWORKS)
def test_boundary_loss_of_an_untouched_student_is_exactly_zero(kind, schedule):
    trainer = copied(kind, schedule)
    batch = trainer.method.next_batch()
    losses = trainer.method.student_losses(batch)
    assert losses["boundary"][1].item() == 0.0
    assert losses["bootstrap"][1] > 1e-6
    with torch.no_grad():
        trainer.roles.student.network.out.bias += 0.1
    assert trainer.method.student_losses(batch)["boundary"][1] > 1e-6


@pytest.mark.parametrize(("kind", "schedule"), NETWORKS)
def test_signal_is_the_networks_word_on_the_starting_noise_under_another_label(kind, schedule):
    trainer = copied(kind, schedule)
    student, seen = trainer.roles.student, []
    student.network.register_forward_pre_hook(lambda module, args: seen.append(args))
    eps = noise_of(6).float()
    scale = schedule.start_scale(schedule.level(torch.tensor(999)).item())
    last, t = levels_at(trainer, 999, 6), levels_at(trainer, 300, 6)
    at_last, at_t = student.signal(eps, last, {}), student.signal(eps, t, {})
    torch.testing.assert_close(at_last, student(eps * scale, last, {}).x0, rtol=0, atol=0)
    (x_last, time_last, _), (x_t, time_t, _), _ = seen
    assert torch.equal(x_last, x_t)
    torch.testing.assert_close(x_t, schedule.network_input(eps * scale, last))
    assert torch.equal(time_last, schedule.network_time(last))
    assert torch.equal(time_t, schedule.network_time(t))
    output = student.network(x_t, time_t)
    torch.testing.assert_close(at_t, schedule.to_x0(output, kind, eps * scale, last), rtol=0, atol=0)


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_the_teacher_gets_no_gradient(solver):
    trainer = copied("v", zero_snr(), solver=solver)
    trainer.family.network.requires_grad_(True)  # which a run does not: nothing reaches it all the same
    trainer.method.total("student", trainer.method.student_losses(trainer.method.next_batch())).backward()
    assert all(p.grad is None for p in trainer.family.network.parameters())
    assert all(p.grad is not None for p in trainer.trained["student"].values())


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_passes_are_those_of_the_plan(solver, guidance_scale):
    trainer = copied("v", zero_snr(), num_labels=2, solver=solver, guidance_scale=guidance_scale)
    trainer.fit()
    assert trainer.passes == 3 * 16 * BOOT.passes(trainer.config).per_update


def test_errors_are_logged_by_span_of_labels():
    trainer = copied("v", zero_snr())
    levels = torch.tensor([0, 249, 250, 499, 500, 999])
    trainer.method._log_bins(levels, torch.tensor([1.0, 3.0, 5.0, 7.0, 9.0, 11.0]))
    assert {k: v[0].item() for k, v in trainer.parts.journal.values.items()} == {
        "bootstrap_error/1_of_4": 2.0,
        "bootstrap_error/2_of_4": 6.0,
        "bootstrap_error/3_of_4": 9.0,
        "bootstrap_error/4_of_4": 11.0,
    }


# -- labels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("delta", "min_level"), [(50, 1), (50, 20), (1, 1), (998, 1)])
def test_every_label_below_the_last_is_drawn(delta, min_level):
    trainer = copied("v", zero_snr(), delta=delta, min_level=min_level)
    s, t = trainer.method.draw_levels(100_000)
    counts = torch.bincount(s, minlength=1000)
    assert counts[:min_level].sum() == 0
    assert counts[999] == 0
    assert (counts[min_level:999] > 0).all()
    mean = 100_000 / (999 - min_level)
    assert counts[min_level:999].double().var().item() == pytest.approx(mean, rel=0.2)  # uniform: a Poisson's
    assert torch.equal(t, (s + delta).clamp(max=999))
    assert (t > s).all()


def trained_rows(trainer, rounds=30):
    """Labels that any loss trains, and those of the boundary."""
    batch = made_of(noise_of(100))
    rows = set().union(*(gradients(trainer, "bootstrap", batch)[0] for _ in range(rounds)))
    return rows, gradients(trainer, "boundary", batch)[0]


def test_no_label_is_left_out_next_to_the_boundary():
    trainer = tabular("vp", "x0")
    nn.init.normal_(trainer.roles.student.network.gain)
    assert trained_rows(trainer) == (set(range(LOW, LAST)), {LAST})

    def t_first(count):
        t = trainer.noise.randint(LOW + DELTA, LAST, count)
        return t - DELTA, t

    trainer.method.draw_levels = t_first  # the paper's: labels between T - delta and T are never asked for
    assert trained_rows(trainer)[0] == set(range(LOW, LAST - DELTA + 1))


def test_progressive_range_grows_from_the_noise_down():
    trainer = copied("v", zero_snr(), progressive=100, min_level=10)
    lowest = []
    for update in (0, 9, 49, 98, 99, 100, 1000):
        trainer.counters["student"] = update
        s, t = trainer.method.draw_levels(30_000)
        lowest.append(s.min().item())
        assert s.max() == 998
        assert torch.equal(t, (s + 50).clamp(max=999))
    assert lowest == [989, 900, 504, 20, 10, 10, 10]
    # with so many updates that the first ones have no level: the one below the last is theirs
    trainer = copied("v", zero_snr(), progressive=100_000)
    assert trainer.method.draw_levels(50)[0].unique().tolist() == [998]


def test_progressive_range_in_the_loop():
    trainer = tabular("flow", "flow", updates=30, progressive=20)
    drawn, draw = [], trainer.method.draw_levels
    trainer.method.draw_levels = lambda count: drawn.append(draw(count)) or drawn[-1]
    trainer.fit()
    lowest = [s.min().item() for s, _ in drawn]
    assert lowest[0] == 38
    assert lowest[:19] == sorted(lowest[:19], reverse=True)
    assert {level for s, _ in drawn[19:] for level in s.tolist()} == set(range(LOW, LAST))


# -- guidance ----------------------------------------------------------------------------------------------------

MEANS = [-1.0, 1.0, 0.3]
"""Of class 0, class 1 and no class; the variance is 0.25."""


class Asked(ByLabel):
    """Remembers the labels of each call."""

    def __init__(self, schedule):
        super().__init__(MEANS, 0.25, schedule)
        self.labels = []

    def __call__(self, x_t, t, condition):
        self.labels.append(condition["label"].tolist())
        return super().__call__(x_t, t, condition)


def classes(**settings):
    schedule = FlowSchedule()
    torch.manual_seed(0)
    family = AnalyticFamily(Asked(schedule), MLP(1, 8, 2), "flow", (1, 1, 1), num_labels=2)
    trainer = toy_trainer(family, method="boot", boot=settings, train={"updates": 2, "batch_size": 6})
    trainer.roles.student.network.double()
    batch = Batch({"label": torch.tensor([0, 1, 0, 1, 1, 0])}, noise_of(6, dim=1), [])
    return trainer, batch


def f_by_hand(x, t, label, scale):
    def of(index):
        mean = torch.tensor(MEANS, dtype=F64)[index].reshape(-1, 1, 1, 1)
        alpha, sigma = (1 - t).reshape(-1, 1, 1, 1), t.reshape(-1, 1, 1, 1)
        return mean + alpha * 0.25 / (alpha**2 * 0.25 + sigma**2) * (x - alpha * mean)

    none = of(torch.full_like(label, 2))
    return none + scale * (of(label) - none)


@pytest.mark.parametrize("solver", ["euler", "heun"])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_guidance_is_in_both_losses(scale, solver):
    trainer, batch = classes(guidance_scale=scale, solver=solver)
    label, eps, student = batch.condition["label"], batch.noise, trainer.roles.student
    t, s = torch.tensor([[1.0, 0.9, 0.7, 0.5, 0.3, 0.1], [0.95, 0.8, 0.6, 0.4, 0.2, 0.01]], dtype=F64)
    with torch.no_grad():
        y_t = student.signal(eps, t, batch.condition)
        y_T = student.signal(eps, torch.ones(6), batch.condition)
    T, S = t.reshape(-1, 1, 1, 1), s.reshape(-1, 1, 1, 1)
    x_t = (1 - T) * y_t + T * eps

    def target(scale):
        v = (x_t - f_by_hand(x_t, t, label, scale)) / T
        x_s = x_t + (S - T) * v
        if solver == "heun":
            x_s = x_t + (S - T) * (v + (x_s - f_by_hand(x_s, s, label, scale)) / S) / 2
        return (x_s - S * eps) / (1 - S)

    torch.testing.assert_close(trainer.method.bootstrapped(batch, t, s), target(scale), rtol=1e-9, atol=1e-9)
    boundary = lambda scale: (y_T - f_by_hand(eps, torch.ones(6, dtype=F64), label, scale)).square().mean()  # noqa: E731
    torch.testing.assert_close(trainer.method.student_losses(batch)["boundary"][1].detach(), boundary(scale))
    other = 3.5 - scale  # and neither is the unguided teacher's where it should be guided
    assert (target(other) - target(scale)).abs().max() > 0.1
    assert abs(boundary(other) - boundary(scale)) > 0.1


@pytest.mark.parametrize(("solver", "calls"), [("euler", 2), ("heun", 3)])
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_the_student_is_told_the_condition_alone(scale, solver, calls):
    trainer, batch = classes(guidance_scale=scale, solver=solver)
    seen, settings = [], batch.condition["label"].tolist()
    trainer.roles.student.network.register_forward_pre_hook(lambda module, args: seen.append(args[2].tolist()))
    trainer.method.student_losses(batch)
    assert seen == [settings] * 3
    assert trainer.family.teacher.labels == [settings if scale == 1 else [2] * 6 + settings] * calls


# -- the sampler, and the config ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "schedule"), NETWORKS)
@pytest.mark.parametrize("min_level", [1, 40])
def test_sample_is_one_call_under_the_lowest_label(kind, schedule, min_level):
    trainer = copied(kind, schedule, min_level=min_level)
    sampler, student = trainer.sampler, trainer.roles.student
    assert isinstance(sampler, SignalSampler)
    assert sampler.times == (schedule.level(torch.tensor(min_level)).item(),)
    noise, before = noise_of(6).float(), trainer.passes
    with torch.no_grad():
        x0 = sampler.sample(student, noise, {}, trainer.noise.randn_like)
        assert trainer.passes - before == 6
        assert torch.equal(x0, student.signal(noise, levels_at(trainer, min_level, 6), {}))
        assert not torch.equal(x0, student.signal(noise, levels_at(trainer, 999, 6), {}))
    with pytest.raises(ValueError, match="one step"):
        sampler.rollout(student, noise, {}, 0, trainer.noise.randn_like)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"sampler": {"steps": 4}}, "one step from pure noise"),
        ({"sampler": {"start": 400}}, "one step from pure noise"),
        ({"sampler": {"init_sigma": 2.5}}, "one step from pure noise"),
        ({"boot": {"delta": 990, "min_level": 20}}, "delta = 990 above min_level = 20"),
        ({"boot": {"guidance_scale": 0.5}}, r"boot\.guidance_scale"),
        ({"boot": {"solver": "rk4"}}, r"boot\.solver"),
        ({"boot": {"weight_floor": 0.0}}, r"boot\.weight_floor"),
    ],
)
def test_bad_configs(changes, says):
    with pytest.raises(UserError, match=says):
        make_job(toy_config(method="boot", **changes))


def check_settings(settings, family):
    assert BOOT.check(make_job(toy_config(method="boot", boot=settings)).config, family) == []


def test_teachers_that_do_not_fit():
    with pytest.raises(UserError, match="cannot be guided"):
        check_fit(make_job(toy_config(method="boot", boot={"guidance_scale": 2.0})), toy_family())
    with pytest.raises(UserError, match=r"min_level = 0"):
        check_settings({"min_level": 0}, toy_family())
    check_settings({"min_level": 0}, toy_family(schedule=FlowSchedule()))


@pytest.mark.parametrize(
    ("timesteps", "low", "delta"), [(10, 1, 1), (100, 1, 5), (250, 1, 12), (1000, 1, 50), (4000, 4, 200)]
)
def test_labels_are_thousandths_of_the_schedule(timesteps, low, delta):
    """The defaults, min_level 1 and delta 50; timestep 0 cannot be told to a stock scheduler."""
    trainer = copied("eps", linear_betas(timesteps))
    s, t = trainer.method.draw_levels(200_000)
    assert (s.min().item(), s.max().item()) == (low, timesteps - 2)
    assert torch.equal(t, (s + delta).clamp(max=timesteps - 1))
    assert BOOT.check(trainer.config, trainer.family) == []
    assert BOOT.make_sampler(trainer.config, trainer.family).times == (float(low),)


def test_a_lowest_label_with_none_above_it_is_refused():
    check_settings({"min_level": 800}, toy_family(schedule=linear_betas(10)))
    with pytest.raises(UserError, match=r"min_level = 920: leaves no label above it among the teacher's 10 levels"):
        check_settings({"min_level": 920}, toy_family(schedule=linear_betas(10)))


# -- end to end --------------------------------------------------------------------------------------------------


def ddim_signals(f, schedule, eps, levels):
    """The signal at each of ``levels`` (descending from T) of DDIM along them from the same noise."""
    times = [schedule.level(torch.full((len(eps),), level)) for level in levels]
    x0 = f(eps, times[0], {}).x0
    result, x_t = [x0], schedule.add_noise(x0, eps, times[0])
    for t, s in pairwise(times):
        x_t = schedule.step(f(x_t, t, {}).x0, x_t, t, s)
        alpha, sigma = (v[0].item() for v in schedule.alpha_sigma(s))
        result.append((x_t - sigma * eps) / alpha)
    return result


def rmse(a, b):
    """Root of the mean squared distance between samples."""
    return (a - b).flatten(1).square().sum(1).mean().sqrt().item()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "schedule", "updates"), [("v", zero_snr(), 800), ("flow", FlowSchedule(), 500)])
def test_reaches_the_learned_teachers_samples_from_the_same_noise(kind, schedule, updates):
    mixture = GaussianMixture([[-1.0, 0.3], [0.9, 0.6], [0.1, -1.0]], 0.1, weights=[0.4, 0.3, 0.3])
    family = toy_family(mixture, schedule, kind, hidden=128)
    fit_to_teacher(family, mixture, 1000)
    family.teacher_denoiser = lambda: None
    levels = [999, *range(951, 0, -50)]
    eps = torch.randn(2000, 2, 1, 1, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        path = ddim_signals(family.denoiser(), schedule, eps, levels)
        full = ddim_signals(family.denoiser(), schedule, eps, list(range(999, 0, -1)))[-1]
    trainer = toy_trainer(
        family,
        method="boot",
        train={"updates": updates, "batch_size": 256, "ema_decay": 0.98, "log_every": 100},
        optimizer={"student": {"lr": 4e-3, "warmup": 50, "decay": updates}},
    )

    watched = range(6, len(levels), 2)  # labels 701, 601, ..., 1

    @torch.no_grad()
    def errors(trainer):
        few, times = eps[:500], [levels_at(trainer, levels[i], 500) for i in watched]
        return [
            rmse(trainer.roles.student.signal(few, t, {}), path[i][:500]) for t, i in zip(times, watched, strict=True)
        ]

    history = [errors(trainer)]
    trainer.watchers.append(lambda t: history.append(errors(t)) if t.counters["student"] in range(2, 41, 2) else None)
    truth = mixture.sample(4000, torch.Generator().manual_seed(1))
    before = energy_distance(students_samples(trainer), truth)
    trainer.fit()
    after = energy_distance(students_samples(trainer), truth)
    with torch.no_grad(), trainer.exported():
        x0 = trainer.sampler.sample(trainer.roles.student, eps, {}, trainer.noise.randn_like)
    assert before > 0.2
    assert after < 0.04
    assert history[0][-1] > 0.8
    assert rmse(x0, path[-1]) < 0.1  # of the teacher's samples by the same steps from the same noise
    assert rmse(x0, full) < 0.15  # and by all of the levels', of which those are 0.06 off
    if kind == "v":  # labels next to T, where a signal is little more than the mean, are almost right from the start
        halved = [next(i for i, row in enumerate(history) if row[k] < history[0][k] / 2) for k in range(len(watched))]
        assert halved == sorted(halved)
        assert halved[0] < halved[-1] / 1.3
