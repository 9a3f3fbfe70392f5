"""TSCD on Gaussians through its real trainer: a student of one gain a point has closed-form fixed points."""

import pytest
import torch
from segmented import double, gradients, grid_of, multiplier, real_source, scale
from torch import nn
from toys import linear_betas, sigma_points, toy_trainer

from stepdistill.analytic import GaussianMixture
from stepdistill.families.analytic import AnalyticFamily
from stepdistill.sampler import FewStepSampler
from stepdistill.schedule import FlowSchedule
from stepdistill.trainers.methods.base import Batch

F64 = torch.float64
POINTS = sigma_points(2)


class Gains(nn.Module):
    """x0 = mean + gain[u] (x - alpha_u mean): one number for each point of the grid.

    ``gain = raw * unit``: units that make every number's loss equally curved, so that plain descent is Newton's.
    """

    def __init__(self, grid, schedule, mean, unit):
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(grid.points + 1))
        self.grid, self.labels, self.mean = grid, schedule.network_time(grid.time[1:]).double(), mean
        self.unit = unit

    @property
    def gain(self):
        return self.raw * self.unit

    def forward(self, x, time, label=None):
        u = 1 + (time.double()[:, None] - self.labels).abs().argmin(1)
        return self.mean + scale(self.gain[u]) * (x - scale(self.grid.alpha[u]) * self.mean)


def curvature(grid, c, end):
    """Half the second derivative of a point's loss by its gain: E[w_e^2] r_u^2, with 1 for u = 0."""
    result = [1.0]
    for u in range(1, grid.points + 1):
        start = int(grid.start(torch.tensor([u])))
        e = torch.arange(start, u if end == "random" else start + 1)
        w = grid.alpha[e] - grid.alpha[u] * grid.sigma[e] / grid.sigma[u]
        result.append((w**2).mean().item() * (grid.alpha[u] ** 2 * c**2 + grid.sigma[u] ** 2).item())
    return torch.tensor(result, dtype=F64)


def gaussian_trainer(
    schedule, points=40, segments=1, c=1.0, mean=0.0, transition="ode", train=None, gain=None, **settings
):
    """Teacher N(mean, c^2) and a student of one gain a point; ``segments`` need not divide ``points``."""
    grid = grid_of(schedule, points, segments, transition)
    network = Gains(grid, schedule, mean, curvature(grid, c, settings.get("end", "start")) ** -0.5)
    if gain is not None:
        network.raw.data.copy_(gain / network.unit)
    family = AnalyticFamily(GaussianMixture([[mean]], c**2).denoiser(schedule), network, "x0", (1, 1, 1))
    trainer = toy_trainer(
        family,
        real_source(family),
        method="tscd",
        tscd={"grid": points, **{k: v for k, v in settings.items() if k != "optimizer"}},
        sampler={"transition": "ode" if isinstance(schedule, FlowSchedule) else "tcd"},
        data={"images": {"folder": "unused"}},
        train={"updates": 4, "batch_size": 4 * points, "log_every": 10**6, **(train or {})},
        optimizer={"student": {"lr": points / 2, "clip": 1e9, **settings.get("optimizer", {})}},
    )
    trainer.method.grid = grid
    double(trainer)
    trainer.optimizers.adamw["student"] = torch.optim.SGD(list(trainer.trained["student"].values()), lr=1.0)

    def next_batch(copies=points):
        z, n = (POINTS[:, i].repeat(copies).reshape(-1, 1, 1, 1) for i in (0, 1))
        return Batch({}, n, [], mean + c * z)

    trainer.method.next_batch = next_batch
    trainer.noise.randint = lambda low, high, count: torch.arange(low, high + 1).repeat_interleave(4)
    return trainer


def jump(grid, gain, u, end):
    """The multiplier of one move from u to ``end`` with an x0 gain of gain[u]."""
    ratio = grid.sigma[end] / grid.sigma[u]
    return grid.alpha[end] * gain[u] + ratio * (1 - grid.alpha[u] * gain[u])


def products(grid, c):
    """Gains with which the student's move to its segment's start is the teacher's steps there."""
    step, gain = multiplier(grid, c), torch.zeros(grid.points + 1, dtype=F64)
    for u in range(1, grid.points + 1):
        b = int(grid.start(torch.tensor([u])))
        ratio = grid.sigma[b] / grid.sigma[u]
        gain[u] = (step[b:u].prod() - ratio) / (grid.alpha[b] - grid.alpha[u] * ratio)
    return gain


def averages(grid, c):
    """Gains that are best on average over ends uniform in the segment, from its start upward (the sheet's D2)."""
    step, gain = multiplier(grid, c), torch.zeros(grid.points + 1, dtype=F64)
    for u in range(1, grid.points + 1):
        over, under = 0.0, 0.0
        for e in range(int(grid.start(torch.tensor([u]))), u):
            ratio = grid.sigma[e] / grid.sigma[u]
            w = grid.alpha[e] - grid.alpha[u] * ratio
            q = step[u - 1] * (1.0 if e == u - 1 else jump(grid, gain, u - 1, e))
            over, under = over + w * (q - ratio), under + w * w
        gain[u] = over / under
    return gain


LAWS = {"start": products, "random": averages}


def set_gains(trainer, gain):
    with torch.no_grad():
        for role in {trainer.roles.student, trainer.method.target}:
            role.network.raw.copy_(gain / role.network.unit)


FIXED_POINTS = [
    ("vp", 40, 4, {"target_decay": 0.0}, 40),
    ("vp", 50, 8, {"target_decay": 0.0}, 40),
    ("vp", 40, 1, {"target_decay": 0.0}, 50),
    ("vp", 40, 1, {"target_decay": 0.3}, 130),
    ("vp", 40, 4, {"target_decay": 0.5, "teacher": "base"}, 80),
    ("flow", 40, 2, {"target_decay": 0.0}, 40),
    ("flow_shift", 40, 4, {"target_decay": 0.3}, 60),
]


@pytest.mark.parametrize(("name", "points", "segments", "own", "updates"), FIXED_POINTS)
def test_the_loop_ends_where_every_jump_to_a_segments_start_is_the_teachers_steps(name, points, segments, own, updates):
    c, mean = 0.6, 0.7
    schedule = {"vp": linear_betas, "flow": FlowSchedule, "flow_shift": lambda: FlowSchedule(3.0)}[name]()
    transition = "tcd" if name == "vp" else "ode"
    trainer = gaussian_trainer(schedule, points, segments, c, mean, transition, {"updates": updates}, **own)
    trainer.fit()
    assert trainer.counters["student"] == updates
    gain = trainer.roles.student.network.gain.detach()
    expected = products(trainer.method.grid, c)
    torch.testing.assert_close(gain[1:], expected[1:], rtol=0, atol=1e-5)
    u = torch.arange(1, points + 1)
    step = multiplier(trainer.method.grid, c)
    start = trainer.method.grid.start(u)
    teachers = torch.stack([step[b:t].prod() for b, t in zip(start, u, strict=True)])
    torch.testing.assert_close(jump(trainer.method.grid, gain, u, start), teachers, rtol=0, atol=1e-5)
    if own["target_decay"]:
        target = trainer.method.target.network.gain.detach()
        torch.testing.assert_close(target[1:], expected[1:], rtol=0, atol=1e-5)


def expected_gradients(trainer):
    """d loss / d gain at each point, in expectation over u, its end and the data: exact, by enumeration."""
    grid = trainer.method.grid
    total = torch.zeros(grid.points + 1, dtype=F64)
    for point in range(1, grid.points + 1):
        at = torch.tensor([point])
        choices = int(at - grid.start(at)) if trainer.method.settings.end == "random" else 1
        trainer.noise.randint = lambda low, high, count, at=at: at.repeat(count)
        places = ((torch.arange(choices) + 0.5) / choices).repeat_interleave(4)
        trainer.noise.uniform = lambda count, places=places: places
        ((_, loss),) = trainer.method.student_losses(trainer.method.next_batch(choices)).values()
        (result,) = gradients(trainer, loss).values()
        total += result / grid.points
    return total[1:]


@pytest.mark.parametrize("law", LAWS)
@pytest.mark.parametrize(("segments", "c", "transition"), [(1, 1.0, "tcd"), (4, 2.0, "tcd"), (8, 0.3, "ode")])
def test_the_loss_is_stationary_at_its_own_law_and_not_at_the_others(segments, c, transition, law):
    schedule = linear_betas()
    trainer = gaussian_trainer(schedule, 50, segments, c, 0.7, transition, end=law, target_decay=0.0)
    for name, gains in LAWS.items():
        set_gains(trainer, gains(trainer.method.grid, c))
        result = expected_gradients(trainer).abs()
        if name == law:
            assert result.max() < 1e-12
        else:
            start = trainer.method.grid.start(torch.arange(1, 51))
            first = torch.arange(1, 51) - start == 1
            assert result[first].max() < 1e-12  # there the two laws are one
            assert (result[~first] > 1e-9).all()


def total_gain(trainer):
    """What unit noise becomes in one step a segment, through the sampler itself: the std of its samples."""
    grid = trainer.method.grid
    times = tuple(grid.time[grid.edges[1:]].flip(0).tolist())
    sampler = FewStepSampler(trainer.family.schedule, times, "tcd", 0.0)
    return sampler.sample(trainer.roles.student, torch.ones(1, 1, 1, 1, dtype=F64), {}, None).item()


SEGMENTS = (1, 2, 4, 8, 50)
TABLE = {
    (1.0, "random"): (0.681, 0.834, 0.913, 0.948, 0.9729),
    (0.3, "random"): (0.149, 0.192, 0.234, 0.258, 0.2764),
    (2.0, "random"): (1.575, 1.762, 1.857, 1.904, 1.944),
    (1.0, "start"): (0.9729,) * 5,
    (0.3, "start"): (0.2764,) * 5,
    (2.0, "start"): (1.944,) * 5,
}


@pytest.mark.parametrize(("c", "end"), TABLE)
def test_the_sheets_table_of_deviations(c, end):
    schedule, result = linear_betas(), []
    for segments in SEGMENTS:
        trainer = gaussian_trainer(schedule, 50, segments, c, transition="tcd", end=end)
        set_gains(trainer, LAWS[end](trainer.method.grid, c))
        result.append(total_gain(trainer))
    assert result == pytest.approx(TABLE[c, end], abs=6e-4)


@pytest.mark.parametrize(("end", "deviation"), [("start", 0.9729), ("random", 0.681)])
def test_drawn_points_lead_to_the_sheets_deviation(end, deviation):
    """u and its end by the trainer's own draws: 0.681 of 0.973 at one segment, where ``start`` keeps it."""
    settings = {"end": end, "target_decay": 0.0, "optimizer": {"lr": 25.0, "decay": 500}}
    trainer = gaussian_trainer(linear_betas(), 50, 1, 1.0, 0.0, "tcd", {"updates": 500}, **settings)
    del trainer.noise.randint  # the class's own again
    trainer.fit()
    assert total_gain(trainer) == pytest.approx(deviation, abs=0.01)


def test_a_later_stage_taught_by_the_one_before_keeps_the_first_teachers_trajectory():
    """8 segments of 40 points, then 2 of the 8 points that the first stage's student knows."""
    schedule, c, mean = linear_betas(), 0.6, 0.7
    fine = grid_of(schedule, 40, 8, "tcd")
    known = products(fine, c)[[0, *range(5, 41, 5)]]
    settings = {"teacher": "previous_stage", "target_decay": 0.0}
    trainer = gaussian_trainer(schedule, 8, 2, c, mean, "tcd", {"updates": 12}, known, **settings)
    trainer.fit()
    step, gain = multiplier(fine, c), trainer.roles.student.network.gain.detach()
    u = torch.arange(1, 9)
    start = trainer.method.grid.start(u)
    expected = torch.stack([step[5 * b : 5 * t].prod() for b, t in zip(start, u, strict=True)])
    torch.testing.assert_close(jump(trainer.method.grid, gain, u, start), expected, rtol=0, atol=1e-5)
    base = products(trainer.method.grid, c)  # what eight steps of the teacher itself would have taught
    assert (base - gain)[1:].abs().max() > 0.01
    torch.testing.assert_close(trainer.method.solver.network.gain, known, rtol=0, atol=1e-5)
