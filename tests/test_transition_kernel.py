"""The Gaussian of a sampler's move: worked numbers, the move itself, and diffusers' Euler-ancestral sampling."""

import math

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchLCMScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
)
from tiny import SD_BETAS
from toys import linear_betas, zero_snr

from stepdistill.denoiser import NetworkDenoiser
from stepdistill.errors import UserError
from stepdistill.families.schedulers import transition_of
from stepdistill.objectives.preference import gaussian_log_prob
from stepdistill.sampler import FewStepSampler, few_step_times
from stepdistill.schedule import EDMSchedule, FlowSchedule, VPSchedule

F64 = torch.float64
VP = linear_betas()
TIMES = (999.0, 749.0, 499.0, 249.0)


def drawn_samples(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def sampler_of(schedule, transition, eta=0.3, steps=4):
    return FewStepSampler(schedule, few_step_times(schedule, steps), transition, eta)


def pixel(value):
    return torch.full((1, 1, 1, 1), float(value), dtype=F64)


# -- worked numbers ----------------------------------------------------------------------------------------


def test_renoising_from_999_to_749_by_number():
    """DMD2's move on Stable Diffusion's schedule: x = 0.5, eps = 0.2, the next sample 1."""
    sampler, x = sampler_of(VP, "renoise"), pixel(0.5)
    x0 = VP.to_x0(pixel(0.2), "eps", x, sampler.time(0, x))
    mean, std = sampler.transition_kernel(x0, x, 0)
    assert x0.item() == pytest.approx(4.4014785, abs=5e-8)
    assert mean.item() == pytest.approx(1.0473622, abs=5e-8)
    assert std.item() == pytest.approx(0.9712757, abs=5e-8)
    assert gaussian_log_prob(pixel(1.0), mean, std).item() == pytest.approx(-0.8909825, abs=5e-8)


def test_euler_ancestral_from_999_to_749_by_number():
    """In VE units x = 10, eps = 0.7, the next sample 2; ours are alpha times that, and densities are over alpha."""
    sampler = sampler_of(VP, "ancestral")
    alpha, alpha_next = (VP.alpha_sigma(torch.tensor([t]))[0].item() for t in (999, 749))
    x = pixel(10 * alpha)
    x0 = VP.to_x0(pixel(0.7), "eps", x, sampler.time(0, x))
    mean, std = sampler.transition_kernel(x0, x, 0)
    assert x0.item() == pytest.approx(-0.2302489, abs=5e-8)
    assert mean.item() / alpha_next == pytest.approx(0.5677427, abs=5e-8)
    assert std.item() / alpha_next == pytest.approx(3.9193038, abs=5e-8)
    log_prob = gaussian_log_prob(pixel(2 * alpha_next), mean, std).item() + math.log(alpha_next)
    assert log_prob == pytest.approx(-2.3516245, abs=5e-8)


@pytest.mark.parametrize(
    ("index", "sigma", "following", "up", "down"),
    [
        (0, 14.6146, 4.0817, 3.9193, 1.1400),
        (1, 4.0817, 1.6129, 1.4816, 0.6373),
        (2, 1.6129, 0.6932, 0.6259, 0.2979),
    ],
)
def test_euler_ancestral_in_four_steps_by_number(index, sigma, following, up, down):
    sampler = sampler_of(VP, "ancestral")
    both = [VP.alpha_sigma(torch.tensor([int(t)])) for t in TIMES[index : index + 2]]
    (alpha, sigma_t), (alpha_next, sigma_next) = both
    assert (sigma_t / alpha).item() == pytest.approx(sigma, abs=5e-5)
    assert (sigma_next / alpha_next).item() == pytest.approx(following, abs=5e-5)
    mean, std = sampler.transition_kernel(pixel(0), pixel(sigma_t.item()), index)  # x0 = 0, eps = 1: the mean is down
    assert (std / alpha_next).item() == pytest.approx(up, abs=5e-5)
    assert mean.item() / alpha_next.item() == pytest.approx(down, abs=5e-5)


def test_the_official_renoising_formula_on_a_batch():
    """2410.03190's released code for DMD2, in its own terms: eps, timesteps, alphas_cumprod."""
    sampler = sampler_of(VP, "renoise")
    x, eps, following = (drawn_samples(5, 4, 3, 3, seed=seed) for seed in range(3))
    for index, (t, earlier) in enumerate(((999, 749), (749, 499), (499, 249))):
        abar, abar_next = VP.alphas_cumprod[t], VP.alphas_cumprod[earlier]
        x0 = (x - (1 - abar) ** 0.5 * eps) / abar**0.5
        mean, std = abar_next**0.5 * x0, (1 - abar_next) ** 0.5
        log_prob = -((following - mean) ** 2) / (2 * std**2) - std.log() - math.log(math.sqrt(2 * math.pi))
        ours = sampler.transition_kernel(VP.to_x0(eps, "eps", x, sampler.time(index, x)), x, index)
        torch.testing.assert_close(ours[0], mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(ours[1], std.expand(5), rtol=1e-14, atol=0)
        result = gaussian_log_prob(following, *ours)
        torch.testing.assert_close(result, log_prob.mean(dim=(1, 2, 3)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_renoising_is_around_1_minus_s_times_x0_with_spread_s(shift):
    schedule = FlowSchedule(shift)
    sampler = sampler_of(schedule, "renoise")
    x, velocity = drawn_samples(3, 2, 2, 2), drawn_samples(3, 2, 2, 2, seed=1)
    for index in range(3):
        t, s = sampler.times[index : index + 2]
        x0 = schedule.to_x0(velocity, "flow", x, sampler.time(index, x))
        mean, std = sampler.transition_kernel(x0, x, index)
        torch.testing.assert_close(mean, (1 - s) * (x - t * velocity), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(std, torch.full((3,), s, dtype=F64), rtol=1e-15, atol=0)


# -- the kernel is the move --------------------------------------------------------------------------------

MOVES = {
    "renoise": (VP, "renoise", 0.3),
    "renoise_zero_snr": (zero_snr(), "renoise", 0.3),
    "renoise_flow": (FlowSchedule(3.0), "renoise", 0.3),
    "renoise_edm": (EDMSchedule(), "renoise", 0.3),
    "tcd": (VP, "tcd", 0.3),
    "tcd_clean": (VP, "tcd", 1.0),
    "tcd_zero_snr": (zero_snr(), "tcd", 0.5),
    "ancestral": (VP, "ancestral", 0.3),
}


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", MOVES)
def test_a_move_is_the_kernels_mean_and_its_spread_times_the_noise(name, dtype):
    schedule, transition, eta = MOVES[name]
    sampler = sampler_of(schedule, transition, eta)
    x0, x_t, noise = (drawn_samples(3, 2, 4, 4, seed=seed, dtype=dtype) for seed in range(3))
    for index in range(3):
        mean, std = sampler.transition_kernel(x0, x_t, index)
        assert std.min() > 1e-2
        result = sampler.move(x0, x_t, index, lambda _: noise)
        expected = mean + std.to(dtype)[:, None, None, None] * noise
        close = 1e-12 if dtype == F64 else 5e-6
        torch.testing.assert_close(result, expected, rtol=close, atol=close)
        assert (result - sampler.move(x0, x_t, index, torch.zeros_like)).abs().max() > 1e-2


@pytest.mark.parametrize("name", [*MOVES, "ode", "tcd_without_noise"])
def test_what_is_kept_of_the_old_noise_and_what_is_new_make_the_next_level(name):
    """``down^2 + up^2 = sigma'^2``; x0 = 0 and x_t = sigma is eps = 1, so that the mean is down."""
    special = {"ode": (VP, "ode", 0.3), "tcd_without_noise": (VP, "tcd", 0.0)}
    schedule, transition, eta = (MOVES | special)[name]
    sampler = sampler_of(schedule, transition, eta)
    for index in range(3):
        sigma_t, following = (schedule.alpha_sigma(sampler.time(i, pixel(0)))[1] for i in (index, index + 1))
        mean, std = sampler.transition_kernel(pixel(0), pixel(sigma_t.item()), index)
        assert mean.item() ** 2 + std.item() ** 2 == pytest.approx(following.item() ** 2, rel=1e-12)
        assert (mean.item() == 0) == (transition == "renoise")
        assert (std.item() == 0) == (name in special)


@pytest.mark.parametrize(("transition", "eta"), [("ode", 0.3), ("tcd", 0.0)])
def test_a_deterministic_move_has_no_spread_and_is_the_mean(transition, eta):
    sampler = sampler_of(VP, transition, eta)
    x0, x_t = drawn_samples(3, 2, 4, 4), drawn_samples(3, 2, 4, 4, seed=1)
    for index in range(3):
        mean, std = sampler.transition_kernel(x0, x_t, index)
        assert std.tolist() == [0.0] * 3
        torch.testing.assert_close(sampler.move(x0, x_t, index, torch.randn_like), mean, rtol=1e-12, atol=1e-12)


def test_the_spread_of_tcd_is_what_its_lower_time_leaves():
    """From s = floor(0.7 749) = 524 up to 749."""
    sampler = sampler_of(VP, "tcd", 0.3)
    _, std = sampler.transition_kernel(pixel(1), pixel(2), 0)
    abar, abar_low = VP.alphas_cumprod[749], VP.alphas_cumprod[524]
    assert std.item() == pytest.approx((1 - abar / abar_low).sqrt().item(), rel=1e-12)


def test_ancestral_moves_are_those_of_ddim_with_eta_1():
    sampler = sampler_of(VP, "ancestral")
    x0, x_t = drawn_samples(3, 2, 4, 4), drawn_samples(3, 2, 4, 4, seed=1)
    for index, (t, s) in enumerate(((999, 749), (749, 499), (499, 249))):
        abar, low = VP.alphas_cumprod[t], VP.alphas_cumprod[s]
        variance = (1 - low) / (1 - abar) * (1 - abar / low)  # 2010.02502, eq. 16
        eps = (x_t - abar.sqrt() * x0) / (1 - abar).sqrt()
        mean, std = sampler.transition_kernel(x0, x_t, index)
        torch.testing.assert_close(std, variance.sqrt().expand(3), rtol=1e-10, atol=0)
        torch.testing.assert_close(mean, low.sqrt() * x0 + (1 - low - variance).sqrt() * eps, rtol=1e-10, atol=1e-12)


def test_ancestral_moves_are_for_vp_alone():
    for schedule in (FlowSchedule(), EDMSchedule()):
        with pytest.raises(UserError, match=r"sampler\.transition = ancestral: only VP"):
            sampler_of(schedule, "ancestral")


# -- diffusers' Euler ancestral ----------------------------------------------------------------------------


def stock():
    scheduler = EulerAncestralDiscreteScheduler(**SD_BETAS, timestep_spacing="trailing")
    scheduler.set_timesteps(4)
    return scheduler


def double_output(x, time):
    """Some eps-network of the scaled input and the timestep."""
    return torch.tanh(0.8 * x + 0.3 * x.roll(1, -1)) * (1 + time.reshape(-1, 1, 1, 1).to(x.dtype) / 2000)


@pytest.mark.parametrize("index", [0, 1, 2])
def test_one_ancestral_step_is_diffusers(index):
    scheduler = stock()
    schedule = VPSchedule(scheduler.alphas_cumprod)
    sampler = sampler_of(schedule, "ancestral")
    alpha, alpha_next = (schedule.alpha_sigma(sampler.time(i, pixel(0)))[0].item() for i in (index, index + 1))
    x, output = drawn_samples(2, 4, 8, 8, dtype=torch.float32), drawn_samples(2, 4, 8, 8, seed=1, dtype=torch.float32)
    timestep = scheduler.timesteps[index]
    assert timestep.item() == sampler.times[index]
    stepped = scheduler.step(output, timestep, x / alpha, generator=torch.Generator().manual_seed(7)).prev_sample
    x0 = schedule.to_x0(output, "eps", x, sampler.time(index, x))
    ours = sampler.move(x0, x, index, lambda like: drawn_samples(*like.shape, seed=7, dtype=like.dtype))
    torch.testing.assert_close(ours / alpha_next, stepped, rtol=1e-4, atol=1e-4)
    unlike = sampler_of(schedule, "renoise").move(x0, x, index, lambda like: drawn_samples(*like.shape, seed=7).float())
    assert (unlike / alpha_next - stepped).abs().max() > 0.1


def test_four_ancestral_steps_are_diffusers():
    scheduler = stock()
    schedule = VPSchedule(scheduler.alphas_cumprod)
    noise, drawn = drawn_samples(2, 4, 8, 8, dtype=torch.float32), torch.Generator().manual_seed(3)
    x = noise * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, timestep)
        x = scheduler.step(double_output(scaled, timestep), timestep, x, generator=drawn).prev_sample
    student = NetworkDenoiser(lambda x, t, _: double_output(x, t), schedule, "eps")
    again = torch.Generator().manual_seed(3)
    sampler = sampler_of(schedule, "ancestral")
    ours = sampler.sample(student, noise, {}, lambda like: torch.randn(like.shape, generator=again))
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-4)
    assert x.std() > 0.1


# -- what a scheduler says ---------------------------------------------------------------------------------

SCHEDULERS = {
    LCMScheduler: "renoise",
    CMStochasticIterativeScheduler: "renoise",
    FlowMatchLCMScheduler: "renoise",
    TCDScheduler: "tcd",
    EulerAncestralDiscreteScheduler: "ancestral",
    FlowMatchEulerDiscreteScheduler: "ode",
    DDIMScheduler: "ode",
    EulerDiscreteScheduler: "ode",
    DPMSolverMultistepScheduler: "ode",
    DDPMScheduler: None,
    PNDMScheduler: None,
}


@pytest.mark.parametrize("kind", SCHEDULERS)
def test_the_transition_of_a_stock_scheduler(kind):
    assert transition_of(kind()) == SCHEDULERS[kind]


def test_the_transition_of_a_stochastic_flow_scheduler_and_of_none():
    assert transition_of(FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)) == "renoise"
    assert transition_of(None) is None
