"""Conversions, named epsilons, and the schedules read off diffusers' schedulers."""

import diffusers
import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
)
from toys import linear_betas, zero_snr

from stepdistill.errors import UserError
from stepdistill.schedule import (
    ALPHA_MIN,
    EDMSchedule,
    FlowSchedule,
    VPSchedule,
    from_scheduler,
    noise_up,
    per_channel_shape,
    per_sample,
)

SCHEDULES = {
    "vp": linear_betas(),
    "zero_snr": zero_snr(),
    "flow": FlowSchedule(),
    "shifted_flow": FlowSchedule(shift=3.0),
    "edm": EDMSchedule(),
}
KINDS = ["x0", "eps", "v", "flow"]


def made(schedule, level, batch=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(level)
    x0, eps = torch.randn(2, batch, 3, 2, generator=generator, dtype=dtype)
    t = schedule.level(torch.full((batch,), level))
    return x0, eps, t, schedule.add_noise(x0, eps, t)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("level", [1, 20, 500, 980, 998])
def test_round_trips_between_all_kinds(name, level):
    schedule = SCHEDULES[name]
    x0, eps, t, x_t = made(schedule, level)
    for kind in [*KINDS, "edm"] if name == "edm" else KINDS:
        output = schedule.target(x0, eps, kind, x_t, t)
        back = schedule.to_x0(output, kind, x_t, t)
        torch.testing.assert_close(back, x0, rtol=1e-9, atol=1e-8)
        torch.testing.assert_close(schedule.from_x0(x0, kind, x_t, t), output, rtol=1e-7, atol=1e-7)


def test_zero_terminal_snr_reads_x0_off_v_but_not_off_eps():
    schedule = zero_snr()
    x0, eps, t, x_t = made(schedule, 999)
    assert schedule.alpha_sigma(t)[0].max() == 0
    torch.testing.assert_close(x_t, eps)
    torch.testing.assert_close(schedule.to_x0(-x0, "v", x_t, t), x0)
    torch.testing.assert_close(schedule.to_x0(eps - x0, "flow", x_t, t), x0)
    wrong = schedule.to_x0(eps + 0.1, "eps", x_t, t)
    torch.testing.assert_close(wrong, torch.full_like(wrong, -0.1 / ALPHA_MIN), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["DDIMScheduler", "DDPMScheduler", "UnCLIPScheduler", "LCMScheduler"])
def test_eps_at_the_last_timestep_of_a_cosine_schedule_is_divided_as_stock_divides_it(name):
    """alpha is 4.93e-5 there; a bound of 1e-4 gave half of stock's x0."""
    if name == "UnCLIPScheduler":
        scheduler = diffusers.UnCLIPScheduler(clip_sample=False)
    else:
        scheduler = getattr(diffusers, name)(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    scheduler.set_timesteps(1000, **({"original_inference_steps": 1000} if name == "LCMScheduler" else {}))
    schedule, kind = from_scheduler(scheduler)
    x_t, eps = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    t = torch.full((3,), 999)
    assert schedule.alpha_sigma(t)[0][0].item() == pytest.approx(4.928e-5, rel=1e-3)
    stepped = scheduler.step(eps, scheduler.timesteps[0], x_t)
    stock = stepped.denoised if name == "LCMScheduler" else stepped.pred_original_sample
    assert stock.abs().max() > 1e4
    # LCM's own blend with x_t (c_skip, c_out) is 3e-9 off
    torch.testing.assert_close(schedule.to_x0(eps, kind, x_t, t), stock, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "scheduler",
    [
        DDIMScheduler(rescale_betas_zero_snr=True),
        EulerDiscreteScheduler(rescale_betas_zero_snr=True),  # its table ends in 2^-24 in place of 0
        DDIMScheduler(trained_betas=[0.1, 0.5, 1.0], num_train_timesteps=3),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_an_eps_teacher_that_starts_from_pure_noise_is_refused(scheduler):
    says = "last timestep is pure noise.*prediction_type is v_prediction or sample.*rescale_betas_zero_snr to false"
    with pytest.raises(UserError, match=says) as refused:
        from_scheduler(scheduler)
    assert "\n" not in str(refused.value)
    scheduler.register_to_config(prediction_type="v_prediction")
    assert from_scheduler(scheduler)[1] == "v"


def test_noise_ratios_find_their_timestep_on_schedules_that_end_in_noise():
    for schedule in (zero_snr(), from_scheduler(DDIMScheduler(beta_schedule="squaredcos_cap_v2"))[0]):
        alpha, sigma = schedule.alpha_sigma(torch.arange(20, 999))
        assert torch.equal(schedule.at_noise_ratio(sigma / alpha), torch.arange(20, 999))


def test_score_is_the_gradient_of_the_gaussian_kernel():
    schedule = linear_betas()
    x0, eps, t, x_t = made(schedule, 300)
    _, sigma = schedule.alpha_sigma(t)
    torch.testing.assert_close(schedule.score(x0, x_t, t), -eps / sigma[:, None, None])


def test_float32_in_float32_out_with_float64_coefficients():
    schedule = linear_betas()
    _, eps, t, x_t = made(schedule, 999, dtype=torch.float32)
    assert x_t.dtype == torch.float32
    exact = schedule.to_x0(eps.double(), "eps", x_t.double(), t)
    arguments = schedule.to_x0(eps, "eps", x_t, t)
    assert arguments.dtype == torch.float32
    torch.testing.assert_close(arguments.double(), exact, rtol=0, atol=1e-5)
    half = schedule.to_x0(eps.bfloat16(), "eps", x_t.bfloat16(), t)
    assert half.dtype == torch.bfloat16


CONVERSIONS = {
    "add_noise": lambda s, a, b, x, t, low: s.add_noise(a, b, t),
    "x0 of eps": lambda s, a, b, x, t, low: s.to_x0(b, "eps", x, t),
    "x0 of v": lambda s, a, b, x, t, low: s.to_x0(b, "v", x, t),
    "x0 of flow": lambda s, a, b, x, t, low: s.to_x0(b, "flow", x, t),
    "eps of x0": lambda s, a, b, x, t, low: s.from_x0(a, "eps", x, t),
    "v of x0": lambda s, a, b, x, t, low: s.from_x0(a, "v", x, t),
    "flow of x0": lambda s, a, b, x, t, low: s.from_x0(a, "flow", x, t),
    "target of v": lambda s, a, b, x, t, low: s.target(a, b, "v", x, t),
    "score": lambda s, a, b, x, t, low: s.score(a, x, t),
    "signal": lambda s, a, b, x, t, low: s.to_signal(x, b, t),
    "noise_up": lambda s, a, b, x, t, low: noise_up(x, s.alpha_sigma(low), s.alpha_sigma(t), b),
    "network_input": lambda s, a, b, x, t, low: s.network_input(x, t),
}


@pytest.mark.parametrize("conversion", CONVERSIONS)
@pytest.mark.parametrize("name", ["vp", "shifted_flow", "edm"])
def test_bf16_samples_are_rounded_once_and_their_coefficients_never(name, conversion):
    """The result is the exact one of the same inputs to half a unit in bfloat16's last place, 2^-8 of it; a coefficient
    in bfloat16 is off by as much before it is used."""
    schedule, convert = SCHEDULES[name], CONVERSIONS[conversion]
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(3, 900, 4, generator=generator).bfloat16()
    index = torch.arange(20, 920)
    t, low = schedule.level(index), schedule.level(index - 15)
    exact = convert(schedule, *samples.double(), t, low)
    result = convert(schedule, *samples, t, low)
    assert result.dtype == torch.bfloat16
    assert ((result.double() - exact).abs() <= 2**-8 * exact.abs() + 1e-6 * exact.abs().max()).all()


def test_coefficients_are_float64():
    for schedule in SCHEDULES.values():
        t = schedule.level(torch.tensor([3, 700]))
        assert {c.dtype for c in schedule.alpha_sigma(t)} == {torch.float64}
    alpha, sigma = SCHEDULES["vp"].alpha_sigma(torch.arange(1000))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000, dtype=torch.float64), rtol=0, atol=1e-15)


def test_schedule_constants_of_stable_diffusion():
    abar = linear_betas().alphas_cumprod
    for t, value in {
        20: 0.98131,
        249: 0.67543,
        399: 0.42609,
        499: 0.27767,
        749: 0.05662,
        980: 0.00584,
        999: 0.00466,
    }.items():
        assert abar[t].item() == pytest.approx(value, abs=1e-5)
    sigma_over_alpha = ((1 - abar) / abar).sqrt()
    assert sigma_over_alpha[999].item() == pytest.approx(14.615, abs=1e-3)
    assert sigma_over_alpha[399].item() == pytest.approx(1.161, abs=1e-3)


def test_karras_grid_of_edm():
    grid = EDMSchedule().level(torch.arange(1000))
    for index, value in {20: 0.00323, 100: 0.01675, 500: 2.5265, 980: 72.05, 999: 80.0}.items():
        assert grid[index].item() == pytest.approx(value, rel=1e-3)
    assert (grid.diff() > 0).all()


def test_preconditioning_of_edm_has_unit_variance_input_and_target():
    schedule = EDMSchedule()
    sigma = torch.tensor([0.002, 0.5, 80.0], dtype=torch.float64)
    c_skip, c_out = schedule.preconditioning(sigma)
    # 2206.00364 eq. 115-117: Var(c_in x) = 1, and the target of F has variance 1
    ones = torch.ones(3, dtype=torch.float64)
    c_in = schedule.network_input(ones[:, None], sigma)[:, 0]
    torch.testing.assert_close(c_in**2 * (sigma**2 + 0.25), ones)
    target_variance = ((1 - c_skip) ** 2 * 0.25 + c_skip**2 * sigma**2) / c_out**2
    torch.testing.assert_close(target_variance, ones)


@pytest.mark.parametrize("stated", ["epsilon", "v_prediction"])
def test_an_edm_networks_output_is_read_as_stock_reads_it(stated):
    """c_out is negative for schedulers that call the raw output a v-prediction."""
    stock = EDMEulerScheduler(prediction_type=stated)
    schedule, kind = from_scheduler(stock)
    assert kind == "edm"
    generator = torch.Generator().manual_seed(0)
    x_t, output = torch.randn(2, 1, 3, 4, generator=generator, dtype=torch.float64)
    for value in (0.01, 0.5, 7.0, 80.0):
        sigma = torch.tensor([value], dtype=torch.float64)
        x0 = schedule.to_x0(output, "edm", x_t, sigma)
        torch.testing.assert_close(x0, stock.precondition_outputs(x_t, output, sigma))
        torch.testing.assert_close(schedule.from_x0(x0, "edm", x_t, sigma), output)
        torch.testing.assert_close(schedule.network_input(x_t, sigma), stock.precondition_inputs(x_t, sigma))
        label = stock.precondition_noise(sigma)
        torch.testing.assert_close(schedule.network_time(sigma).double(), label, rtol=1e-6, atol=1e-6)


def test_deterministic_step_is_stock_ddim():
    stock = DDIMScheduler(clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True)
    schedule, kind = from_scheduler(stock)
    assert kind == "eps"
    stock.set_timesteps(10)
    x_t, eps = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    t, s = stock.timesteps[3], stock.timesteps[4]
    ours = schedule.step(schedule.to_x0(eps, "eps", x_t, t.expand(4)), x_t, t.expand(4), s.expand(4))
    torch.testing.assert_close(ours, stock.step(eps, t, x_t).prev_sample, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("scheduler", "schedule_type", "kind"),
    [
        (PNDMScheduler(prediction_type="v_prediction"), VPSchedule, "v"),
        (EulerDiscreteScheduler(prediction_type="epsilon"), VPSchedule, "eps"),
        (DPMSolverMultistepScheduler(prediction_type="sample"), VPSchedule, "x0"),
        (DDIMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True), VPSchedule, "v"),
        (FlowMatchEulerDiscreteScheduler(shift=3.0), FlowSchedule, "flow"),
        (DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True), FlowSchedule, "flow"),
        (EDMEulerScheduler(), EDMSchedule, "edm"),
        (CMStochasticIterativeScheduler(), EDMSchedule, "edm"),
    ],
    ids=lambda value: type(value).__name__ if hasattr(value, "config") else str(value),
)
def test_schedules_read_off_stock_schedulers(scheduler, schedule_type, kind):
    schedule, result = from_scheduler(scheduler)
    assert type(schedule) is schedule_type
    assert result == kind
    if schedule_type is VPSchedule:
        torch.testing.assert_close(schedule.alphas_cumprod, scheduler.alphas_cumprod.double(), rtol=0, atol=0)
    if schedule_type is FlowSchedule:
        assert schedule.shift == scheduler.config.get("shift", scheduler.config.get("flow_shift"))


def test_a_shifted_flows_levels_are_the_stock_schedulers_sigmas():
    for shift in (1.0, 3.0):
        stock = FlowMatchEulerDiscreteScheduler(shift=shift)
        schedule, _ = from_scheduler(stock)
        levels = schedule.level(torch.arange(1000))
        torch.testing.assert_close(levels.flip(0), stock.sigmas[:1000].double(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(schedule.network_time(levels).flip(0), stock.timesteps, rtol=1e-6, atol=1e-4)
    other = DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    assert from_scheduler(other)[0].shift == 5.0


def test_a_consistency_schedulers_labels_range_and_scale_are_its_own():
    """Its label is 250 ln sigma; its sigma_min = 0 is a way to end at the clean sample and no level of training."""
    stock = CMStochasticIterativeScheduler(sigma_min=0.0, sigma_max=60.0, sigma_data=0.7, rho=5.0)
    schedule, _ = from_scheduler(stock)
    sigma = torch.tensor([0.002, 0.5, 60.0], dtype=torch.float64)
    label = torch.as_tensor(stock.sigma_to_t(sigma.numpy()))
    torch.testing.assert_close(schedule.network_time(sigma).double(), label, rtol=1e-5, atol=1e-4)
    assert (schedule.sigma_min, schedule.sigma_max, schedule.sigma_data, schedule.rho) == (0.002, 60.0, 0.7, 5.0)
    x_t = torch.ones(3, 1, dtype=torch.float64)
    torch.testing.assert_close(schedule.network_input(x_t, sigma)[:, 0], (sigma**2 + 0.49).rsqrt())
    assert schedule.start_scale(2.5) == 2.5


@pytest.mark.parametrize("offset", [-0.49, -0.2, 0.0, 0.2, 0.49])
def test_a_noise_ratios_timestep_is_the_nearest_in_its_logarithm(offset):
    schedule = linear_betas()
    logs = ((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod).sqrt().log()
    t = torch.tensor([1, 20, 500, 625, 998])
    towards = t + (1 if offset > 0 else -1)
    ratio = (logs[t] + abs(offset) * (logs[towards] - logs[t])).exp()
    assert torch.equal(schedule.at_noise_ratio(ratio), t)
    assert schedule.at_noise_ratio(torch.tensor([1e-6, 1e6])).tolist() == [0, 999]


def test_a_noise_ratio_is_sigma_on_edm_and_sigma_over_alpha_on_flow():
    ratio = torch.tensor([0.1, 2.5], dtype=torch.float64)
    assert torch.equal(EDMSchedule().at_noise_ratio(ratio), ratio)
    t = FlowSchedule(shift=3.0).at_noise_ratio(ratio)
    torch.testing.assert_close(t / (1 - t), ratio)


def test_unknown_prediction_type_is_the_users_error():
    scheduler = DDIMScheduler()
    scheduler.register_to_config(prediction_type="wavelet")
    with pytest.raises(UserError, match="prediction_type 'wavelet'"):
        from_scheduler(scheduler)


def test_a_shift_that_depends_on_the_pictures_size_is_refused():
    """The scheduler ignores its ``shift`` then, so its times are not those that it says."""
    with pytest.raises(UserError, match="use_dynamic_shifting makes its times depend on the size"):
        from_scheduler(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True))


@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4, 4), (2, 3, 5, 4, 4), (4, 4, 4, 4, 4)])
def test_one_value_a_sample_is_of_the_samples_rank(shape):
    like, first = torch.zeros(shape), torch.arange(shape[0]) == 0
    chosen = torch.where(per_sample(first, like), 1.0, like)
    assert per_sample(first, like).dtype == torch.bool
    assert chosen[0].min() == 1
    assert chosen[1:].abs().max() == 0
    assert per_channel_shape(like) == (*shape[:2], *[1] * (len(shape) - 2))


def test_a_schedule_says_what_its_students_can_do():
    vp, flow, edm = linear_betas(), FlowSchedule(), EDMSchedule()
    assert (vp.time_dtype, flow.time_dtype, edm.time_dtype) == (torch.long, torch.float64, torch.float64)
    assert set(flow.stock_transitions) < set(flow.transitions) < set(vp.transitions)
    assert (vp.lowest_student_level, flow.lowest_student_level, edm.lowest_student_level) == (1, 0, 0)
    assert vp.student_times(4, None, "steps") == (999, 749, 499, 249)
    assert edm.student_times(2, 16.0, "steps") == (16.0, 1.0)
    assert flow.student_times(2, None, "steps") == (0.999, 0.4995)
