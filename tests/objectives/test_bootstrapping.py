"""BOOT's arithmetic, float64: the signal's weight, one step of it against DDIM, whole walks against closed forms.

The data are N(mu, c^2), r_t^2 = alpha_t^2 c^2 + sigma_t^2; the teacher and its probability flow are known:

    f(x, t) = mu + alpha_t c^2 / r_t^2 (x - alpha_t mu),    x_s = alpha_s mu + r_s / r_t (x_t - alpha_t mu).
"""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from toys import linear_betas, zero_snr

from stepdistill.analytic import GaussianMixture
from stepdistill.objectives.bootstrapping import bootstrap_loss, signal_target
from stepdistill.schedule import EDMSchedule, FlowSchedule, VPSchedule, from_scheduler

F64 = torch.float64
SCHEDULES = {
    "vp": linear_betas(),
    "zero_snr": zero_snr(),
    "flow": FlowSchedule(),
    "shifted_flow": FlowSchedule(shift=3.0),
    "edm": EDMSchedule(),
}


def linear_vp(levels, low=None):
    """VP with beta from 0.1 to 20, at ``levels`` times from ``low`` (by default 1 / levels) to 1."""
    u = torch.linspace(low or 1 / levels, 1, levels, dtype=F64)
    return VPSchedule(torch.exp(-(0.1 * u + 9.95 * u**2)))


def at(schedule, level, count=1):
    return schedule.level(torch.full((count,), level))


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def gaussian(schedule, c, mu=0.0):
    return GaussianMixture([[mu]], c**2).denoiser(schedule)


# -- the weight --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEDULES)
def test_weight_is_one_minus_the_exponential_of_the_ratios(name):
    schedule = SCHEDULES[name]
    s, t = schedule.level(torch.tensor([1, 20, 400, 948, 997])), schedule.level(torch.tensor([51, 70, 450, 998, 998]))
    (alpha_s, sigma_s), (alpha_t, sigma_t) = schedule.alpha_sigma(s), schedule.alpha_sigma(t)
    lam_s, lam_t = -(alpha_s / sigma_s).log(), -(alpha_t / sigma_t).log()
    weight = schedule.signal_weight(t, s)
    assert weight.dtype == F64
    torch.testing.assert_close(weight, 1 - torch.exp(lam_s - lam_t), rtol=1e-12, atol=1e-12)
    assert ((weight > 0) & (weight < 1)).all()
    assert schedule.signal_weight(t, t).abs().max() < 1e-15


@pytest.mark.parametrize("name", SCHEDULES)
def test_weights_compose(name):
    schedule = SCHEDULES[name]
    for levels in ([999, 998, 1], [998, 600, 3], [500, 450, 400], [51, 26, 1]):
        t, s, u = (at(schedule, level) for level in levels)
        whole = 1 - schedule.signal_weight(t, u)
        parts = (1 - schedule.signal_weight(t, s)) * (1 - schedule.signal_weight(s, u))
        torch.testing.assert_close(whole, parts, rtol=1e-12, atol=1e-14)


def test_weight_at_the_ends():
    for schedule in (SCHEDULES["zero_snr"], SCHEDULES["flow"], SCHEDULES["shifted_flow"]):
        assert schedule.alpha_sigma(at(schedule, 999))[0] == 0
        assert schedule.signal_weight(at(schedule, 999), at(schedule, 998)) == 1  # where the signal is f(eps, T) itself
    for schedule, t in ((FlowSchedule(), 0.7), (EDMSchedule(), 0.7)):
        for sigma in (1e-3, 1e-6, 1e-9):
            rest = 1 - schedule.signal_weight(torch.tensor([t]), torch.tensor([sigma], dtype=F64))
            assert 0 < rest < 2 * sigma
        assert schedule.signal_weight(torch.tensor([t]), torch.tensor([0.0])) == 1


def test_weight_in_closed_form_on_flow_and_edm():
    t, s = torch.tensor([1.0, 0.9, 0.5, 0.06], dtype=F64), torch.tensor([0.95, 0.3, 0.45, 0.01], dtype=F64)
    torch.testing.assert_close(FlowSchedule().signal_weight(t, s), (t - s) / (t * (1 - s)))
    torch.testing.assert_close(EDMSchedule().signal_weight(t, s), 1 - s / t)


def test_weight_tends_to_the_papers_euler_form():
    """delta lambda'_t / w - 1 is of order delta; lambda' = beta / (2 sigma^2) on VP, 1 / (t (1 - t)) on flow."""
    levels = 200_000
    vp = linear_vp(levels)
    for u in (0.1, 0.5, 0.9):
        beta, sigma = 0.1 + 19.9 * u, vp.alpha_sigma(at(vp, int(u * levels) - 1))[1].item()
        off = {}
        for span in (2, 200):
            weight = vp.signal_weight(at(vp, int(u * levels) - 1), at(vp, int(u * levels) - 1 - span)).item()
            off[span] = abs(span / levels * beta / (2 * sigma**2) / weight - 1)
        assert off[2] < 1e-4
        assert off[200] / off[2] == pytest.approx(100, rel=0.05)
    for t in (0.1, 0.5, 0.9):
        off = {}
        for delta in (1e-5, 1e-3):
            weight = FlowSchedule().signal_weight(torch.tensor([t], dtype=F64), torch.tensor([t - delta], dtype=F64))
            off[delta] = abs(delta / (t * (1 - t)) / weight.item() - 1)
        assert off[1e-5] < 2e-4
        assert off[1e-3] / off[1e-5] == pytest.approx(100, rel=0.05)
    # on a coarse step near t = 0 the Euler form overshoots: its factor is above 1, w's never
    assert 0.05 / (0.06 * 0.94) / FlowSchedule().signal_weight(torch.tensor([0.06]), torch.tensor([0.01])).item() > 1.03
    assert 0.05 / (0.96 * 0.04) > 1


# -- one step ----------------------------------------------------------------------------------------------------

TEACHERS = [("vp", "eps"), ("vp", "v"), ("vp", "x0"), ("zero_snr", "v"), ("flow", "flow"), ("shifted_flow", "flow")]


@pytest.mark.parametrize(("name", "kind"), [*TEACHERS, ("edm", "edm")])
@pytest.mark.parametrize("levels", [(51, 1), (400, 350), (999, 949)])
def test_step_of_the_signal_is_ddims(name, kind, levels):
    schedule = SCHEDULES[name]
    t, s = (at(schedule, level, 5) for level in levels)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = ([c[0].item() for c in schedule.alpha_sigma(time)] for time in (t, s))
    y_t, eps, output = randn(3, 5, 3, 2)
    x_t = alpha_t * y_t + sigma_t * eps
    x0 = schedule.to_x0(output, kind, x_t, t)
    y_s = signal_target(y_t, x0, schedule.signal_weight(t, s))
    expected = alpha_s * x0 + sigma_s * (x_t - alpha_t * x0) / sigma_t
    torch.testing.assert_close(alpha_s * y_s + sigma_s * eps, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(schedule.step(x0, x_t, t, s), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(schedule.to_signal(expected, eps, s), y_s, rtol=1e-7, atol=1e-7)
    if alpha_t > 0:
        torch.testing.assert_close(schedule.to_signal(x_t, eps, t), y_t, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_target_is_the_same_for_every_kind_of_teacher(name):
    schedule = SCHEDULES[name]
    t, s = at(schedule, 700, 5), at(schedule, 650, 5)
    y_t, eps, x0 = randn(3, 5, 3, 2)
    x_t, weight = schedule.add_noise(y_t, eps, t), schedule.signal_weight(t, s)
    expected = y_t + weight[0] * (x0 - y_t)
    for kind in ("eps", "v", "x0", "flow"):
        prediction = schedule.to_x0(schedule.from_x0(x0, kind, x_t, t), kind, x_t, t)
        torch.testing.assert_close(signal_target(y_t, prediction, weight), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("stated", "zero"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)])
@pytest.mark.parametrize("t", [999, 500, 51])
def test_step_of_the_signal_is_the_stock_ddim_schedulers(stated, zero, t):
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type=stated,
        rescale_betas_zero_snr=zero,
        clip_sample=False,
    )
    scheduler.set_timesteps(20)
    schedule, kind = from_scheduler(scheduler)
    y_t, eps, output = randn(3, 5, 3, 2, seed=t)
    times = torch.full((5,), t)
    x_t = schedule.add_noise(y_t, eps, times)
    stock = scheduler.step(output, t, x_t, eta=0.0).prev_sample
    weight = schedule.signal_weight(times, times - 50)
    y_s = signal_target(y_t, schedule.to_x0(output, kind, x_t, times), weight)
    torch.testing.assert_close(schedule.add_noise(y_s, eps, times - 50), stock, rtol=2e-6, atol=2e-6)
    off = signal_target(y_t, schedule.to_x0(output, kind, x_t, times), weight * 1.01)
    assert (schedule.add_noise(off, eps, times - 50) - stock).abs().max() > 1e-4


@pytest.mark.parametrize("index", [0, 7, 18])
def test_step_of_the_signal_is_the_stock_flow_schedulers(index):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(20)
    schedule, kind = from_scheduler(scheduler)
    y_t, eps, output = randn(3, 5, 3, 2, seed=index)
    t, s = (scheduler.sigmas[i].double().expand(5) for i in (index, index + 1))
    x_t = schedule.add_noise(y_t, eps, t)
    y_s = signal_target(y_t, schedule.to_x0(output, kind, x_t, t), schedule.signal_weight(t, s))
    stock = scheduler.step(output, scheduler.timesteps[index], x_t).prev_sample
    torch.testing.assert_close(schedule.add_noise(y_s, eps, s), stock, rtol=1e-6, atol=1e-6)


def test_trapezoid_step_is_heuns_on_flow_and_on_edm():
    x_t, at_t, at_s, x_s = randn(4, 5, 3, 2)
    for schedule, t, s in ((FlowSchedule(), 0.7, 0.4), (EDMSchedule(), 3.0, 1.0)):
        times = [torch.full((5,), time, dtype=F64) for time in (t, s)]
        if isinstance(schedule, FlowSchedule):  # v = (x - x0) / t in both: its velocity, and EDM's dx/dsigma
            v_t, v_s = (schedule.from_x0(a, "flow", x, u) for a, x, u in ((at_t, x_t, times[0]), (at_s, x_s, times[1])))
        else:
            v_t, v_s = (x_t - at_t) / t, (x_s - at_s) / s
        expected = x_t + (s - t) * (v_t + v_s) / 2
        got = schedule.trapezoid_step(x_t, *times, at_t, at_s, x_s)
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_trapezoid_step_with_the_left_end_twice_is_the_first_order_step():
    schedule = SCHEDULES["vp"]
    t, s = at(schedule, 600, 5), at(schedule, 500, 5)
    x_t, x0 = randn(2, 5, 3, 2)
    x_s = schedule.step(x0, x_t, t, s)  # along which x0 and eps stay as they are
    torch.testing.assert_close(schedule.trapezoid_step(x_t, t, s, x0, x0, x_s), x_s, rtol=1e-10, atol=1e-10)


def test_loss_is_the_mean_over_the_squared_weight_with_its_floor():
    y_s, target = randn(2, 4, 3, 2)
    weight = torch.tensor([1.0, 0.5, 0.1, 0.001], dtype=F64)
    squares = (y_s - target).square().mean((1, 2))
    expected = (squares / torch.tensor([1.0, 0.25, 0.01, 0.0001], dtype=F64)).mean()
    torch.testing.assert_close(bootstrap_loss(y_s, target, weight, 1e-4), expected)
    torch.testing.assert_close(bootstrap_loss(y_s, target, weight, 1.0), squares.mean())


# -- whole walks -------------------------------------------------------------------------------------------------


def euler(schedule, f, y, eps, t, s):
    x0 = f(schedule.add_noise(y, eps, t), t, {}).x0
    return signal_target(y, x0, schedule.signal_weight(t, s))


def heun(schedule, f, y, eps, t, s):
    x_t = schedule.add_noise(y, eps, t)
    x0 = f(x_t, t, {}).x0
    x_s = schedule.step(x0, x_t, t, s)
    return schedule.to_signal(schedule.trapezoid_step(x_t, t, s, x0, f(x_s, s, {}).x0, x_s), eps, s)


def next_state(schedule, f, y, eps, t, s):
    """OFTSR's loss called boot: the teacher's next state x + (s - t) v where BOOT has the clean x - t v."""
    x_t = schedule.add_noise(y, eps, t)
    following = x_t + (s - t).reshape(-1, 1, 1, 1) * f(x_t, t, {}).flow
    return signal_target(y, following, schedule.signal_weight(t, s))


def flow_gain(step, c, steps, low=1e-3):
    """y at ``low`` for eps = 1 over a uniform grid from 1, and the ODE's: (sqrt((1 - t)^2 c^2 + t^2) - t) / (1 - t)."""
    schedule, eps = FlowSchedule(), torch.ones(1, 1, 1, 1, dtype=F64)
    f, grid = gaussian(schedule, c), torch.linspace(1, low, steps + 1, dtype=F64)
    y = f(eps, grid[:1], {}).x0
    for t, s in pairwise(grid):
        y = step(schedule, f, y, eps, t[None], s[None])
    return y.item(), (((1 - low) ** 2 * c**2 + low**2) ** 0.5 - low) / (1 - low)


@pytest.mark.parametrize(
    ("step", "c", "errors"),
    [
        (euler, 1.0, (-0.1209, -0.0316, -0.0080)),
        (heun, 1.0, (-6.6e-4, -1.0e-5, -1.4e-7)),
        (heun, 2.0, (-1.2e-2, -6.2e-4, -3.7e-5)),
    ],
)
def test_error_of_a_walk_on_flow_is_the_sheets(step, c, errors):
    for steps, error in zip((10, 40, 160), errors, strict=True):
        got, exact = flow_gain(step, c, steps)
        assert got - exact == pytest.approx(error, rel=0.05)


@pytest.mark.parametrize(("step", "order"), [(euler, 1), (heun, 2)])
@pytest.mark.parametrize("c", [0.3, 2.0])
def test_order_on_flow(step, order, c):
    coarse, fine = (flow_gain(step, c, steps) for steps in (160, 640))
    assert (coarse[0] - coarse[1]) / (fine[0] - fine[1]) == pytest.approx(4**order, rel=0.06)


def vp_gain(step, c, stride, schedule):
    """y at the lowest level for eps = 1 from y_T = f(eps, T), and the exact one from the same start."""
    eps, last = torch.ones(1, 1, 1, 1, dtype=F64), schedule.num_levels - 1
    f, levels = gaussian(schedule, c), range(last, -1, -stride)
    y = f(eps, at(schedule, last), {}).x0
    (alpha_T, sigma_T), (alpha, sigma) = ([v.item() for v in schedule.alpha_sigma(at(schedule, i))] for i in (last, 0))
    x_T = alpha_T * y.item() + sigma_T
    r_T, r = ((a**2 * c**2 + b**2) ** 0.5 for a, b in ((alpha_T, sigma_T), (alpha, sigma)))
    for high, low in pairwise(levels):
        y = step(schedule, f, y, eps, at(schedule, high), at(schedule, low))
    return y.item(), (r / r_T * x_T - sigma) / alpha


@pytest.mark.parametrize(("step", "order"), [(euler, 1), (heun, 2)])
def test_order_on_vp(step, order):
    schedule = linear_vp(961)
    errors = [got - exact for got, exact in (vp_gain(step, 2.0, stride, schedule) for stride in (12, 6, 3))]
    assert abs(errors[-1]) < (0.05 if order == 1 else 1e-3)
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.02)


def test_ddims_gains_on_vp_are_the_sheets():
    """c = 1, uniform steps down to 0.001: 0.9896 less an error of order 1."""
    for steps, gain in ((10, 0.822), (40, 0.945), (160, 0.978), (640, 0.9867)):
        got, exact = vp_gain(euler, 1.0, 1, linear_vp(steps + 1, 1e-3))
        assert got == pytest.approx(gain, abs=6e-4)
        assert exact == pytest.approx(0.9896, abs=6e-5)


def test_second_order_signal_next_to_the_noise_of_a_strongly_shifted_flow():
    """shift 12: alpha is 8.3e-5 one level below T; y is 0.5 there, and not 0.417."""
    schedule, c, mu, eps = FlowSchedule(shift=12.0), 2.0, 0.5, randn(4, 1, 1, 1)
    t, s = at(schedule, 999, 4), at(schedule, 998, 4)
    f = gaussian(schedule, c, mu)
    alpha, sigma = (v[0].item() for v in schedule.alpha_sigma(s))
    exact = mu + ((alpha**2 * c**2 + sigma**2) ** 0.5 - sigma) / alpha * eps
    y = f(eps, t, {}).x0
    torch.testing.assert_close(euler(schedule, f, y, eps, t, s), exact, rtol=0, atol=3e-3)
    torch.testing.assert_close(heun(schedule, f, y, eps, t, s), exact, rtol=0, atol=3e-3)


@pytest.mark.parametrize(
    ("c", "gain", "from_eps"), [(0.3, 0.27231, 0.27289), (1.0, 0.97359, 0.97126), (2.0, 1.98909, 1.95721)]
)
def test_walk_starts_where_the_boundary_says_and_not_at_the_noise(c, gain, from_eps):
    """Stable Diffusion's schedule ends at alpha = 0.068: x_T = alpha_T f(eps, T) + sigma_T eps is not eps."""
    got, exact = vp_gain(heun, c, 1, linear_betas())
    assert got == pytest.approx(exact, abs=1e-5)
    assert got == pytest.approx(gain, abs=2e-5)
    assert abs(got - from_eps) > 5e-4


def test_signal_at_the_start_is_the_teachers_x0_where_alpha_is_zero():
    """Along the exact path from x_T = eps, y_t - f(eps, T) = alpha_t c^2 eps / 2 + O(alpha_t^3)."""
    alphas = torch.tensor([1e-2, 1e-3, 1e-4, 0.0], dtype=F64)
    schedule, c, mu = VPSchedule(alphas**2), 2.0, 0.7
    eps = randn(4, 1, 1, 1)
    start = gaussian(schedule, c, mu)(eps, at(schedule, 3, 4), {}).x0
    torch.testing.assert_close(start, torch.full_like(start, mu))
    for level in range(3):
        alpha, sigma = (v[0].item() for v in schedule.alpha_sigma(at(schedule, level)))
        x_t = alpha * mu + (alpha**2 * c**2 + sigma**2) ** 0.5 * eps
        off = schedule.to_signal(x_t, eps, at(schedule, level, 4)) - start
        torch.testing.assert_close(off / alpha, c**2 / 2 * eps, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_teacher_that_says_one_thing_gives_an_exact_exponential(name):
    """y_s = a + exp(lambda_s - lambda_t) (y_t - a), on any grid and from any start."""
    schedule, a = SCHEDULES[name], 0.4
    y = start = randn(3, 2, 1, 1)
    levels = [998, 997, 800, 333, 300, 51, 2, 1]
    for high, low in pairwise(levels):
        y = signal_target(y, torch.full_like(y, a), schedule.signal_weight(at(schedule, high, 3), at(schedule, low, 3)))
    lam = [-(alpha / sigma).log() for alpha, sigma in (schedule.alpha_sigma(at(schedule, i)) for i in (998, 1))]
    torch.testing.assert_close(y - a, torch.exp(lam[1] - lam[0]) * (start - a), rtol=1e-9, atol=1e-13)


# -- OFTSR, the nearest public code ------------------------------------------------------------------------------


def test_velocity_form_is_oftsrs_and_ours():
    """Its data time is tau = 1 - t and its v points from noise to data: v_s = v_t + dt / tau_s (v_teacher - v_t)."""
    schedule, generator = FlowSchedule(), torch.Generator().manual_seed(0)
    f = GaussianMixture([[0.5, -1.0], [-1.0, 0.2]], 0.1).denoiser(schedule)
    t = torch.cat([torch.rand(7, dtype=F64, generator=generator), torch.ones(1, dtype=F64)])
    s = t * torch.rand(8, dtype=F64, generator=generator)
    V_t, eps = randn(2, 8, 2, 1, 1)
    x_t = eps - (1 - t).reshape(-1, 1, 1, 1) * V_t
    prediction = f(x_t, t, {})
    target = signal_target(eps - V_t, prediction.x0, schedule.signal_weight(t, s))
    coefficient = ((t - s) / (1 - s)).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(eps - target, V_t + coefficient * (prediction.flow - V_t), rtol=1e-9, atol=1e-9)
    # the third party's own variables
    tau, v_t = 1 - t, -V_t
    dt, tau_s = t - s, 1 - s
    v_teacher = -prediction.flow
    torch.testing.assert_close(x_t, eps + tau.reshape(-1, 1, 1, 1) * v_t)
    v_boot = v_t + (dt / tau_s).reshape(-1, 1, 1, 1) * (v_teacher - v_t)
    torch.testing.assert_close(-(eps - target), v_boot, rtol=1e-9, atol=1e-9)
    wrong = eps - next_state(schedule, f, eps - V_t, eps, t, s)
    assert (wrong + v_boot).abs().amax((1, 2, 3)).min() > 1e-2


@pytest.mark.parametrize(("c", "errors"), [(0.3, (0.43, 0.69)), (2.0, (-0.70, -0.97))])
def test_next_state_in_place_of_the_clean_prediction_does_not_converge(c, errors):
    for steps, error in zip((10, 160), errors, strict=True):
        got, exact = flow_gain(next_state, c, steps)
        assert exact == pytest.approx(c, abs=2e-3)
        assert got - exact == pytest.approx(error, abs=7e-3)
    # finer grids do not help: its limit is the noise itself, whatever the data
    assert flow_gain(next_state, c, 1280)[0] == pytest.approx(1.0, abs=0.03)
    assert abs(flow_gain(euler, c, 160)[0] - c) < 0.03
