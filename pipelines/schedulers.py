"""The stock scheduler whose config alone makes a stock pipeline sample as our few-step sampler does."""

from __future__ import annotations

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DPMSolverMultistepScheduler,
    LCMScheduler,
)

from stepdistill.errors import UserError
from stepdistill.sampler import EDM_STUDENT_RHO, FewStepSampler
from stepdistill.schedule import DIFFUSERS_PREDICTION_TYPES, EDMSchedule, FlowSchedule, PredictionType, VPSchedule

TIMESTEP_SCALING = 1e6
"""Makes LCM's c_skip 0 and c_out 1 to float32 at every timestep: the step is then exactly x0."""


def student_scheduler(scheduler, kind: PredictionType, sampler: FewStepSampler):
    """A stock scheduler for the student of a teacher with ``scheduler``.

    - VP: LCMScheduler with ``original_inference_steps`` = N: N steps give the sampler's times, more steps raise.  A
      start below the last timestep cuts the betas there.
    - flow: first-order DPM-Solver on flow sigmas: the deterministic Euler grid 0.999 k/N.
    - EDM: the consistency scheduler with sigma_min = 0.

    Raises:
        UserError: no stock scheduler expresses this sampler; see :func:`check_expressible`.
    """
    check_expressible(scheduler, sampler)
    schedule = sampler.schedule
    if isinstance(schedule, VPSchedule):
        return _lcm(scheduler, kind, sampler)
    if isinstance(schedule, FlowSchedule):
        return DPMSolverMultistepScheduler(
            num_train_timesteps=schedule.num_levels,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=schedule.shift,
            solver_order=1,
            algorithm_type="dpmsolver++",
            final_sigmas_type="zero",
        )
    return CMStochasticIterativeScheduler(
        num_train_timesteps=max(2, sampler.steps + (sampler.steps > 1)),
        sigma_max=sampler.times[0],
        sigma_min=0.0,
        sigma_data=schedule.sigma_data,
        rho=EDM_STUDENT_RHO,
        clip_denoised=False,
    )


def check_expressible(scheduler, sampler: FewStepSampler) -> None:
    """Refuse a sampler that no stock scheduler can be configured to be; asked before training starts.

    Raises:
        UserError: an N-step flow student with fresh noise, an N-step VP or EDM student without it, an EDM teacher whose
            time label is not the consistency scheduler's.
    """
    schedule, several = sampler.schedule, sampler.steps > 1
    if isinstance(schedule, FlowSchedule) and several and sampler.transition != "ode":
        raise UserError(
            "sampler.transition = renoise: no stock scheduler re-noises a flow model in this family's pipeline; set "
            "sampler.transition=ode"
        )
    if not isinstance(schedule, FlowSchedule) and several and sampler.transition != "renoise":
        raise UserError(
            f"sampler.transition = ode: the exported {sampler.steps}-step student of this teacher re-noises; set "
            "sampler.transition=renoise"
        )
    if isinstance(schedule, EDMSchedule) and not isinstance(scheduler, CMStochasticIterativeScheduler):
        raise UserError(
            f"teacher: an EDM student can be exported only from a teacher saved with CMStochasticIterativeScheduler "
            f"(time label 250 ln sigma), not {type(scheduler).__name__}"
        )


def _lcm(scheduler, kind: PredictionType, sampler: FewStepSampler) -> LCMScheduler:
    config, steps = scheduler.config, sampler.steps
    names = {ours: theirs for theirs, ours in DIFFUSERS_PREDICTION_TYPES.items()}
    common = {
        "original_inference_steps": steps,
        "steps_offset": 1,  # Stable Diffusion's pipelines rewrite any other value; LCM does not use it
        "clip_sample": False,
        "set_alpha_to_one": True,
        "prediction_type": names[kind],
        "timestep_scaling": TIMESTEP_SCALING,
    }
    table = sampler.schedule.alphas_cumprod
    length = int(sampler.times[0]) + 1 if steps == 1 else (int(sampler.times[0]) + 1) // steps * steps
    if length == len(table):
        same = {k: config[k] for k in ("beta_start", "beta_end", "beta_schedule", "trained_betas") if k in config}
        same["rescale_betas_zero_snr"] = bool(config.get("rescale_betas_zero_snr", False))
        whole = LCMScheduler(num_train_timesteps=len(table), **same, **common)
        if torch.equal(whole.alphas_cumprod.double(), table):
            return whole
    alphas = table[:length] / torch.cat([torch.ones(1, dtype=table.dtype), table[: length - 1]])
    return LCMScheduler(num_train_timesteps=length, trained_betas=(1 - alphas).tolist(), **common)
