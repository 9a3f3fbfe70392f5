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

from itertools import accumulate
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.config import Section, UserPath
from stepdistill.errors import UserError
from stepdistill.judges.rewards import RewardSettings, load_rewards
from stepdistill.sampler import FewStepSampler
from stepdistill.settings import RunSettings
from stepdistill.trainers.loop.trainer import Batch, Losses

from .dmd2 import DMD2, DMD2Settings
from .feedback import reward_losses
from .score import Samples


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
    start: Any = None

    @classmethod
    def sections(cls) -> dict[str, type[Section]]:
        return {"enhance": EnhanceSettings, "dmd2": DMD2Settings}

    @classmethod
    def settings_of(cls, config: RunSettings) -> Section:
        return config.dmd2

    @classmethod
    def check(cls, config: RunSettings, settings: DMD2Settings) -> None:
        super().check(config, settings)
        own, steps = config.enhance, config.sampler.steps
        if settings.multistep_input == "real":
            raise UserError("dmd2.multistep_input = real: enhance trains the first step alone; remove it")
        if steps % own.reference_steps:
            raise UserError(
                f"enhance.reference_steps = {own.reference_steps}: not a divisor of sampler.steps = {steps}"
            )
        if own.mse_weight and own.train_steps == "all":
            raise UserError("enhance.mse_weight: its reference starts from pure noise; with train_steps = all set 0")
        if own.hold_weight and steps == 1:
            raise UserError("enhance.hold_weight: a student of one step has no others to hold; remove it")

    @classmethod
    def passes_per_update(cls, config: RunSettings, settings: DMD2Settings) -> float:
        """DMD2's for one step, x0_ref, and 4 where the other steps are held (its input's pass goes with them)."""
        own, samples = config.enhance, settings.samples_per_update
        rollouts = samples * (config.sampler.steps - 1) / 2
        counts = cls.counts(config)
        rollouts -= samples * sum(steps * (steps - 1) / 2 for steps in counts) / sum(counts)
        reference = own.reference_steps if own.mse_weight else 0
        return super().passes_per_update(config, settings) - rollouts + reference + (4 if own.hold_weight else 0)

    def build(self) -> None:
        super().build()
        own = self.config.enhance
        self.rewards = load_rewards(own.rewards, self.family.device)
        self.decode = self.family.decoder(own.decoder)
        if own.mse_weight or own.hold_weight or own.teacher == "previous_stage":
            self.start = self.roles.frozen_like(self.roles.student, "stage_start")
        if own.teacher == "previous_stage":
            self.roles.teacher = self.start

    @property
    def first_step(self) -> FewStepSampler:
        return self.sampler.in_steps(1)

    @classmethod
    def counts(cls, config: RunSettings) -> list[int]:
        """The numbers of steps that are trained."""
        own = config.sampler
        return [*own.also_steps, own.steps] if config.enhance.train_steps == "all" else [1]

    @torch.no_grad()
    def student_input(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Pure noise at the first time, or what a rollout in one of the numbers of steps meets."""
        if self.config.enhance.train_steps == "all":
            counts = self.counts(self.config)
            draw = self.noise.shared_randint(0, sum(counts) - 1)
            steps = next(n for n, last in zip(counts, accumulate(counts), strict=True) if draw < last)
            return self.simulated_input(self.sampler.in_steps(steps), batch)
        return self.first_step.start(batch.noise), self.first_step.time(0, batch.noise)

    def student_losses(self, x0: Tensor, batch: Batch) -> Losses:
        own, losses = self.config.enhance, super().student_losses(x0, batch)
        if own.mse_weight:
            losses["mse"] = (own.mse_weight, (x0 - self.reference(batch)).square().mean())
        if self.rewards:
            losses |= reward_losses(self, self.rewards, self.decode(x0), batch.items)
        return losses

    @torch.no_grad()
    def reference(self, batch: Batch) -> Tensor:
        """x0_ref (B, ...)."""
        sampler = self.sampler.in_steps(self.config.enhance.reference_steps)
        return sampler.sample(self.start, batch.noise, batch.condition, self.noise.randn_like)

    def before_student_update(self, samples: Samples) -> None:
        """Hold the other steps: ``|student - start|^2`` in x0 at the samples just made, noised to one of the times."""
        weight = self.config.enhance.hold_weight
        for batch, x0 in samples if weight else ():
            index = self.noise.shared_randint(1, self.sampler.steps - 1)
            t = self.sampler.time(index, x0)
            x_t = self.roles.student.schedule.add_noise(x0, self.noise.randn_like(x0), t)
            with torch.no_grad():
                aim = self.start(x_t, t, batch.condition).x0
            loss = (self.roles.student(x_t, t, batch.condition).x0 - aim).square().mean()
            self.log("loss/hold", loss)
            (weight * loss / len(samples)).backward()

    # -- checkpoints ---------------------------------------------------------------------------------------

    def state(self):
        tensors, meta = super().state()
        return ({**tensors, "stage_start": self.start.state_dict()} if self.start else tensors), meta

    def restore(self, tensors, meta, where: str) -> None:
        super().restore(tensors, meta, where)
        if self.start is not None:
            self.start.load_state_dict(tensors.get("stage_start", {}))
