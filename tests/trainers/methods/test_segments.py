"""The segmented grid: its edges, moves along a prediction, and the closed forms of a Gaussian's trajectory."""

from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from segmented import exact_gain, grid_of, multiplier, scale, spread, tall
from tiny import SD_BETAS
from toys import linear_betas

from stepdistill.analytic import GaussianMixture
from stepdistill.denoiser import Prediction
from stepdistill.errors import UserError
from stepdistill.families.schedulers import student_scheduler
from stepdistill.sampler import FewStepSampler, few_step_times
from stepdistill.schedule import EDMSchedule, FlowSchedule, VPSchedule
from stepdistill.trainers.methods.segments import SegmentGrid, edges

F64 = torch.float64
MEAN = 0.7
SCHEDULES = {
    "vp": linear_betas,
    "flow": FlowSchedule,
    "flow_shift": lambda: FlowSchedule(3.0),
    "edm": EDMSchedule,
}


def pairs(points: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Every u in 1..N with every lower point of the grid."""
    both = torch.tensor([(u, e) for u in range(1, points + 1) for e in range(u)])
    return both[:, 0], both[:, 1]


# -- edges -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("points", "segments", "expected"),
    [
        (40, 8, [0, 5, 10, 15, 20, 25, 30, 35]),
        (50, 8, [0, 6, 12, 18, 25, 31, 37, 43]),
        (50, 4, [0, 12, 25, 37]),
        (50, 2, [0, 25]),
        (50, 1, [0]),
    ],
)
def test_edges_of_the_sheet(points, segments, expected):
    assert edges(points, segments) == [*expected, points]


@pytest.mark.parametrize("points", [8, 40, 50, 59, 1000])
def test_edges_increase_and_half_as_many_segments_keep_a_subset(points):
    for segments in range(1, min(points, 64) + 1):
        result = edges(points, segments)
        assert (result[0], result[-1], len(result)) == (0, points, segments + 1)
        assert all(a < b for a, b in pairwise(result))
        if segments % 2 == 0:
            assert set(edges(points, segments // 2)) < set(result)


@pytest.mark.parametrize(("points", "segments"), [(4, 5), (4, 0)])
def test_as_many_segments_as_points_at_most_and_one_at_least(points, segments):
    with pytest.raises(ValueError, match="segments"):
        edges(points, segments)


@pytest.mark.parametrize("points", [8, 40, 50])
@pytest.mark.parametrize("segments", [1, 2, 3, 4, 8])
def test_segments_are_half_open_and_hold_every_point_once(points, segments):
    """A point on an edge belongs to the segment below it: floor(u/L) L would start there and leave it no step."""
    grid = grid_of(linear_betas(), points, segments)
    u = torch.arange(1, points + 1)
    start, end = grid.start(u), grid.end(u)
    assert (start <= u - 1).all()
    assert (u <= end).all()
    expected = [(low, high) for low, high in pairwise(edges(points, segments)) for _ in range(high - low)]
    assert list(zip(start.tolist(), end.tolist(), strict=True)) == expected


def test_every_edge_of_the_papers_rule_is_an_empty_segment_and_none_of_ours():
    grid = grid_of(linear_betas(), 40, 8)
    u = torch.tensor(edges(40, 8)[1:])
    assert (u // 5 * 5 == u).all()
    assert (u - grid.start(u) == 5).all()
    assert torch.equal(grid.end(u), u)


# -- the same times in training and in the exported student ------------------------------------------------------


@pytest.mark.parametrize("segments", [1, 2, 4, 8])
def test_edges_are_the_exported_students_timesteps(segments):
    """Phased consistency's own {239, 499, 739} and the stock 50-step TCD's {759, 499, 259} are others (k = 4)."""
    schedule = linear_betas()
    grid = grid_of(schedule, 40, segments)
    times = grid.time[torch.tensor(edges(40, segments)[1:])].flip(0).tolist()
    assert times == list(few_step_times(schedule, segments))
    family = SimpleNamespace(kind="eps", passes_eta=True, scheduler=DDIMScheduler(**SD_BETAS))
    for transition in ("renoise", "ode", "tcd"):
        stock = student_scheduler(family, FewStepSampler(schedule, tuple(times), transition))
        assert "original_inference_steps" not in stock.config or stock.config.original_inference_steps == segments
        stock.set_timesteps(segments)
        assert stock.timesteps.tolist() == times, type(stock).__name__
    if segments == 4:
        assert times == [999, 749, 499, 249]


@pytest.mark.parametrize("segments", [1, 2, 4, 8])
@pytest.mark.parametrize("name", SCHEDULES)
def test_edges_are_the_few_step_times_on_every_schedule(name, segments):
    schedule = SCHEDULES[name]()
    grid = grid_of(schedule, 40, segments)
    assert torch.equal(grid.edges, torch.tensor(edges(40, segments)))
    result = grid.time[grid.edges[1:]].flip(0)
    torch.testing.assert_close(result.to(F64), torch.tensor(few_step_times(schedule, segments), dtype=F64))
    assert (grid.time[1:] > grid.time[:-1]).all()
    assert (grid.sigma[1:] > grid.sigma[:-1]).all()
    assert grid.alpha.dtype == grid.sigma.dtype == F64
    alpha, sigma = schedule.alpha_sigma(grid.time[1:])
    assert torch.equal(grid.alpha[1:], alpha)
    assert torch.equal(grid.sigma[1:], sigma)


def test_the_lowest_point_is_the_clean_sample_but_timestep_0_for_tcd():
    schedule = linear_betas()
    for transition in ("renoise", "ode"):
        grid = grid_of(schedule, transition=transition)
        assert (grid.alpha[0].item(), grid.sigma[0].item()) == (1.0, 0.0)
    grid = grid_of(schedule, transition="tcd")
    assert (grid.alpha[0].item(), grid.sigma[0].item()) == pytest.approx((0.99957, 0.02915), abs=1e-5)
    assert grid.points == 40


# -- moves -------------------------------------------------------------------------------------------------------


def predictions(schedule, x0, x_t, t) -> dict[str, Prediction]:
    """One prediction as each kind of head would say it."""
    output = {kind: schedule.from_x0(x0, kind, x_t, t) for kind in ("x0", "eps", "v", "flow")}
    return {kind: Prediction(schedule, x_t, t, prediction, kind) for kind, prediction in output.items()}


def at_random(schedule, grid, u, seed=0):
    """Samples at u with arbitrary predictions of x0, not those of any model."""
    generator = torch.Generator().manual_seed(seed)
    x_t, x0 = torch.randn(2, len(u), 2, 1, 1, dtype=F64, generator=generator)
    return x_t, predictions(schedule, x0, x_t, grid.time[u])


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_move_to_where_one_is_is_none(name):
    schedule = SCHEDULES[name]()
    grid = grid_of(schedule)
    u = torch.arange(1, 41)
    x_u, prediction = at_random(schedule, grid, u)
    for kind, settings in prediction.items():
        torch.testing.assert_close(grid.add_noise(settings.x0, settings.eps, u), x_u, rtol=1e-9, atol=1e-9, msg=kind)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_kind_of_head_moves_alike_and_as_the_schedules_step(name):
    schedule = SCHEDULES[name]()
    grid = grid_of(schedule)
    u, end = pairs(40)
    x_u, prediction = at_random(schedule, grid, u)
    moved = {kind: grid.add_noise(settings.x0, settings.eps, end) for kind, settings in prediction.items()}
    for kind in ("eps", "v", "flow"):
        torch.testing.assert_close(moved[kind], moved["x0"], rtol=1e-8, atol=1e-8, msg=kind)
    inner = end > 0
    step = schedule.step(prediction["x0"].x0[inner], x_u[inner], grid.time[u[inner]], grid.time[end[inner]])
    torch.testing.assert_close(moved["x0"][inner], step, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moved["x0"][~inner], prediction["x0"].x0[~inner])
    # the printed form: (sigma_s / sigma_t) x_t + (alpha_s - alpha_t sigma_s / sigma_t) x0
    ratio = scale(grid.sigma[end] / grid.sigma[u])
    printed = ratio * x_u + (scale(grid.alpha[end]) - scale(grid.alpha[u]) * ratio) * prediction["x0"].x0
    torch.testing.assert_close(moved["x0"], printed, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("transition", ["ode", "tcd"])
def test_moves_along_one_prediction_do_not_depend_on_the_path(transition):
    schedule = linear_betas()
    grid = grid_of(schedule, transition=transition)
    high, low = pairs(40)
    between = (high + low + 1) // 2
    _, prediction = at_random(schedule, grid, high)
    x0, eps = prediction["x0"].x0, prediction["x0"].eps
    middle = grid.add_noise(x0, eps, between)
    again = Prediction(schedule, middle, grid.time[between], x0, "x0")
    torch.testing.assert_close(again.eps, eps, rtol=1e-9, atol=1e-9)
    direct = grid.add_noise(x0, eps, low)
    torch.testing.assert_close(grid.add_noise(again.x0, again.eps, low), direct, rtol=1e-9, atol=1e-9)
    # with another prediction on the way it does
    other = Prediction(schedule, middle, grid.time[between], x0 + 0.1, "x0")
    parted = (grid.add_noise(other.x0, other.eps, low) - direct).flatten(1).abs().amax(1)
    assert (parted[low < between] > 1e-6).all()


def test_flow_moves_are_euler_steps_along_the_velocity():
    schedule = FlowSchedule()
    grid = grid_of(schedule)
    u, end = pairs(40)
    x_u, prediction = at_random(schedule, grid, u)
    settings = prediction["flow"]
    euler = x_u + scale(grid.time[end] - grid.time[u]) * settings.output
    torch.testing.assert_close(grid.add_noise(settings.x0, settings.eps, end), euler, rtol=1e-12, atol=1e-12)


def solver_of_the_lcm_scripts(alphas_cumprod: np.ndarray, x0: np.ndarray, eps: np.ndarray, index: int) -> np.ndarray:
    """diffusers' ``examples/consistency_distillation``: ``DDIMSolver(..., 1000, 50).ddim_step``, for one index."""
    timesteps = (np.arange(1, 51) * 20).round().astype(np.int64) - 1
    previous = np.asarray([alphas_cumprod[0], *alphas_cumprod[timesteps[:-1]].tolist()])
    return np.sqrt(previous[index]) * x0 + np.sqrt(1 - previous[index]) * eps


def test_a_move_of_one_point_is_that_of_the_lcm_scripts_solver():
    schedule = linear_betas()
    grid = grid_of(schedule, 50, transition="tcd")  # their index 0 goes to timestep 0
    assert grid.time[1:].tolist() == list(range(19, 1000, 20))
    x0, eps = torch.randn(2, 50, 3, 1, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    moved, table = grid.add_noise(x0, eps, torch.arange(50)).numpy(), schedule.alphas_cumprod.numpy()
    for index in range(50):
        theirs = solver_of_the_lcm_scripts(table, x0[index].numpy(), eps[index].numpy(), index)
        np.testing.assert_allclose(moved[index], theirs, rtol=1e-13, atol=1e-13)
    clean = grid_of(schedule, 50).add_noise(x0, eps, torch.arange(50))  # ours goes to the clean sample, and there alone
    assert torch.equal(clean[0], x0[0])
    assert abs(moved[0] - x0[0].numpy()).max() > 1e-3
    np.testing.assert_array_equal(clean[1:].numpy(), moved[1:])


@pytest.mark.parametrize("kind", [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")])
@pytest.mark.parametrize(("transition", "to_one"), [("ode", True), ("tcd", False)])
@pytest.mark.parametrize("points", [40, 50])
def test_a_move_of_one_point_is_the_stock_ddim_step(points, transition, to_one, kind):
    ours, theirs = kind
    stock = DDIMScheduler(
        **SD_BETAS, clip_sample=False, set_alpha_to_one=to_one, prediction_type=theirs, timestep_spacing="trailing"
    )
    stock.alphas_cumprod = stock.alphas_cumprod.double()
    stock.final_alpha_cumprod = torch.ones((), dtype=F64) if to_one else stock.alphas_cumprod[0]
    stock.set_timesteps(points)
    schedule = VPSchedule(stock.alphas_cumprod)
    grid = grid_of(schedule, points, transition=transition)
    assert stock.timesteps.flip(0).tolist() == grid.time[1:].tolist()
    u = torch.arange(1, points + 1)
    x_u, prediction = at_random(schedule, grid, u)
    moved = grid.add_noise(prediction[ours].x0, prediction[ours].eps, u - 1)
    for i in range(points):
        step = stock.step(prediction[ours].output[i], int(grid.time[i + 1]), x_u[i]).prev_sample
        torch.testing.assert_close(moved[i], step, rtol=1e-9, atol=1e-9)


# -- fresh noise -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("c", [0.3, 1.0, 2.0])
def test_fresh_noise_gives_the_forward_marginal_of_the_higher_point(name, c):
    """Of N(0, c^2) at ``low``: variance alpha^2 c^2 + sigma^2 at ``high``, and alpha_high times the mean."""
    grid = grid_of(SCHEDULES[name]())
    high, low = pairs(40)
    one, none = tall(1).expand(len(high), 1, 1, 1), tall(0).expand(len(high), 1, 1, 1)
    signal, fresh = grid.renoised(one, low, high, none).flatten(), grid.renoised(none, low, high, one).flatten()
    variance = signal**2 * (grid.alpha[low] ** 2 * c**2 + grid.sigma[low] ** 2) + fresh**2
    torch.testing.assert_close(variance, grid.alpha[high] ** 2 * c**2 + grid.sigma[high] ** 2)
    torch.testing.assert_close(signal * grid.alpha[low], grid.alpha[high])
    assert (fresh > 0).all()
    same = grid.renoised(one, high, high, one)
    torch.testing.assert_close(same, one)


# -- Gaussians ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("c", [0.3, 1.0, 2.0])
def test_the_exact_jump_of_a_gaussian(name, c):
    schedule = SCHEDULES[name]()
    grid = grid_of(schedule)
    u, end = pairs(40)
    x_u = torch.linspace(-3, 3, len(u), dtype=F64).reshape(-1, 1, 1, 1)
    off = x_u - scale(grid.alpha[u]) * MEAN
    gain = exact_gain(grid.alpha[u], grid.sigma[u], grid.alpha[end], grid.sigma[end], c)
    settings = Prediction(schedule, x_u, grid.time[u], MEAN + scale(gain) * off, "x0")
    r = spread(grid, c)
    exact = scale(grid.alpha[end]) * MEAN + scale(r[end] / r[u]) * off
    torch.testing.assert_close(grid.add_noise(settings.x0, settings.eps, end), exact, rtol=1e-9, atol=1e-9)
    clean = end == 0  # the consistency function
    torch.testing.assert_close(gain[clean], c / r[u][clean])


def test_the_exact_gains_of_the_sheet():
    schedule = linear_betas()
    alpha, sigma = schedule.alpha_sigma(torch.tensor([0, 249, 499, 749, 998, 999]))
    result = exact_gain(alpha[-1], sigma[-1], alpha[:-1], sigma[:-1], 1.0)
    assert result.tolist() == pytest.approx([0.973, 0.548, 0.316, 0.154, 0.068], abs=6e-4)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_exact_gain_of_a_short_jump_is_the_posterior_means(name):
    """First order: the gap to the analytic denoiser's gain shrinks with the jump."""
    schedule, c = SCHEDULES[name](), 0.8
    t = few_step_times(schedule, 8)[3]
    time = torch.tensor([t, t]) if name != "vp" else torch.tensor([int(t)] * 2)
    prediction = GaussianMixture([[MEAN]], c**2).denoiser(schedule)(tall(0, 1), time, {}).x0.flatten()
    gaps = []
    for part in (0.08, 0.04, 0.02):
        (alpha_t, alpha_s), (sigma_t, sigma_s) = schedule.alpha_sigma(
            torch.tensor([t, t * (1 - part)], dtype=F64).round() if name == "vp" else torch.tensor([t, t * (1 - part)])
        )
        gaps.append((exact_gain(alpha_t, sigma_t, alpha_s, sigma_s, c) - (prediction[1] - prediction[0])).abs().item())
    assert gaps[0] > 1e-4
    assert gaps[1] / gaps[0] == pytest.approx(0.5, abs=0.1)
    assert gaps[2] / gaps[1] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("c", [0.3, 1.0, 2.0])
def test_the_teachers_step_multiplies_a_gaussian_by_s(name, c):
    schedule = SCHEDULES[name]()
    grid = grid_of(schedule)
    u = torch.arange(1, 41)
    x_u = torch.linspace(-3, 3, 40, dtype=F64).reshape(-1, 1, 1, 1)
    settings = GaussianMixture([[MEAN]], c**2).denoiser(schedule)(x_u, grid.time[u], {})
    off = x_u - scale(grid.alpha[u]) * MEAN
    expected = scale(grid.alpha[u - 1]) * MEAN + scale(multiplier(grid, c)) * off
    torch.testing.assert_close(grid.add_noise(settings.x0, settings.eps, u - 1), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["vp", "flow"])
@pytest.mark.parametrize("c", [0.3, 2.0])
def test_many_steps_of_the_teacher_are_the_exact_jump(name, c):
    """First order in the number of steps; the whole way, from noise to the clean sample."""
    schedule = SCHEDULES[name]()
    gaps = []
    for points in (250, 500, 1000):
        grid = grid_of(schedule, points)
        r = spread(grid, c)
        gaps.append((multiplier(grid, c).prod() - r[0] / r[-1]).abs().item() / c)
    assert gaps[2] < 0.01
    assert gaps[2] < gaps[1] < gaps[0]
    assert gaps[1] / gaps[0] == pytest.approx(0.5, abs=0.15)


def test_the_teacher_of_the_sheet_in_fifty_steps():
    """Std 0.9729 for data of std 1, 0.2764 for 0.3 and 1.944 for 2: what a student can reach at best."""
    schedule = linear_betas()
    grid = grid_of(schedule, 50, transition="tcd")
    result = [multiplier(grid, c).prod().item() for c in (1.0, 0.3, 2.0)]
    assert result == pytest.approx([0.9729, 0.2764, 1.944], abs=5e-4)


# -- where the lowest segment ends ---------------------------------------------------------------------------------


def test_the_grid_ends_where_its_sampler_ends():
    """Clean, or with ``final: timestep_0`` at the schedule's first alpha, as PCM's lowest phase does."""
    schedule = linear_betas()
    times = few_step_times(schedule, 40)
    clean, lowest = (
        SegmentGrid.of(FewStepSampler(schedule, times, "ode", final=final), 4) for final in ("clean", "timestep_0")
    )
    assert (clean.alpha[0], clean.sigma[0]) == (1, 0)
    assert lowest.alpha[0] == pytest.approx(0.99915**0.5, abs=1e-8)
    assert lowest.sigma[0] == pytest.approx(0.00085**0.5, abs=1e-8)
    assert torch.equal(clean.alpha[1:], lowest.alpha[1:])
    assert torch.equal(clean.edges, lowest.edges)


@pytest.mark.parametrize("steps", [1, 4])
def test_a_sampler_that_ends_at_timestep_0_is_ddim_without_alpha_to_one(steps):
    """Our last move, stock DDIM's and the exported scheduler's."""
    schedule = linear_betas()
    student = GaussianMixture([[-1.0, 0.3], [0.9, 0.6]], 0.05).denoiser(schedule)
    sampler = FewStepSampler(schedule, few_step_times(schedule, steps), "ode", final="timestep_0")
    noise = torch.randn(6, 2, 1, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    ours = sampler.sample(student, noise, {}, lambda like: pytest.fail("it drew noise"))
    family = SimpleNamespace(scheduler=DDIMScheduler(**SD_BETAS), kind="eps", passes_eta=True)
    exported = student_scheduler(family, sampler)
    assert exported.config.set_alpha_to_one is False
    stock = DDIMScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing")
    for scheduler in (exported, stock):
        scheduler.set_timesteps(steps)
        x = noise
        for t in scheduler.timesteps:
            x = scheduler.step(student(x, t.expand(6), {}).eps, t, x).prev_sample
        torch.testing.assert_close(x, ours, rtol=1e-5, atol=1e-5)
    clean = FewStepSampler(schedule, sampler.times, "ode").sample(student, noise, {}, None)
    assert (clean - ours).abs().max() > 1e-3


@pytest.mark.parametrize(("schedule", "transition"), [(FlowSchedule, "ode"), (linear_betas, "renoise")])
def test_only_an_ode_student_of_a_vp_teacher_ends_at_timestep_0(schedule, transition):
    with pytest.raises(UserError, match=r"sampler\.final = timestep_0"):
        FewStepSampler(schedule(), (0.5,), transition, final="timestep_0")
