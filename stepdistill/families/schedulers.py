"""Stock schedulers: the one whose config alone makes a stock pipeline sample as our few-step sampler does, and what a
teacher's own scheduler says of how it samples."""

from __future__ import annotations

import contextlib
from typing import Any, Protocol

import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
)
from torch import Tensor

from stepdistill.errors import UserError, first_line
from stepdistill.sampler import FewStepSampler, SignalSampler
from stepdistill.schedule import (
    DIFFUSERS_PREDICTION_TYPES,
    EDM_STUDENT_RHO,
    EDMSchedule,
    FlowSchedule,
    PredictionType,
    Transition,
    VPSchedule,
)

TCD_ETA = 0.3
"""TCDScheduler's own eta, where a pipeline passes none."""
TIMESTEP_SCALING = 1e6
"""Makes LCM's c_skip 0 and c_out 1 to float32 at every timestep: the step is then exactly x0."""

FLOW_ONE = 1e9
"""A shift that makes the first sigma of any flow grid 1."""


class Sampled(Protocol):
    """What must be known of a teacher to choose its students' scheduler: its own scheduler, what its network predicts,
    and whether its pipeline hands the scheduler an ``eta``."""

    @property
    def scheduler(self) -> Any: ...

    @property
    def kind(self) -> PredictionType: ...

    @property
    def passes_eta(self) -> bool: ...


def transition_of(scheduler: Any) -> Transition | None:
    """How a stock scheduler moves between steps; None where its class does not decide it."""
    match type(scheduler).__name__:
        case "LCMScheduler" | "CMStochasticIterativeScheduler" | "FlowMatchLCMScheduler":
            return "renoise"
        case "TCDScheduler":
            return "tcd"
        case "EulerAncestralDiscreteScheduler":
            return "ancestral"
        case "FlowMatchEulerDiscreteScheduler":
            return "renoise" if scheduler.config.get("stochastic_sampling") else "ode"
        case "DDIMScheduler" | "EulerDiscreteScheduler" | "DPMSolverMultistepScheduler":
            return "ode"
    return None


def lcm_times(scheduler: Any, steps: int) -> tuple[float, ...] | None:
    """The times that an LCM scheduler takes in ``steps`` steps, as published models were trained at (999, 759, 499, 259
    for four of the usual fifty); None for schedulers of another class.

    Raises:
        UserError: it takes fewer.
    """
    if not isinstance(scheduler, LCMScheduler):
        return None
    try:
        scheduler.set_timesteps(steps)
    except ValueError as error:
        raise UserError(
            f"sampler.steps = {steps}: the model's scheduler does not take so many ({first_line(error)})"
        ) from None
    return tuple(float(t) for t in scheduler.timesteps)


def student_scheduler(family: Sampled, sampler: FewStepSampler) -> Any:
    """A stock scheduler for the student of a teacher of ``family``.

    - VP: LCMScheduler with ``original_inference_steps`` = N: N steps give the sampler's times, more steps raise; for
      ``ode`` DDIM with trailing timesteps, for ``tcd`` TCDScheduler, for ``ancestral`` Euler's.  A start
      below the last timestep cuts the betas there.
    - flow: first-order DPM-Solver on flow sigmas: the deterministic Euler grid 0.999 k/N.
    - EDM: the consistency scheduler with sigma_min = 0.
    - BOOT's students see pure noise under another time's label: one timestep, with the coefficients of the last.

    Raises:
        UserError: no stock scheduler expresses this sampler; see :func:`check_expressible`.
    """
    check_expressible(family, sampler)
    if sampler.transition == "renoise" and sampler.steps > 1 and _takes(family.scheduler, sampler):
        return type(family.scheduler).from_config(family.scheduler.config)
    schedule, signal = sampler.schedule, isinstance(sampler, SignalSampler)
    if isinstance(schedule, VPSchedule):
        table = schedule.alphas_cumprod
        if signal:
            return _signal_lcm(family.kind, float(table[-1]), int(sampler.times[0]))
        return _vp(family.scheduler, family.kind, table, sampler)
    if isinstance(schedule, FlowSchedule):
        label = int(schedule.network_time(torch.tensor([sampler.times[0]])))
        return DPMSolverMultistepScheduler(
            num_train_timesteps=label + 1 if signal else schedule.num_levels,
            prediction_type="flow_prediction",
            use_flow_sigmas=True,
            flow_shift=FLOW_ONE if signal else schedule.shift,
            solver_order=1,
            algorithm_type="dpmsolver++",
            final_sigmas_type="zero",
        )
    if isinstance(schedule, EDMSchedule):
        return CMStochasticIterativeScheduler(
            num_train_timesteps=sampler.steps + 1,  # its last sigma is 0, which is not one of the steps
            sigma_max=sampler.times[0],
            sigma_min=0.0,
            sigma_data=schedule.sigma_data,
            rho=EDM_STUDENT_RHO,
            clip_denoised=False,
        )
    raise TypeError(f"no stock scheduler for {type(schedule).__name__}")


def _takes(scheduler: Any, sampler: FewStepSampler) -> bool:
    """Whether a scheduler, an LCM one, takes the sampler's times in as many steps: that of a model that was tuned."""
    try:
        return lcm_times(scheduler, sampler.steps) == sampler.times
    except UserError:
        return False


def check_expressible(family: Sampled, sampler: FewStepSampler) -> None:
    """Refuse a sampler that no stock scheduler can be configured to be; asked before training starts.

    Raises:
        UserError: an N-step flow student with fresh noise, an N-step EDM student without it, tcd in a pipeline that
            passes no eta, ancestral for an x0 network or a schedule that ends in pure noise,
            an EDM teacher whose time label is not the consistency scheduler's, BOOT on an EDM teacher.
    """
    schedule = sampler.schedule
    if sampler.steps > 1 and sampler.transition not in schedule.stock_transitions:
        raise UserError(
            f"sampler.transition = {sampler.transition}: no stock scheduler makes these moves between "
            f"{sampler.steps} steps for this teacher; set sampler.transition={schedule.stock_transitions[0]}"
        )
    if sampler.transition == "tcd" and sampler.eta != TCD_ETA and not family.passes_eta:
        raise UserError(
            f"sampler.eta = {sampler.eta}: this family's pipeline passes no eta, so the stock scheduler uses "
            f"{TCD_ETA}; set that, or transition renoise (eta 1) or ode (0)"
        )
    ends_in_noise = isinstance(schedule, VPSchedule) and schedule.alphas_cumprod[-1] == 0
    if sampler.transition == "ancestral" and (family.kind == "x0" or ends_in_noise):
        what = "an x0 network" if family.kind == "x0" else "a schedule whose last alpha is 0"
        raise UserError(f"sampler.transition = ancestral: the stock Euler scheduler has none for {what}; use renoise")
    if isinstance(sampler, SignalSampler) and isinstance(schedule, EDMSchedule):
        raise UserError(
            "method = boot: no stock scheduler gives an EDM network one time's label with another's noise, so its "
            "student cannot be exported; use a VP or flow teacher"
        )
    if isinstance(schedule, EDMSchedule) and not isinstance(family.scheduler, CMStochasticIterativeScheduler):
        raise UserError(
            f"teacher: an EDM student can be exported only from a teacher saved with CMStochasticIterativeScheduler "
            f"(time label 250 ln sigma), not {type(family.scheduler).__name__}"
        )


def _vp(scheduler: Any, kind: PredictionType, table: Tensor, sampler: FewStepSampler) -> Any:
    """LCM, DDIM, TCD or Euler on the schedule's ``table`` of alphas_cumprod, or on its beginning."""
    config, steps = scheduler.config, sampler.steps
    common = _common(kind)
    settings: dict[str, Any]
    common["set_alpha_to_one"] = sampler.final == "clean"
    match sampler.transition:
        case "renoise":
            stock, settings = LCMScheduler, {"original_inference_steps": steps, "timestep_scaling": TIMESTEP_SCALING}
        case "ode":
            stock, settings = DDIMScheduler, {"timestep_spacing": "trailing"}
        case "tcd":
            stock, settings = TCDScheduler, {"original_inference_steps": steps}
        case "ancestral":
            stock, settings = EulerAncestralDiscreteScheduler, {"timestep_spacing": "trailing"}
            common = {k: common[k] for k in ("steps_offset", "prediction_type")}
    length = int(sampler.times[0]) + 1 if steps == 1 else (int(sampler.times[0]) + 1) // steps * steps
    if length == len(table):
        same = {k: config[k] for k in ("beta_start", "beta_end", "beta_schedule", "trained_betas") if k in config}
        same["rescale_betas_zero_snr"] = bool(config.get("rescale_betas_zero_snr", False))
        with contextlib.suppress(NotImplementedError):  # a beta schedule that only the teacher's own class knows
            whole = stock(num_train_timesteps=len(table), **same, **common, **settings)
            if torch.equal(whole.alphas_cumprod.double(), table):
                return whole
    betas = scheduler.betas[:length].tolist()
    exact = stock(num_train_timesteps=length, trained_betas=betas, **common, **settings)
    if torch.equal(exact.alphas_cumprod.double(), table[:length]):
        return exact
    return stock(num_train_timesteps=length, trained_betas=betas_of(table[:length]), **common, **settings)


def betas_of(alphas_cumprod: Tensor) -> list[float]:
    """Betas whose products, as stock schedulers take them, are ``alphas_cumprod`` (T,): each corrects for how far the
    rounding of those before it to float32 has led the product away."""
    product, betas = 1.0, []
    for target in alphas_cumprod.tolist():
        beta = torch.tensor(1 - target / product if product else 1.0, dtype=torch.float32)
        product *= float(1 - beta)
        betas.append(float(beta))
    return betas


def _common(kind: PredictionType) -> dict[str, Any]:
    names = {kind: name for name, kind in DIFFUSERS_PREDICTION_TYPES.items()}
    return {
        "steps_offset": 1,  # Stable Diffusion's pipelines rewrite any other value; none of ours uses it
        "clip_sample": False,
        "set_alpha_to_one": True,
        "prediction_type": names[kind],
    }


def _signal_lcm(kind: PredictionType, alpha_cumprod: float, label: int) -> LCMScheduler:
    """One step at timestep ``label`` where alphas_cumprod is that of the schedule's last timestep."""
    betas = betas_with_product(alpha_cumprod, label + 1)
    settings = {"original_inference_steps": 1, "timestep_scaling": TIMESTEP_SCALING}
    return LCMScheduler(num_train_timesteps=len(betas), trained_betas=betas, **settings, **_common(kind))


def betas_with_product(product: float, count: int) -> list[float]:
    """``count`` betas with ``prod(1 - beta) = product``, spread evenly so that float32 holds it.

    Where ``product`` is tiny even that is too coarse (a float32 beta near 1 leaves 1 - beta in steps of 6e-8), so of
    pairs of the last two the best is taken.
    """
    if product == 0 or count == 1:
        return [0.0] * (count - 1) + [1 - product]
    even = torch.tensor(1 - product ** (1 / count), dtype=torch.float32)
    before = float(1 - even) ** (count - 2)
    first = (even.double() + torch.arange(-2000, 2001) * 2.0**-24).clamp(0, 1 - 2.0**-24).float()
    last = (1 - product / before / (1 - first).double()).clamp(0, 1).float()
    error = (before * (1 - first).double() * (1 - last).double() - product).abs()
    best = int(error.argmin())
    return [float(even)] * (count - 2) + [float(first[best]), float(last[best])]
