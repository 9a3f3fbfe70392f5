"""One-step enhancement by score distillation: Hyper-SD's third part (2404.13686 section 3.3).

DMD2's objective (its section, its loop, its fake score) on the student's first step alone, plus a squared error that
holds it near where the stage began, plus rewards as in ``feedback``:

    L = L_DM (+ w_g L_G) + mse_weight E|x0 - x0_ref|^2 + sum_d weight_d E[ReLU(a_d - r_d)]

``sampler.start`` is 999 for the unified LoRA and 800 for the dedicated one-step student (pure noise under the label
800, whose output is less amplified).  The exported student has all of the sampler's steps; the others are not touched
by this stage but through the shared weights, and ``hold_weight`` keeps them: the squared error to the student as the
stage began, at noised samples of its own at the other steps' times.  Beyond the paper, ``train_steps: all`` enhances
them too: every update draws one step of one of the numbers of steps, all alike, by DMD2's backward simulation.

The paper gives neither the weight nor the target of its MSE term.  Here x0_ref is the student as the stage began, from
the same noise in ``reference_steps`` steps (1: no drift; more: its own few-step picture).  Which model scores the real
side is ambiguous there: ``teacher: base``, or ``previous_stage`` for the consistency model that the stage begins with.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.config import Section, UserPath
from stepdistill.errors import UserError
from stepdistill.judges.rewards import RewardSettings
from stepdistill.sampler import FewStepSampler
from stepdistill.settings import RunSettings

from .base import Batch, Losses, Needs, Parts, Passes, Term
from .dmd2 import DMD2, DMD2Settings
from .feedback import reward_losses
from .score import Samples
from .teachers import AskedTeacher


class EnhanceSettings(Section):
    train_steps: Literal["first", "all"] = Field("first", description="the first step alone, or any of any number")
    mse_weight: float = Field(0.0, ge=0, description="of the squared error to x0_ref; 0 is none")
    reference_steps: int = Field(1, ge=1, le=64, description="steps of the student as the stage began that make x0_ref")
    hold_weight: float = Field(0.0, ge=0, description="of the squared error at the other steps' times; 0 is none")
    teacher: Literal["base", "previous_stage"] = Field("base", description="whose score is the real one")
    rewards: list[RewardSettings] = []
    decoder: UserPath | None = Field(
        None, description="an AutoencoderTiny for the teacher's latents; its own by default"
    )


class Enhance(DMD2):
    name = "enhance"
    title = "one-step enhancement: dmd2 on the first step, with an MSE term and rewards (2404.13686)"

    def __init__(self, parts: Parts):
        settings = parts.config.enhance
        self.start = None
        if settings.mse_weight or settings.hold_weight or settings.teacher == "previous_stage":
            self.start = parts.roles.frozen_like(parts.roles.student, "stage_start")
        super().__init__(parts, AskedTeacher(self.start) if settings.teacher == "previous_stage" else None)
        self.enhance = settings
        if self.start is not None:
            self.frozen["stage_start"] = self.start

    @classmethod
    def sections(cls, raw: dict[str, Any]) -> dict[str, type[Section]]:
        return {"enhance": EnhanceSettings, "dmd2": DMD2Settings}

    @classmethod
    def settings_of(cls, config: RunSettings) -> Section:
        return config.dmd2

    @classmethod
    def needs(cls, config: RunSettings) -> Needs:
        needs = super().needs(config)
        settings, steps = config.enhance, config.sampler.steps
        if config.dmd2.multistep_input == "real":
            raise UserError("dmd2.multistep_input = real: enhance trains the first step alone; remove it")
        if steps % settings.reference_steps:
            raise UserError(
                f"enhance.reference_steps = {settings.reference_steps}: not a divisor of sampler.steps = {steps}"
            )
        if settings.mse_weight and settings.train_steps == "all":
            raise UserError("enhance.mse_weight: its reference starts from pure noise; with train_steps = all set 0")
        if settings.hold_weight and steps == 1:
            raise UserError("enhance.hold_weight: a student of one step has no others to hold; remove it")
        return replace(needs, rewards=tuple(settings.rewards), pixels=True, decoder=settings.decoder)

    @classmethod
    def passes(cls, config: RunSettings) -> Passes:
        """DMD2's for one step, x0_ref, and 4 where the other steps are held (its input's pass goes with them)."""
        passes, settings = super().passes(config), config.enhance
        samples, counts = config.dmd2.samples_per_update, cls.counts(config)
        rollouts = samples * (config.sampler.steps - 1) / 2
        rollouts -= samples * sum(steps * (steps - 1) / 2 for steps in counts) / sum(counts)
        reference = settings.reference_steps if settings.mse_weight else 0
        held = 4 if settings.hold_weight else 0
        return replace(passes, per_update=passes.per_update - rollouts + reference + held)

    @property
    def first_step(self) -> FewStepSampler:
        return self.sampler.in_steps(1)

    @classmethod
    def counts(cls, config: RunSettings) -> list[int]:
        """The numbers of steps that are trained."""
        sampler = config.sampler
        return [*sampler.also_steps, sampler.steps] if config.enhance.train_steps == "all" else [1]

    @torch.no_grad()
    def student_input(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Pure noise at the first time, or the input of a step of a rollout in one of the numbers of steps."""
        if self.enhance.train_steps == "all":
            counts = self.counts(self.config)
            draw = self.noise.shared_randint(0, sum(counts) - 1)
            steps = next(n for n, last in zip(counts, accumulate(counts), strict=True) if draw < last)
            return self.simulated_input(self.sampler.in_steps(steps), batch)
        return self.first_step.start(batch.noise), self.first_step.time(0, batch.noise)

    def student_losses(self, x0: Tensor, batch: Batch) -> Losses:
        losses = super().student_losses(x0, batch)
        if self.enhance.mse_weight:
            losses["mse"] = (self.enhance.mse_weight, (x0 - self.reference(batch)).square().mean())
        if self.parts.rewards:
            losses |= reward_losses(self, self.parts.rewards, self.parts.decode(x0), batch.items)
        return losses

    @torch.no_grad()
    def reference(self, batch: Batch) -> Tensor:
        """x0_ref (B, ...)."""
        sampler = self.sampler.in_steps(self.enhance.reference_steps)
        return sampler.sample(self.start, batch.noise, batch.condition, self.noise.randn_like)

    def more_student_terms(self, samples: Samples) -> Iterator[Term]:
        """Hold the other steps: ``|student - start|^2`` in x0 at the samples just made, noised to one of the times."""
        weight = self.enhance.hold_weight
        if not weight:
            return
        for batch, x0 in samples:
            index = self.noise.shared_randint(1, self.sampler.steps - 1)
            t = self.sampler.time(index, x0)
            x_t = self.roles.student.schedule.add_noise(x0, self.noise.randn_like(x0), t)
            with torch.no_grad():
                x0_start = self.start(x_t, t, batch.condition).x0
            loss = (self.roles.student(x_t, t, batch.condition).x0 - x0_start).square().mean()
            self.log("loss/hold", loss)
            yield Term(weight * loss)
