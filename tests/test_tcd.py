"""Strategic stochastic sampling (``tcd``): its step, its ends at eta 0 and 1, the stock scheduler, its variance."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, TCDScheduler
from segmented import exact_gain, scale, tall
from tiny import SD_BETAS
from toys import linear_betas, zero_snr

from stepdistill.analytic import GaussianMixture
from stepdistill.errors import UserError
from stepdistill.families.schedulers import check_expressible, student_scheduler
from stepdistill.sampler import FewStepSampler, few_step_times, ode_sample, renoised, strategic_step
from stepdistill.schedule import EDMSchedule, FlowSchedule, VPSchedule

F64 = torch.float64
KINDS = [("eps", "epsilon"), ("v", "v_prediction"), ("x0", "sample")]
ETAS = [0.0, 0.3, 0.7, 1.0]


def sampler_of(steps=4, eta=0.3, schedule=None, transition="tcd") -> FewStepSampler:
    schedule = schedule or linear_betas()
    return FewStepSampler(schedule, few_step_times(schedule, steps), transition, eta)


def mixture_student(schedule):
    return GaussianMixture([[-1.0, 0.3], [0.9, 0.6]], 0.05).denoiser(schedule)


def noise_of(count=6, seed=0):
    return torch.randn(count, 2, 1, 1, dtype=F64, generator=torch.Generator().manual_seed(seed))


def drawing(seed=7):
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, dtype=like.dtype, generator=generator)


def no_draw(like):
    raise AssertionError("a deterministic sampler drew noise")


# -- the ends ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_eta_0_is_ddim_over_its_times_and_ends_at_timestep_0(steps):
    schedule = linear_betas()
    student, noise = mixture_student(schedule), noise_of()
    result = sampler_of(steps, 0.0).sample(student, noise, {}, no_draw)
    times = [torch.full((6,), int(t)) for t in (*few_step_times(schedule, steps), 0)]
    x = noise
    for t, following in pairwise(times):
        prediction = student(x, t, {})
        x = schedule.add_noise(prediction.x0, prediction.eps, following)
    assert torch.equal(result, x)
    # the ode sampler moves alike and ends on the clean sample
    ode = sampler_of(steps, transition="ode").sample(student, noise, {}, no_draw)
    assert torch.equal(
        ode, ode_sample(lambda x, t: student(x, t, {}).x0, schedule, few_step_times(schedule, steps), noise)
    )
    assert torch.equal(ode, prediction.x0)
    assert (result - ode).abs().max() > 1e-3


def test_eta_1_is_fresh_noise_from_timestep_0():
    """s = 0: the consistency step, but from the sample at timestep 0 rather than the clean one."""
    schedule = linear_betas()
    student, noise, draws = mixture_student(schedule), noise_of(), drawing()
    result = sampler_of(4, 1.0).sample(student, noise, {}, draws)
    draws, zero, x = drawing(), torch.zeros(6, dtype=torch.long), noise
    for t in (999, 749, 499, 249):
        prediction = student(x, torch.full((6,), t), {})
        x = schedule.add_noise(prediction.x0, prediction.eps, zero)
        if t > 249:
            following = torch.full((6,), t - 250)
            ratio = (schedule.alphas_cumprod[t - 250] / schedule.alphas_cumprod[0]).sqrt()
            z = draws(x)
            torch.testing.assert_close(renoised(schedule, x, zero, following, z), ratio * x + (1 - ratio**2).sqrt() * z)
            x = ratio * x + (1 - ratio**2).sqrt() * z
    torch.testing.assert_close(result, x, rtol=1e-10, atol=1e-10)
    plain = sampler_of(4, transition="renoise").sample(student, noise, {}, drawing())
    assert 1e-4 < (result - plain).abs().mean() < 0.05
    between = sampler_of(4, 0.3).sample(student, noise, {}, drawing())
    assert (result - between).abs().mean() > 0.01


# -- the stock scheduler -----------------------------------------------------------------------------------------


def stock_tcd(kind="epsilon", **settings) -> TCDScheduler:
    """As published, on a float64 copy of its table."""
    stock = TCDScheduler(**SD_BETAS, clip_sample=False, set_alpha_to_one=False, prediction_type=kind, **settings)
    stock.alphas_cumprod = stock.alphas_cumprod.double()
    return stock


def test_golden_numbers_of_the_sheet():
    stock = stock_tcd()
    stock.set_timesteps(2)
    assert stock.timesteps.tolist() == [999, 499]
    schedule = VPSchedule(stock.alphas_cumprod)
    x, eps, t, following = tall(0.5), tall(0.2), torch.tensor([999]), torch.tensor([499])
    x0 = schedule.to_x0(eps, "eps", x, t)
    assert schedule.step(x0, x, t, torch.tensor([349])).item() == pytest.approx(3.2778624, abs=2e-6)
    at = {z: strategic_step(schedule, x0, x, t, following, 0.3, lambda like, z=z: tall(z)).item() for z in (0, 1)}
    assert at[0] == pytest.approx(0.7392057 * 3.2778624, abs=2e-6)
    assert at[1] - at[0] == pytest.approx(0.6734797, abs=1e-6)
    stepped = stock.step(eps, 999, x, eta=0.3, generator=torch.Generator().manual_seed(3))
    z = torch.randn(1, 1, 1, 1, dtype=F64, generator=torch.Generator().manual_seed(3)).item()
    assert stepped.pred_noised_sample.item() == pytest.approx(3.2778624, abs=2e-6)
    assert stepped.prev_sample.item() == pytest.approx(at[0] + (at[1] - at[0]) * z, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("times", [(999, 749, 499, 249), (999, 759, 499, 259), (999,)])
def test_equals_the_stock_scheduler_step_by_step(times, eta, kind):
    """Both on the times that ours give it and on its own fifty."""
    ours, prediction_type = kind
    stock = stock_tcd(prediction_type, original_inference_steps=50 if 759 in times else len(times))
    stock.set_timesteps(len(times))
    assert stock.timesteps.tolist() == list(times)
    schedule = VPSchedule(stock.alphas_cumprod)
    sampler = FewStepSampler(schedule, tuple(float(t) for t in times), "tcd", eta)
    generator, draw = torch.Generator().manual_seed(7), drawing(7)
    for index, t in enumerate(times):
        x, output = noise_of(seed=index), noise_of(seed=10 + index)
        x0 = schedule.to_x0(output, ours, x, sampler.time(index, x))
        expected = stock.step(output, t, x, eta=eta, generator=generator).prev_sample
        if index + 1 < len(times):
            moved = sampler.move(x0, x, index, draw)
        else:
            moved = schedule.step(x0, x, sampler.time(index, x), torch.zeros(6, dtype=torch.long))
        torch.testing.assert_close(moved, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_whole_sample_is_the_exported_schedulers(steps, eta):
    family = SimpleNamespace(kind="eps", passes_eta=True, scheduler=DDIMScheduler(**SD_BETAS))
    stock = student_scheduler(family, sampler_of(steps, eta))
    assert type(stock) is TCDScheduler
    stock.alphas_cumprod = stock.alphas_cumprod.double()
    schedule = VPSchedule(stock.alphas_cumprod)
    student, x = mixture_student(schedule), noise_of()
    result = sampler_of(steps, eta, schedule).sample(student, x, {}, drawing())
    stock.set_timesteps(steps)
    generator = torch.Generator().manual_seed(7)
    for t in stock.timesteps:
        x = stock.step(student(x, t.expand(6), {}).eps, t, x, eta=eta, generator=generator).prev_sample
    torch.testing.assert_close(result, x, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("steps", "eta"), [(4, 0.3), (36, 0.3), (3, 0.8), (9, 0.9)])
def test_the_level_s_is_the_stock_schedulers_where_it_is_whole(steps, eta):
    """s = floor((1 - eta) t) of a float32 product: 0.7 * 350 is 245 and 0.2 * 665 is 133, not 244 and 132."""
    family = SimpleNamespace(kind="x0", passes_eta=True, scheduler=DDIMScheduler(**SD_BETAS))
    sampler = sampler_of(steps, eta)
    stock = student_scheduler(family, sampler)
    stock.alphas_cumprod = sampler.schedule.alphas_cumprod[: len(stock.alphas_cumprod)]
    stock.set_timesteps(steps)
    assert stock.timesteps.tolist() == list(sampler.times)
    generator, draw, off = torch.Generator().manual_seed(7), drawing(7), []
    for index, t in enumerate(stock.timesteps[:-1]):
        x, x0 = noise_of(seed=index), noise_of(seed=100 + index)
        expected = stock.step(x0, t, x, eta=eta, generator=generator).prev_sample
        if not torch.allclose(sampler.move(x0, x, index, draw), expected, rtol=1e-9, atol=1e-9):
            off.append(int(sampler.times[index + 1]))
    assert off == []


# -- fewer steps -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transition", ["renoise", "ode", "tcd"])
def test_in_fewer_steps_it_is_the_sampler_and_the_exported_scheduler_of_so_many(transition):
    whole = FewStepSampler(linear_betas(), few_step_times(linear_betas(), 8), transition, 0.6)
    family = SimpleNamespace(kind="eps", passes_eta=True, scheduler=DDIMScheduler(**SD_BETAS))
    stock = student_scheduler(family, whole)
    for steps in (8, 4, 2, 1):
        fewer = whole.in_steps(steps)
        assert fewer.times == few_step_times(linear_betas(), steps)
        assert (fewer.transition, fewer.eta, fewer.schedule) == (transition, 0.6, whole.schedule)
        assert fewer.steps == steps
        stock.set_timesteps(steps)
        assert stock.timesteps.tolist() == list(fewer.times)


# -- levels of noise ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("c", [0.3, 1.0, 2.0])
@pytest.mark.parametrize("eta", ETAS)
@pytest.mark.parametrize(("t", "following"), [(999, 749), (749, 499), (499, 249), (999, 19), (20, 19)])
def test_the_next_marginal_has_the_forward_variance_for_any_eta(t, following, eta, c):
    """A prediction whose jump to s is exact gives N(0, alpha^2 c^2 + sigma^2) at the next time."""
    schedule = linear_betas()
    s = int((1 - eta) * following)
    (alpha_t, alpha_s, alpha), (sigma_t, sigma_s, sigma) = schedule.alpha_sigma(torch.tensor([t, s, following]))
    gain = exact_gain(alpha_t, sigma_t, alpha_s, sigma_s, c)

    def step(x, z):
        at = torch.tensor([t]), torch.tensor([following])
        return strategic_step(schedule, gain * x, x, *at, eta, lambda like: z).item()

    signal, fresh = step(tall(1), tall(0)), step(tall(0), tall(1))
    variance = signal**2 * (alpha_t**2 * c**2 + sigma_t**2) + fresh**2
    assert variance.item() == pytest.approx((alpha**2 * c**2 + sigma**2).item(), rel=1e-9)
    assert (fresh > 0) == (s < following)


def test_fresh_noise_is_phased_consistencys_noise_travel():
    """``sqrt(ab_t / ab_s) x + sqrt(1 - ab_t / ab_s) z``; from a level to itself it is nothing."""
    schedule = linear_betas()
    s, t = torch.tensor([0, 0, 349, 998, 19, 500]), torch.tensor([1, 999, 499, 999, 759, 500])
    x, z = noise_of(), noise_of(seed=1)
    ratio = scale(schedule.alphas_cumprod[t] / schedule.alphas_cumprod[s])
    result = renoised(schedule, x, s, t, z)
    torch.testing.assert_close(result, ratio.sqrt() * x + (1 - ratio).sqrt() * z, rtol=1e-9, atol=1e-9)
    assert torch.equal(result[-1], x[-1])


def test_fresh_noise_up_to_a_last_level_without_signal_is_noise_alone():
    x, z = noise_of(), noise_of(seed=1)
    result = renoised(zero_snr(), x, torch.full((6,), 400), torch.full((6,), 999), z)
    assert torch.equal(result, z)


@pytest.mark.parametrize(("eta", "draws"), [(0.0, 0), (0.3, 3), (1.0, 3)])
def test_every_step_but_the_last_draws_once(eta, draws):
    shapes, draw = [], drawing()

    def noting(like):
        shapes.append(tuple(like.shape))
        return draw(like)

    sampler = sampler_of(4, eta)
    sampler.sample(mixture_student(sampler.schedule), noise_of(), {}, noting)
    assert shapes == [(6, 2, 1, 1)] * draws


# -- what has no tcd ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [FlowSchedule(), EDMSchedule()])
def test_only_vp_teachers_have_it(schedule):
    with pytest.raises(UserError, match=r"sampler\.transition = tcd: only VP") as error:
        sampler_of(2, schedule=schedule)
    assert "\n" not in str(error.value)


def test_a_pipeline_that_passes_no_eta_has_the_schedulers_own_alone():
    family = SimpleNamespace(kind="eps", passes_eta=False)
    check_expressible(family, sampler_of(4, 0.3))
    with pytest.raises(UserError, match=r"sampler\.eta = 0\.5") as error:
        check_expressible(family, sampler_of(4, 0.5))
    assert "\n" not in str(error.value)
    check_expressible(SimpleNamespace(kind="eps", passes_eta=True), sampler_of(4, 0.5))
