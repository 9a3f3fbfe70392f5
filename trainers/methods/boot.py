"""BOOT (Gu et al., 2306.05544): data-free distillation by bootstrapping the signal along the teacher's trajectories.

The student y(eps, t, c) always sees the trajectory's starting noise; t is a label.  It says the signal
``y_t = (x_t - sigma_t eps) / alpha_t`` of the point that the teacher's deterministic trajectory from eps passes at t,
and is read at the lowest label, where the signal is the sample.  Two losses, with f the (guided) teacher's x0:

    L_BS = E |y(eps, s) - SG[y_t + w (f(alpha_t y_t + sigma_t eps, t) - y_t)]|^2 / max(w^2, floor),  y_t = y(eps, t)
    L_BC = E |y(eps, T) - SG f(eps, T)|^2,   w = 1 - alpha_t sigma_s / (sigma_t alpha_s)
    L = L_BS + boundary_weight L_BC

s is drawn first and ``t = min(s + delta, T)``.  (With t drawn first and ``s = t - delta`` no label between T - delta
and T is ever trained.)  The fixed point is the DDIM recursion from ``y_T = f(eps, T)`` in steps of delta; w in place of
the paper's ``delta lambda'_t`` makes each step exactly DDIM's.  ``solver: heun`` takes a second-order step instead
(``Schedule.trapezoid_step``, in x, then read as a signal).

The floor does not move the fixed point but weighs the labels: where t is clipped to T the steps are tiny, and with a
floor of 1e-4 the labels next to T hold half of the loss on Stable Diffusion's schedule; on a 2-D mixture 0.1 brought
the error at the lowest label from 0.11 to 0.065.

The student is a copy of the teacher whose output is read with the coefficients of T for every label
(``Role.signal``), so it starts with the boundary loss at 0.

No official code exists, and the paper's delta, weights, optimiser and guidance scales could not be verified: defaults
are those of the nearest public code (OFTSR: delta 0.05, boundary weight 0.1), whose other loss of this name, which
bootstraps towards the next state in place of the clean prediction, does not converge to the teacher.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stepdistill.config import Section
from stepdistill.denoiser import Condition, guided
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.objectives.bootstrapping import bootstrap_loss, signal_target
from stepdistill.sampler import FewStepSampler, SignalSampler
from stepdistill.schedule import Schedule
from stepdistill.settings import RunSettings

from .base import Batch, DirectMethod, Losses, Needs, Passes

BINS = 4
"""Spans of the labels whose loss is logged by itself: what is learnt moves from T downwards."""


class BOOTSettings(Section):
    guidance_scale: float = Field(1.0, ge=1, description="of the teacher, in both losses; 1 is none; baked in")
    delta: int = Field(50, ge=1, le=999, description="from s up to t, in thousandths of the schedule")
    min_level: int = Field(1, ge=0, le=998, description="the lowest label, where the student is read, in thousandths")
    boundary_weight: float = Field(0.1, ge=0, description="of L_BC")
    weight_floor: float = Field(0.1, gt=0, description="of w^2 in the loss's weight 1/w^2")
    solver: Literal["euler", "heun"] = Field("euler", description="the teacher's step: DDIM's, or second order")
    progressive: int = Field(
        0,
        ge=0,
        le=10**9,
        description="student updates over which the range of s grows from T down to min_level; 0: all at once",
    )

    @model_validator(mode="after")
    def _some_room(self):
        if self.min_level + self.delta > 999:
            raise ValueError(
                f"delta = {self.delta} above min_level = {self.min_level} leaves the schedule's 1000 thousandths"
            )
        return self


def lowest_level(settings: BOOTSettings, schedule: Schedule) -> int:
    """The level of ``min_level``; on a VP schedule of few timesteps it is 1 where that would be timestep 0."""
    return max(schedule.level_of(settings.min_level), schedule.lowest_student_level)


class BOOT(DirectMethod):
    name = "boot"
    title = "bootstrapping along the teacher's ODE, without data; one step (2306.05544)"
    Settings = BOOTSettings
    settings: BOOTSettings

    @classmethod
    def needs(cls, config: RunSettings) -> Needs:
        sampler = config.sampler
        if sampler.steps != 1 or sampler.start is not None or sampler.init_sigma is not None:
            raise UserError("method = boot has one step from pure noise; remove sampler.steps, start and init_sigma")
        return Needs(null_condition=config.boot.guidance_scale != 1)

    @classmethod
    def check(cls, config: RunSettings, family: Family) -> list[str]:
        settings, schedule = config.boot, family.schedule
        if settings.min_level < schedule.lowest_student_level:
            raise UserError("boot.min_level = 0: the stock scheduler cannot be told timestep 0; set 1 or more")
        if lowest_level(settings, schedule) >= schedule.num_levels - 1:
            raise UserError(
                f"boot.min_level = {settings.min_level}: leaves no label above it among the teacher's "
                f"{schedule.num_levels} levels; lower it"
            )
        return []

    @classmethod
    def make_sampler(cls, config: RunSettings, family: Family) -> FewStepSampler:
        level = torch.tensor([lowest_level(config.boot, family.schedule)])
        return SignalSampler(family.schedule, (float(family.schedule.level(level)),))

    @classmethod
    def passes(cls, config: RunSettings) -> Passes:
        """The student's three at s and at T, one at t; the teacher's step and its prediction at T, each guided."""
        settings = config.boot
        teacher = 2 + (settings.solver == "heun")
        return Passes(7 + teacher * (1 + (settings.guidance_scale != 1)))

    # -- losses --------------------------------------------------------------------------------------------

    def student_losses(self, batch: Batch) -> Losses:
        level_s, level_t = self.draw_levels(len(batch))
        schedule = self.roles.student.schedule
        s, t = schedule.level(level_s), schedule.level(level_t)
        target = self.bootstrapped(batch, t, s)
        weight = schedule.signal_weight(t, s)
        y_s = self.roles.student.signal(batch.noise, s, batch.condition)
        self._log_bins(level_s, (y_s - target).detach().square().flatten(1).mean(1))
        last = schedule.level(torch.full_like(level_s, schedule.num_levels - 1))
        with torch.no_grad():
            start = self.teacher_x0(batch.noise * schedule.start_scale(last[0].item()), last, batch.condition)
        y_last = self.roles.student.signal(batch.noise, last, batch.condition)
        return {
            "bootstrap": (1.0, bootstrap_loss(y_s, target, weight, self.settings.weight_floor)),
            "boundary": (self.settings.boundary_weight, (y_last - start).square().mean()),
        }

    def draw_levels(self, count: int) -> tuple[Tensor, Tensor]:
        """Levels of s and t (count,), s uniform from the lowest level that is open yet up to the one below T."""
        settings, schedule = self.settings, self.roles.student.schedule
        low, last = lowest_level(settings, schedule), schedule.num_levels - 1
        if settings.progressive:
            low = max(low, round(last - (last - low) * (self.counters["student"] + 1) / settings.progressive))
        level_s = self.noise.randint(min(low, last - 1), last - 1, count)
        return level_s, (level_s + schedule.level_distance(settings.delta)).clamp(max=last)

    def teacher_x0(self, x_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """f: the guided teacher's x0 (B, ...)."""
        scale = self.settings.guidance_scale
        null = None if scale == 1 else self.family.null_condition(len(x_t))
        return guided(self.roles.teacher, x_t, t, condition, null, scale).x0

    @torch.no_grad()
    def bootstrapped(self, batch: Batch, t: Tensor, s: Tensor) -> Tensor:
        """The target at s (B,): the student's own signal at t (B,) moved on by one step of the teacher.

        Nothing in it carries a gradient, the teacher's input included.
        """
        eps, schedule = batch.noise, self.roles.student.schedule
        y_t = self.roles.student.signal(eps, t, batch.condition)
        x_t = schedule.add_noise(y_t, eps, t)
        x0 = self.teacher_x0(x_t, t, batch.condition)
        target = signal_target(y_t, x0, schedule.signal_weight(t, s))
        if self.settings.solver == "euler":
            return target
        x_s = schedule.add_noise(target, eps, s)
        x0_at_s = self.teacher_x0(x_s, s, batch.condition)
        return schedule.to_signal(schedule.trapezoid_step(x_t, t, s, x0, x0_at_s, x_s), eps, s)

    def _log_bins(self, level: Tensor, error: Tensor) -> None:
        """The mean error of each span of labels that was drawn, noise last."""
        span = self.roles.student.schedule.num_levels / BINS
        for index in range(BINS):
            inside = (level >= index * span) & (level < (index + 1) * span)
            if bool(inside.any()):
                self.log(f"bootstrap_error/{index + 1}_of_{BINS}", error[inside].mean())
