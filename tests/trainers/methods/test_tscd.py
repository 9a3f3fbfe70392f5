"""Trajectory-segmented consistency through its real trainer: laws of its draws, losses by hand, its target, guidance,
and that four stages in turn arrive.  Closed forms and the adversarial part have files of their own."""

import math
import re

import pytest
import scipy.stats
import tiny
import torch
from segmented import (
    F64,
    assert_same,
    batch_of,
    double,
    gradients,
    grid_of,
    point_at,
    real_source,
    scale,
    self_taught,
    shake,
    state_of,
    trainer_of,
    unets,
)
from torch import nn
from toys import (
    MLP,
    ByLabel,
    energy_distance,
    fit_to_teacher,
    linear_betas,
    students_samples,
    take_all,
    toy_family,
    toy_trainer,
    zero_snr,
)

from stepdistill.analytic import GaussianMixture
from stepdistill.errors import UserError
from stepdistill.families.analytic import AnalyticFamily
from stepdistill.families.unet2d import UNet2DFamily
from stepdistill.roles.roles import Roles
from stepdistill.sampler import few_step_times, ode_sample
from stepdistill.schedule import EDMSchedule, FlowSchedule
from stepdistill.trainers.methods.tscd import TSCD

# -- the law of the draws ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("end", "segments"), [("start", 4), ("random", 4), ("random", 1), ("random", 40)])
def test_points_are_uniform_and_their_ends_lie_in_their_own_segment(end, segments):
    trainer = trainer_of(segments=segments, end=end)
    u, where = trainer.method.draw_points(200_000)
    counts = torch.bincount(u, minlength=41)
    assert counts[0] == 0
    assert len(counts) == 41
    assert scipy.stats.chisquare(counts[1:]).pvalue > 1e-3
    start = (u - 1) // (40 // segments) * (40 // segments)
    assert (start <= where).all()
    assert (where <= u - 1).all()
    if end == "start":
        assert torch.equal(where, start)
        return
    statistic, freedom = 0.0, 0
    for point in range(1, 41):
        mine = u == point
        choices = int(point - start[mine][0])
        result = torch.bincount((where - start)[mine], minlength=choices).double()
        assert len(result) == choices
        statistic += ((result - result.mean()) ** 2 / result.mean()).sum().item()
        freedom += choices - 1
    assert freedom == sum((point - 1) % (40 // segments) for point in range(1, 41))
    if freedom:
        assert 1e-3 < scipy.stats.chi2.sf(statistic, freedom) < 1 - 1e-3


def test_the_batch_is_real_samples_with_fresh_noise():
    trainer = trainer_of(train={"batch_size": 64})
    first, second = trainer.method.next_batch(), trainer.method.next_batch()
    latents = trainer.parts.real.latents
    for batch in (first, second):
        assert torch.equal(batch.real, latents[list(batch.indices)])
        assert sorted(batch.indices) == list(range(64))
        assert batch.noise.std().item() == pytest.approx(1, abs=0.2)
    assert not torch.equal(first.noise, second.noise)
    assert trainer.counters["real"] == 128


def test_offset_noise_is_one_constant_a_channel():
    family = UNet2DFamily(tiny.unet(channels=2), tiny.scheduler("v"))
    whole = [
        trainer_of(family, offset_noise=offset, train={"batch_size": 32}).method.next_batch().noise
        for offset in (0.0, 0.5)
    ]
    added = whole[1] - whole[0]
    torch.testing.assert_close(added, added[:, :, :1, :1].expand_as(added), atol=1e-6, rtol=0)
    assert added[:, :, 0, 0].std().item() == pytest.approx(0.5, rel=0.3)
    assert len(added[:, :, 0, 0].unique()) == 64


# -- the loss by hand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vp", "zero_snr", "flow", "edm"])
@pytest.mark.parametrize("distance", [{}, {"huber_c": 0.01}, {"mse_weight": 0.3}])
def test_one_segment_to_its_start_is_plain_consistency_distillation(name, distance):
    """2303.01469 in its DDIM form, written out: the move to the clean sample is x0, and at the clean sample x."""
    schedule = {"vp": linear_betas, "zero_snr": zero_snr, "flow": FlowSchedule, "edm": EDMSchedule}[name]()
    family = toy_family(schedule=schedule, kind="x0" if name == "edm" else "v")
    trainer = trainer_of(family, sampler={"transition": "renoise"}, target_decay=0.9, **distance)
    double(trainer)
    shake(trainer.method.target)
    u, _ = point_at(trainer, [1, 2, 3, 10, 20, 30, 39, 40], [0] * 8)
    batch = batch_of()
    ((weight, loss),) = trainer.method.student_losses(batch).values()

    times = few_step_times(schedule, 40)[::-1]
    t, below = (torch.tensor([times[max(1, int(i)) - 1] for i in at], dtype=F64) for at in (u, u - 1))
    t, below = (x.long() if name in ("vp", "zero_snr") else x for x in (t, below))
    x_t = schedule.add_noise(batch.real, batch.noise, t)
    with torch.no_grad():
        teacher = family.teacher(x_t, t, {}).x0
        x_below = torch.where(scale(u == 1), teacher, schedule.step(teacher, x_t, t, below))
        aim = torch.where(scale(u == 1), teacher, trainer.method.target(x_below, below, {}).x0)
    squared = (trainer.roles.student(x_t, t, {}).x0 - aim) ** 2
    c = distance.get("huber_c")
    expected = squared.mean() if c is None else ((squared + c**2).sqrt() - c).mean()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    assert weight == distance.get("mse_weight", 1.0)
    result, target = gradients(trainer, loss), gradients(trainer, expected)
    for key in result:
        torch.testing.assert_close(result[key], target[key], rtol=1e-8, atol=1e-12)
    assert trainer.method.total("student", {"consistency": (weight, loss)}).item() == pytest.approx(
        weight * loss.item()
    )


def test_as_many_segments_as_points_ask_for_the_teachers_ddim():
    """loss = |Psi(x, student, u - 1) - x_(u-1)|^2, and exactly 0 while the student is the teacher."""
    trainer = self_taught(segments=40)
    for _ in range(4):
        ((_, loss),) = trainer.method.student_losses(trainer.method.next_batch()).values()
        assert loss.item() == 0
    shake(trainer.roles.student)
    batch = trainer.method.next_batch()
    state = trainer.noise.get_state()
    ((_, loss),) = trainer.method.student_losses(batch).values()
    trainer.noise.set_state(state)
    u, end = trainer.method.draw_points(8)
    assert torch.equal(end, u - 1)
    times = torch.tensor([0, *few_step_times(trainer.family.schedule, 40)[::-1]]).long()
    x_u = trainer.family.schedule.add_noise(batch.real, batch.noise, times[u])
    moved = []
    for role in (trainer.roles.student, trainer.roles.teacher):
        x0 = role(x_u, times[u], {}).x0
        step = trainer.family.schedule.step(x0, x_u, times[u], times[end])
        moved.append(torch.where(scale(u == 1), x0, step))
    torch.testing.assert_close(loss, (moved[0] - moved[1]).square().mean())
    assert loss > 1e-6


@pytest.mark.parametrize("segments", [1, 2, 4, 8])
def test_before_training_the_student_samples_as_the_teachers_ddim_bit_for_bit(segments):
    trainer = self_taught(segments=segments)
    noise = torch.randn(16, 2, 1, 1, generator=torch.Generator().manual_seed(0))
    times = few_step_times(trainer.family.schedule, segments)
    with torch.no_grad():
        result = trainer.sampler.sample(trainer.roles.student, noise, {}, None)
        expected = ode_sample(lambda x, t: trainer.roles.teacher(x, t, {}).x0, trainer.family.schedule, times, noise)
    assert torch.equal(result, expected)
    grid = trainer.method.grid
    assert trainer.sampler.times == tuple(grid.time[grid.edges[1:]].flip(0).tolist())


@pytest.mark.parametrize(("segments", "u"), [(8, 6), (4, 11), (1, 1), (40, 17)])
@pytest.mark.parametrize("end", ["start", "random"])
def test_at_a_segments_first_point_the_target_is_the_teachers_step_and_no_network(segments, u, end):
    """The gradient is that of one-step regression on the teacher; a target of NaN changes nothing there."""
    trainer = trainer_of(segments=segments, end=end)
    double(trainer)
    shake(trainer.method.target)
    trainer.noise.randint = lambda low, high, count: torch.full((count,), u)
    batch, grid = batch_of(), trainer.method.grid
    assert torch.equal(trainer.method.draw_points(8)[1], torch.full((8,), u - 1))
    ((_, loss),) = trainer.method.student_losses(batch).values()
    at, below = torch.full((8,), u), torch.full((8,), u - 1)
    x_u = grid.add_noise(batch.real, batch.noise, at)
    teacher, student = trainer.roles.teacher(x_u, grid.time[at], {}), trainer.roles.student(x_u, grid.time[at], {})
    step = grid.add_noise(teacher.x0, teacher.eps, below)
    expected = (grid.add_noise(student.x0, student.eps, below) - step).square().mean()
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-14)
    result, target = gradients(trainer, loss), gradients(trainer, expected)
    for key in result:
        torch.testing.assert_close(result[key], target[key], rtol=1e-9, atol=1e-14)
    for parameter in trainer.method.target.network.parameters():
        parameter.fill_(math.nan)
    assert_same(result, gradients(trainer, trainer.method.student_losses(batch)["consistency"][1]))


def test_at_a_later_point_the_target_network_is_asked():
    trainer = trainer_of(segments=8)
    point_at(trainer, 7, 5)
    batch = trainer.method.next_batch()
    before = trainer.method.student_losses(batch)["consistency"][1].item()
    shake(trainer.method.target)
    assert trainer.method.student_losses(batch)["consistency"][1].item() != pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("transition", ["ode", "tcd"])
def test_a_student_that_agrees_with_itself_has_no_loss_whichever_end_is_drawn(transition):
    """Data at one point: trajectories are straight in (alpha, sigma), so one x0 serves every end.  Another does not."""

    class Says(nn.Module):
        def __init__(self):
            super().__init__()
            self.x0 = nn.Parameter(torch.full((), 0.7))

        def forward(self, x, time, label=None):
            return self.x0.expand_as(x)

    family = AnalyticFamily(GaussianMixture([[0.7]], 0.0).denoiser(linear_betas()), Says(), "x0", (1, 1, 1))
    settings = {"points": 8, "end": "random", "target_decay": 0.0, "sampler": {"transition": transition}}
    trainer, batch = trainer_of(family, **settings), batch_of(dim=1)

    def losses():
        result = {}
        for u in range(1, 9):
            for end in range(u):
                point_at(trainer, u, end)
                result[u, end] = trainer.method.student_losses(batch)["consistency"][1].item()
        return result

    double(trainer)
    with torch.no_grad():
        trainer.roles.student.network.x0.fill_(0.7)
        assert max(losses().values()) < 1e-20
        trainer.roles.student.network.x0.add_(0.01)
        for (u, end), loss in losses().items():
            clean = transition == "ode" and end == 0 and u > 1  # where its word is all that both sides are
            assert (loss > 1e-12) != clean, (u, end)


def test_gathered_batches_count_as_one():
    """The mean of their losses, each on real samples and noise of its own, in one step."""
    trainer = trainer_of(train={"gradient_accumulation": 3})
    losses, recorded = [], {}
    student_losses, update = trainer.method.student_losses, trainer.step

    def noting(batch):
        result = student_losses(batch)
        losses.append(gradients(trainer, result["consistency"][1]))
        return student_losses(batch)

    def keeping(role):
        recorded.update({k: p.grad.clone() for k, p in trainer.trained[role].items()})
        return update(role)

    trainer.method.student_losses, trainer.step = noting, keeping
    u = torch.tensor([2, 5, 9, 14, 20, 28, 35, 40])
    trainer.method.draw_points = lambda count: (u, torch.zeros_like(u))
    trainer.iteration()
    assert trainer.counters["real"] == 24
    assert trainer.counters["student"] == 1
    for key, result in recorded.items():
        torch.testing.assert_close(result, sum(settings[key] for settings in losses) / 3, rtol=1e-4, atol=1e-6)
    assert max((losses[0][k] - losses[1][k]).abs().max() for k in recorded) > 1e-4


# -- the target --------------------------------------------------------------------------------------------------


def test_without_decay_the_target_is_the_student_itself_and_no_gradient_passes_it():
    trainer = trainer_of(target_decay=0.0)
    assert trainer.method.target is trainer.roles.student
    trainer.roles.student.network.double()
    u, end = point_at(trainer, 20, 0)
    batch, grid = batch_of(), trainer.method.grid
    ((_, loss),) = trainer.method.student_losses(batch).values()
    x_u = grid.add_noise(batch.real, batch.noise, u)
    with torch.no_grad():
        teacher = trainer.roles.teacher(x_u, grid.time[u], {})
        x_below = grid.add_noise(teacher.x0, teacher.eps, u - 1)
    near, far = trainer.roles.student(x_below, grid.time[u - 1], {}), trainer.roles.student(x_u, grid.time[u], {})
    p, q = (grid.add_noise(prediction.x0, prediction.eps, end) for prediction in (far, near))
    result, trained = gradients(trainer, loss), trainer.trained["student"]
    stopped, through = (
        dict(
            zip(
                trained,
                torch.autograd.grad((p - aim).square().mean(), trained.values(), retain_graph=True),
                strict=True,
            )
        )
        for aim in (q.detach(), q)
    )
    for key in result:
        torch.testing.assert_close(result[key], stopped[key], rtol=1e-9, atol=1e-13)
    assert max((result[key] - through[key]).abs().max() for key in result) > 1e-3


@pytest.mark.parametrize("weights", ["full", "shared"])
def test_the_target_is_the_students_moving_average(weights):
    trainer = unets(weights, {"lr": 1e-2}, target_decay=0.9)
    student, target = trainer.roles.student, trainer.method.target
    assert_same(target.portable_state_dict(), student.portable_state_dict())
    for _ in range(3):
        before = {k: v.clone() for k, v in target.portable_state_dict().items()}
        trainer.iteration()
        now, theirs = target.portable_state_dict(), student.portable_state_dict()
        assert before.keys() == theirs.keys()
        for key, value in now.items():
            torch.testing.assert_close(value, 0.9 * before[key] + 0.1 * theirs[key], rtol=1e-6, atol=1e-7)
        assert max((now[k] - before[k]).abs().max() for k in now) > 1e-4
        assert max((now[k] - theirs[k]).abs().max() for k in now) > 1e-3
    assert trainer.counters["student"] == 3


def own_weights(role):
    """A teacher's network holds its students' adapters, too."""
    return {k: v.clone() for k, v in role.state_dict().items() if "lora_" not in k or role.name != "teacher"}


@pytest.mark.parametrize("weights", ["full", "shared"])
@pytest.mark.parametrize("teacher", ["base", "previous_stage"])
def test_gradients_reach_the_student_alone(weights, teacher):
    trainer = unets(weights, {"lr": 1e-2}, teacher=teacher, adversarial={"weight": 0.1})
    shake(trainer.roles.student)
    trained, others = trainer.trained["student"], (trainer.roles.teacher, trainer.method.solver, trainer.method.target)
    frozen = [own_weights(role) for role in others]
    trainer.method.total("student", trainer.method.student_losses(trainer.method.next_batch())).backward()
    everything = [p for role in (trainer.roles.student, *others) for p in role.network.parameters()]
    reached = {id(p) for p in everything if p.grad is not None}
    assert reached == {id(p) for p in trained.values()}
    assert sum(p.grad.abs().sum() for p in trained.values()) > 0
    assert all(p.grad is None for p in trainer.method.networks["discriminator"].parameters())
    assert all((".student." in key) == (weights == "shared") for key in trained)
    trainer.step("student")
    take_all(trainer, trainer.method.other_updates())
    for role, before in zip(others[:2], frozen, strict=False):
        assert_same(own_weights(role), before)
    assert any(not torch.equal(v, frozen[2][k]) for k, v in trainer.method.target.state_dict().items())
    assert not any(
        p.requires_grad for key, p in trainer.method.target.network.named_parameters() if "student" not in key
    )


@pytest.mark.parametrize("weights", ["full", "shared"])
def test_target_and_previous_stage_start_as_the_student_and_the_latter_stays(weights, monkeypatch):
    """The student begins away from the teacher, as in every stage but the first."""

    def elsewhere(*args, **settings):
        roles = Roles(*args, **settings)
        shake(roles.student)
        return roles

    monkeypatch.setattr("toys.Roles", elsewhere)
    trainer = unets(weights, {"lr": 1e-2}, teacher="previous_stage", target_decay=0.5)
    student, others = trainer.roles.student, (trainer.roles.teacher, trainer.roles.student, trainer.method.target)
    assert trainer.method.solver not in others
    start = {k: v.clone() for k, v in student.portable_state_dict().items()}
    assert_same(start, trainer.method.solver.portable_state_dict())
    assert_same(start, trainer.method.target.portable_state_dict())
    trainer.iteration()
    assert_same(start, trainer.method.solver.portable_state_dict())
    for role in (student, trainer.method.target):
        assert any(not torch.equal(v, start[k]) for k, v in role.portable_state_dict().items())
    base = unets(weights)
    assert base.method.solver is base.roles.teacher


# -- guidance ----------------------------------------------------------------------------------------------------


def guided_trainer(**settings):
    """Teacher N(0.7, 0.3) for label 0 and N(0.2, 0.3) for null; the aim is the teacher's step itself."""
    teacher = ByLabel([0.7, 0.2], 0.3, linear_betas())
    torch.manual_seed(0)
    family = AnalyticFamily(teacher, MLP(1, 8, 1), "v", (1, 1, 1), num_labels=1)
    trainer = trainer_of(family, segments=40, **settings)
    double(trainer)
    calls = []

    class Spy:
        schedule = teacher.schedule

        def __call__(self, x_t, t, condition):
            calls.append(condition["label"].tolist())
            return teacher(x_t, t, condition)

    trainer.method.solver = Spy()
    return trainer, teacher, calls


def scale_of(trainer, teacher, batch, u):
    """The guidance scale of each sample, read off the aim; w = omega + 1."""
    grid = trainer.method.grid
    x_u = grid.add_noise(batch.real, batch.noise, u)
    prediction, null = (teacher(x_u, grid.time[u], {"label": torch.full((8,), label)}) for label in (0, 1))
    end = [grid.add_noise(p.x0, p.eps, u - 1) for p in (null, prediction)]
    return ((trainer.method.target_jump(x_u, u, u - 1, batch) - end[0]) / (end[1] - end[0])).flatten()


@pytest.mark.parametrize("w", [0.0, 1.0, 3.0, 7.5])
def test_the_teachers_step_is_guided_by_the_lcm_convention(w):
    trainer, teacher, calls = guided_trainer(guidance_scale=w)
    u, grid = torch.tensor([1, 2, 3, 9, 20, 30, 39, 40]), trainer.method.grid
    batch = batch_of(dim=1, condition={"label": torch.zeros(8, dtype=torch.long)})
    torch.testing.assert_close(
        scale_of(trainer, teacher, batch, u), torch.full((8,), w, dtype=F64), rtol=1e-6, atol=1e-6
    )
    assert calls == [[0] * 8 if w == 1 else [1] * 8 + [0] * 8]
    x_u = grid.add_noise(batch.real, batch.noise, u)
    prediction, null = (teacher(x_u, grid.time[u], {"label": torch.full((8,), label)}) for label in (0, 1))
    x0 = prediction.x0 + (w - 1) * (prediction.x0 - null.x0)
    eps = prediction.eps + (w - 1) * (prediction.eps - null.eps)
    by_hand = grid.add_noise(x0, eps, u - 1)
    torch.testing.assert_close(trainer.method.target_jump(x_u, u, u - 1, batch), by_hand, rtol=1e-9, atol=1e-9)


def test_one_scale_is_drawn_a_batch_uniform_in_its_range():
    trainer, teacher, calls = guided_trainer(guidance_range=[2.0, 14.0])
    u = torch.full((8,), 20)
    result = []
    for seed in range(5):
        batch = batch_of(dim=1, condition={"label": torch.zeros(8, dtype=torch.long)}, seed=seed)
        scales = scale_of(trainer, teacher, batch, u)
        torch.testing.assert_close(scales, scales[:1].expand(8), rtol=1e-9, atol=1e-9)
        result.append(scales[0].item())
    assert len(set(result)) == 5
    assert calls == [[1] * 8 + [0] * 8] * 5
    draws = torch.tensor([trainer.method.draw_scale(8) for _ in range(4000)])
    assert draws.min() >= 2
    assert draws.max() < 14
    assert scipy.stats.kstest(draws.numpy(), "uniform", (2, 12)).pvalue > 1e-3


def test_student_and_target_are_asked_for_the_condition_alone():
    trainer, _, _ = guided_trainer(guidance_scale=5.0)
    trainer.method.grid = grid_of(trainer.family.schedule, 40, 4)
    calls, forward = [], trainer.family.forward

    def noting(network, x, time, condition):
        calls.append((network is trainer.roles.student.network, condition["label"].tolist()))
        return forward(network, x, time, condition)

    trainer.family.forward = noting
    trainer.method.student_losses(batch_of(dim=1, condition={"label": torch.zeros(8, dtype=torch.long)}))
    assert calls == [(True, [0] * 8), (False, [0] * 8)]


def check_null(trainer):
    if TSCD.needs(trainer.config).null_condition:
        trainer.family.null_condition(1)


@pytest.mark.parametrize("own", [{"guidance_scale": 2.0}, {"guidance_range": [1.0, 4.0]}])
def test_a_teacher_without_null_is_refused_where_it_would_be_guided(own):
    trainer = trainer_of(**own)
    with pytest.raises(UserError, match="cannot be guided"):
        check_null(trainer)
    check_null(trainer_of())


# -- config ------------------------------------------------------------------------------------------------------


def one_line(says, make, **changes):
    with pytest.raises(UserError, match=says) as error:
        make(**changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"points": 50, "segments": 8}, "grid = 50 is not a multiple of segments = 8"),
        ({"points": 4, "segments": 8}, "grid = 4 is not a multiple"),
        ({"guidance_range": [5.0, 2.0]}, r"guidance_range = \[5\.0, 2\.0\]"),
        ({"guidance_range": [-1.0, 2.0]}, "guidance_range"),
        ({"mse_weight": 0.0}, r"mse_weight and adversarial\.weight are both 0"),
        ({"target_decay": 1.0}, r"tscd\.target_decay"),
        ({"end": "middle"}, r"tscd\.end = 'middle'"),
        ({"teacher": "ema"}, r"tscd\.teacher = 'ema'"),
        ({"segments": 4, "sampler": {"transition": "renoise"}}, r"sampler\.transition = renoise.*segments = 4"),
        ({"segments": 2, "sampler": {"transition": "tcd"}}, r"sampler\.transition = tcd"),
        ({"segments": 4, "sampler": {"steps": 2}}, r"sampler\.steps = 2: .*4 segments"),
        ({"segments": 4, "sampler": {"steps": 1}}, r"sampler\.steps = 1"),
        ({"segments": 4, "sampler": {"steps": 16}}, r"sampler\.steps = 16"),
        ({"points": 20, "segments": 4, "sampler": {"steps": 8}}, r"sampler\.steps = 8"),
        ({"points": 24, "segments": 8}, r"sampler\.steps = 8: .*grid = 24.*schedule's levels"),
        ({"segments": 4, "sampler": {"steps": 4, "also_steps": [2]}}, r"sampler\.also_steps = 2"),
        ({"points": 40, "sampler": {"steps": 3}}, r"sampler\.steps = 3"),
    ],
)
def test_settings_that_do_not_go_together(changes, says):
    with pytest.raises(UserError) as error:
        trainer_of(**changes)
    assert re.search(says, str(error.value))
    assert "\n" not in str(error.value)


def test_data_and_weights_that_do_not_do():
    settings = {"method": "tscd", "sampler": {"transition": "ode"}}
    one_line(r"set data\.images", toy_trainer, **settings)
    images = {"data": {"images": {"folder": "unused"}}}
    one_line(r"roles\.weights = mixed", toy_trainer, **settings, **images, roles={"weights": "mixed"})
    assert TSCD.needs(toy_trainer(**settings, **images).config).images


@pytest.mark.parametrize(
    ("segments", "points", "sampler"),
    [
        (4, 40, {"steps": 8}),
        (4, 40, {"steps": 40}),
        (1, 40, {"steps": 4, "transition": "renoise"}),
        (1, 40, {"steps": 8, "transition": "tcd"}),
        (8, 40, {"start": 799}),
        (8, 40, {"init_sigma": 5.09}),  # timestep 799
    ],
)
def test_samplers_on_the_grid_with_every_edge_are_taken(segments, points, sampler):
    trainer = trainer_of(toy_family(schedule=linear_betas()), segments, points, sampler=sampler)
    assert trainer.method.grid.time[-1] == trainer.sampler.times[0]
    assert set(trainer.sampler.times) <= set(trainer.method.grid.time.tolist())


@pytest.mark.parametrize("name", ["flow", "flow_shift", "edm"])
@pytest.mark.parametrize(("segments", "points"), [(8, 40), (8, 24), (8, 48), (4, 20), (2, 50)])
def test_a_grid_that_the_segments_divide_is_taken_on_schedules_without_timesteps(segments, points, name):
    """Their levels are real numbers: a point of both grids must not be refused for the last bit of its float."""
    schedule = {"flow": FlowSchedule(), "flow_shift": FlowSchedule(3.0), "edm": EDMSchedule()}[name]
    family = toy_family(schedule=schedule, kind="x0" if name == "edm" else "v")
    trainer = trainer_of(family, segments, points)
    assert trainer.sampler.times == pytest.approx(
        trainer.method.grid.time[trainer.method.grid.edges[1:]].flip(0).tolist()
    )


def test_the_method_is_registered_as_itself():
    assert type(trainer_of().method) is TSCD


# -- going on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["full", "shared"])
def test_two_and_two_updates_are_four_bit_for_bit(weights):
    settings = {
        "target_decay": 0.9,
        "teacher": "previous_stage",
        "end": "random",
        "guidance_range": [1.0, 4.0],
        "adversarial": {"weight": 0.1},
        "offset_noise": 0.05,
    }

    def fit(trainer, updates):
        while trainer.counters["student"] < updates:
            trainer.iteration()
        return trainer

    whole, first, second = (unets(weights, **settings) for _ in range(3))
    for trainer in (whole, first):  # a student that began elsewhere
        shake(trainer.roles.student)
        shake(trainer.method.solver, seed=2)
    fit(whole, 4)
    tensors, meta = state_of(fit(first, 2))
    assert {"student", "consistency_target", "previous_stage", "discriminator"} <= tensors.keys()
    second.restore(tensors, meta, "here")
    fit(second, 4)
    a, b = state_of(whole)[0], state_of(second)[0]
    assert a.keys() == b.keys()
    for group in a:
        assert_same(a[group], b[group])
    assert whole.counters == second.counters
    assert any(
        not torch.equal(a["consistency_target"][k], tensors["consistency_target"][k]) for k in a["consistency_target"]
    )
    assert_same(a["previous_stage"], tensors["previous_stage"])


def test_a_checkpoint_without_its_target_is_refused():
    trainer = trainer_of()
    tensors, meta = state_of(trainer)
    del tensors["consistency_target"]
    one_line("consistency_target is missing", trainer.restore, tensors=tensors, meta=meta, where="here")
    assert trainer_of(target_decay=0.0).state()[0].keys() == tensors.keys()


# -- end to end --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_four_stages_in_turn_reach_the_teachers_samples_in_fewer_and_fewer_steps():
    """8, 4, 2, 1 segments, each from the last: RMSE to the teacher's 40 DDIM steps from the same noise, and the energy
    distance of 4,000 samples to 4,000 of the mixture (the teacher's own: 0.0007)."""
    mixture = GaussianMixture([[-1.0, 0.3], [0.9, 0.6], [0.1, -1.0]], 0.03, weights=[0.4, 0.3, 0.3])
    family = toy_family(mixture, zero_snr(), hidden=128)
    fit_to_teacher(family, mixture, 1000)
    real = real_source(family, mixture.sample(4000, torch.Generator().manual_seed(3)).float().reshape(-1, 2, 1, 1))
    noise = torch.randn(4000, 2, 1, 1, generator=torch.Generator().manual_seed(5))  # that of students_samples
    times = few_step_times(family.schedule, 40)
    expected = ode_sample(lambda x, t: family.teacher(x, t, {}).x0, family.schedule, times, noise).flatten(1).double()
    truth = mixture.sample(4000, torch.Generator().manual_seed(1))
    assert energy_distance(expected, truth) < 0.002
    last, result = family.network.state_dict(), {}
    for segments in (8, 4, 2, 1):
        family.network.load_state_dict(last)  # a stage's student starts as the last stage's
        trainer = trainer_of(
            family,
            segments,
            real=real,
            target_decay=0.5,
            train={"updates": 300, "batch_size": 128, "ema_decay": 0.98, "log_every": 1000},
            student={"lr": 2e-3, "warmup": 20, "decay": 300},
        )
        before = students_samples(trainer)
        trainer.fit()
        after = students_samples(trainer)
        with trainer.exported():
            last = {k: v.clone() for k, v in trainer.roles.student.state_dict().items()}
        rmse = [(x - expected).square().mean().sqrt().item() for x in (before, after)]
        result[segments] = (*rmse, energy_distance(before, truth), energy_distance(after, truth))
    bounds = {8: (0.18, 0.015), 4: (0.18, 0.015), 2: (0.22, 0.025), 1: (0.3, 0.045)}
    for segments, (rmse, distance) in bounds.items():
        before, after, far, near = result[segments]
        assert after < rmse, result
        assert near < distance, result
        assert after < before, result
        assert near < far, result
    assert result[1][0] > 0.4, result
