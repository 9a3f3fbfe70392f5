"""The few-step sampler and the stock scheduler that a student is exported with: one network through both."""

from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
)
from tiny import SD_BETAS, scheduler
from torch import nn
from toys import linear_betas

from stepdistill.denoiser import NetworkDenoiser, Prediction
from stepdistill.families.analytic import AnalyticFamily
from stepdistill.families.schedulers import student_scheduler
from stepdistill.roles.roles import Roles
from stepdistill.roles.settings import RolesSettings
from stepdistill.sampler import FewStepSampler, SignalSampler, ddim_times, few_step_times
from stepdistill.schedule import EDMSchedule, FlowSchedule, from_scheduler


class Network(nn.Module):
    """Not a denoiser of anything, but its output depends on every value and on its time label."""

    def forward(self, x, time, label=None):
        mixed = x + 0.3 * x.roll(1, -1)
        return torch.tanh(0.8 * mixed) + 0.5 * torch.sin(time.float() / 150).reshape(-1, 1, 1, 1)


def noise_of(count=3):
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(0))


def drawing():
    generator = torch.Generator().manual_seed(7)
    return lambda like: torch.randn(like.shape, generator=generator)


def stock_sample(stock, steps, noise):
    """A stock pipeline's loop: the network sees what the scheduler hands it."""
    stock.set_timesteps(steps)
    generator, sample = torch.Generator().manual_seed(7), noise * stock.init_noise_sigma
    for t in stock.timesteps:
        output = Network()(stock.scale_model_input(sample, t), t.expand(len(noise)))
        takes = {"generator": generator} if isinstance(stock, (LCMScheduler, CMStochasticIterativeScheduler)) else {}
        sample = stock.step(output, t, sample, **takes).prev_sample
    return sample


def family_of(teachers_scheduler):
    schedule, kind = from_scheduler(teachers_scheduler)
    if isinstance(schedule, FlowSchedule):
        schedule.integer_labels = True  # as the family of pixel teachers sets it
    return SimpleNamespace(scheduler=teachers_scheduler, schedule=schedule, kind=kind, passes_eta=True)


CASES = [
    ("eps", "renoise", 1, None),
    ("eps", "renoise", 4, None),
    ("v", "renoise", 4, None),
    ("x0", "renoise", 2, None),
    ("eps", "ode", 4, None),
    ("v", "ode", 5, None),
    ("sd_pndm_eps", "renoise", 1, 399.0),
    ("sd_pndm_eps", "renoise", 4, 799.0),
    ("sd_euler_v", "ode", 2, 599.0),
    ("flow", "ode", 1, None),
    ("flow", "ode", 4, None),
    ("flow_shift", "ode", 4, None),
    ("edm", "renoise", 1, None),
    ("edm", "renoise", 1, 2.5),
    ("edm", "renoise", 4, None),
]


@pytest.mark.parametrize(("name", "transition", "steps", "start"), CASES)
def test_the_exported_scheduler_draws_what_the_sampler_does(name, transition, steps, start):
    family, noise = family_of(scheduler(name)), noise_of()
    sampler = FewStepSampler(family.schedule, few_step_times(family.schedule, steps, start), transition)
    student = NetworkDenoiser(lambda x, time, condition: Network()(x, time), family.schedule, family.kind)
    expected = sampler.sample(student, noise, {}, drawing())
    result = stock_sample(student_scheduler(family, sampler), steps, noise)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=2e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["eps", "v", "x0", "sd_pndm_eps", "flow", "flow_shift"])
@pytest.mark.parametrize("level", [1, 40])
def test_a_signal_students_scheduler_reads_the_noise_with_the_last_levels_coefficients(name, level):
    """BOOT's: one call on pure noise under the label of a low level."""
    family, noise = family_of(scheduler(name)), noise_of()
    schedule = family.schedule
    sampler = SignalSampler(schedule, (float(schedule.level(torch.tensor([level]))),))
    toy = AnalyticFamily(SimpleNamespace(schedule=schedule), Network(), family.kind, (2, 4, 4))
    student = Roles(toy, RolesSettings(), fake_score=False).student
    expected = sampler.sample(student, noise, {}, None)
    result = stock_sample(student_scheduler(family, sampler), 1, noise)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
    last = schedule.level(torch.full((3,), schedule.num_levels - 1))
    label = schedule.network_time(schedule.level(torch.full((3,), level)))
    torch.testing.assert_close(expected, schedule.to_x0(Network()(noise, label), family.kind, noise, last))


def test_a_tuned_lcm_model_keeps_its_own_scheduler_and_times():
    family = family_of(LCMScheduler(**SD_BETAS))
    sampler = FewStepSampler(family.schedule, (999.0, 759.0, 499.0, 259.0))
    assert student_scheduler(family, sampler).config.original_inference_steps == 50
    others = FewStepSampler(family.schedule, few_step_times(family.schedule, 4))
    stock = student_scheduler(family, others)
    stock.set_timesteps(4)
    assert stock.timesteps.tolist() == [999, 749, 499, 249]


# -- times -----------------------------------------------------------------------------------------------------


def test_times_of_students_are_the_stated_ones():
    vp, flow, edm = linear_betas(), FlowSchedule(shift=3.0), EDMSchedule()
    assert few_step_times(vp, 4) == (999, 749, 499, 249)
    assert few_step_times(vp, 4, 799) == (799, 599, 399, 199)
    assert few_step_times(vp, 1, 399) == (399,)
    times = [3 * u / (1 + 2 * u) for u in (0.999, 0.74925, 0.4995, 0.24975)]
    assert few_step_times(flow, 4) == pytest.approx(times, rel=1e-12)
    assert few_step_times(edm, 4) == pytest.approx((80, 80 * 0.75**4, 80 / 16, 80 / 256))
    assert few_step_times(edm, 2, 2.5) == pytest.approx((2.5, 2.5 / 16))


@pytest.mark.parametrize("steps", [1, 3, 10, 50])
def test_a_teachers_times_are_ddims_trailing_ones(steps):
    stock = DDIMScheduler(timestep_spacing="trailing")
    stock.set_timesteps(steps)
    schedule, _ = from_scheduler(stock)
    assert list(ddim_times(schedule, steps)) == stock.timesteps.tolist()
    flow = FlowMatchEulerDiscreteScheduler(shift=3.0)
    u = torch.tensor([round(1000 * (1 - k / steps)) / 1000 for k in range(steps)], dtype=torch.float64)
    times = torch.tensor(ddim_times(from_scheduler(flow)[0], steps), dtype=torch.float64)
    torch.testing.assert_close(times, 3 * u / (1 + 2 * u))


def test_fewer_steps_are_every_so_many_of_the_times():
    sampler = FewStepSampler(EDMSchedule(), (80.0, 25.0, 5.0, 0.3))
    assert sampler.in_steps(2).times == (80.0, 5.0)
    assert sampler.in_steps(1).times == (80.0,)
    assert sampler.in_steps(4) == sampler


# -- inputs ----------------------------------------------------------------------------------------------------


def test_the_first_input_is_unit_noise_but_sigma_times_it_on_edm_and_for_ancestral():
    noise = noise_of().bfloat16()
    assert torch.equal(FewStepSampler(linear_betas(), (399.0,)).start(noise), noise)
    assert torch.equal(FewStepSampler(FlowSchedule(), (0.999,)).start(noise), noise)
    torch.testing.assert_close(FewStepSampler(EDMSchedule(), (2.5,)).start(noise), 2.5 * noise)
    sigma = linear_betas().alpha_sigma(torch.tensor([399]))[1].item()
    result = FewStepSampler(linear_betas(), (399.0,), "ancestral").start(noise)
    assert torch.equal(result, (sigma * noise.double()).bfloat16())


def test_every_step_is_told_the_condition_and_its_own_time():
    """And a rollout to a step is what a whole sample meets there."""
    seen, sampler = [], FewStepSampler(linear_betas(), few_step_times(linear_betas(), 4))

    def student(x_t, t, condition):
        seen.append((x_t, t, condition))
        return Prediction(sampler.schedule, x_t, t, 0.5 * x_t, "x0")

    condition = {"label": torch.tensor([2, 0, 1])}
    result = sampler.sample(student, noise_of(), condition, drawing())
    assert [t.tolist() for _, t, _ in seen] == [[999] * 3, [749] * 3, [499] * 3, [249] * 3]
    assert all(condition_seen is condition for *_, condition_seen in seen)
    torch.testing.assert_close(result, 0.5 * seen[3][0])
    inputs = [x_t for x_t, *_ in seen]
    for exit_index in range(4):
        seen.clear()
        x_t, t = sampler.rollout(student, noise_of(), condition, exit_index, drawing())
        assert torch.equal(x_t, inputs[exit_index])
        assert t.tolist() == [(999, 749, 499, 249)[exit_index]] * 3
        assert len(seen) == exit_index


def test_pndms_table_is_that_of_the_betas():
    """The schedule of a teacher that was saved with another scheduler is the same."""
    assert torch.equal(
        from_scheduler(PNDMScheduler(**SD_BETAS))[0].alphas_cumprod.float(), LCMScheduler(**SD_BETAS).alphas_cumprod
    )
