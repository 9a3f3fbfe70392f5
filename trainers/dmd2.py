"""DMD2 (Yin et al., 2405.14867), on DMD (2311.18828).

Student: ``L = L_DM + w_g E[softplus(-D(x_t))]`` with the distribution-matching gradient
``g = (m_fake - m_teacher) / mean |x0 - m_teacher|`` at a random level (the teacher guided, the fake score not).
Fake score: denoising on the student's samples, plus ``w_d (softplus(D(fake_t)) + softplus(-D(real_t)))``; the
discriminator D is a head on the fake score's own mid-block, so that loss trains the fake score's encoder too.
``fake_score_updates`` fake-score updates for each student update.

Several steps: the student's input at step k is made by its own earlier steps from fresh noise (backward simulation),
the step is one draw for all samples and processes, and the gradient passes through that one step.

Departures from the released code, all stated where they happen: warm-up is counted in a role's own updates; times of
an N-step student are those a stock scheduler can be configured to give; a guidance scale below 1 is refused rather than
read as 1; non-finite gradients are counted and skipped, never replaced; all passes of a run share one precision.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from stepdistill.trainers.base import Batch
from stepdistill.trainers.score import ScoreTrainer
from torch import Tensor

from stepdistill.config import Section
from stepdistill.denoiser import Condition, guided
from stepdistill.discriminator import DiscriminatorHead
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.objectives.adversarial import discriminator_loss, generator_loss
from stepdistill.objectives.denoising import denoising_loss
from stepdistill.objectives.distribution_matching import distribution_matching_gradient, distribution_matching_loss
from stepdistill.settings import RunSettings


class GANSettings(Section):
    """The discriminator's part; off while ``student_weight`` is 0."""

    student_weight: float = Field(0.0, ge=0, description="w_g: 3e-3 ImageNet, 1e-3 SD1.5, 5e-3 SDXL; 0 turns it off")
    discriminator_weight: float = Field(1e-2, gt=0, description="w_d, in the fake score's loss")
    max_level: int = Field(999, ge=0, le=999, description="its inputs are noised at levels 0..this")
    noised: bool = Field(True, description="false: the discriminator sees clean samples at the lowest level")


class DMD2Settings(Section):
    guidance_scale: float = Field(1.0, ge=1, description="of the teacher; 1 is none; baked into the student")
    fake_score_updates: int = Field(5, ge=1, description="per student update: 5 ImageNet and SDXL, 10 SD1.5")
    min_level: int = Field(
        20, ge=0, le=999, description="lowest level (of 1000) where student and teacher are compared"
    )
    max_level: int = Field(980, ge=0, le=999, description="highest level, included")
    fake_score_max_level: int = Field(999, ge=0, le=999, description="the fake score is trained at levels 0..this")
    fake_score_target: Literal["native", "eps", "v", "x0", "flow"] = Field(
        "native", description="what its squared error is taken of; native: the network's own prediction (DMD2: eps)"
    )
    multistep_input: Literal["simulation", "real"] = Field(
        "simulation", description="an N-step student's training inputs: its own earlier steps, or noised real samples"
    )
    gan: GANSettings = GANSettings()

    @model_validator(mode="after")
    def _levels(self):
        if self.min_level > self.max_level:
            raise ValueError(f"min_level = {self.min_level} is above max_level = {self.max_level}")
        return self


class DMD2(ScoreTrainer):
    name = "dmd2"
    title = "distribution matching, two time scales, optional GAN; one or more steps (2405.14867)"
    Settings = DMD2Settings
    settings: DMD2Settings

    @classmethod
    def wants_images(cls, settings: DMD2Settings) -> bool:
        return settings.gan.student_weight > 0 or settings.multistep_input == "real"

    @classmethod
    def check(cls, config: RunSettings, settings: DMD2Settings) -> None:
        if cls.wants_images(settings) and config.data.images is None:
            key = "gan.student_weight > 0" if settings.gan.student_weight > 0 else "multistep_input = real"
            raise UserError(f"dmd2.{key} needs real images: set data.images (folder, npz or dataset)")
        if settings.multistep_input == "real" and config.sampler.steps == 1:
            raise UserError("dmd2.multistep_input = real needs sampler.steps above 1: one step starts at pure noise")

    @classmethod
    def check_family(cls, settings: DMD2Settings, family: Family) -> None:
        if settings.guidance_scale != 1:
            family.null_condition(1)

    def build(self) -> None:
        if self.settings.gan.student_weight == 0:
            return
        with torch.no_grad(), torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            batch = self.conditions.batch(0, 1)
            probe = torch.zeros(1, *self.family.sample_shape, device=self.family.device)
            features = self.roles.fake_score.features(probe, self.draw_level(0, probe), batch)
            head = DiscriminatorHead(*features.shape[1:]).to(self.family.device)
            self.roles.meter.forward = 0
        self.extra["discriminator"] = head

    def draw_level(self, level: int, like: Tensor) -> Tensor:
        """The time of one noise level for each sample of ``like``, (B,)."""
        return self.roles.student.schedule.level(torch.full((len(like),), level, device=like.device))

    @property
    def fake_score_updates(self) -> int:
        return self.settings.fake_score_updates

    # -- samples -------------------------------------------------------------------------------------------

    def make_sample(self, batch: Batch) -> Tensor:
        x_t, t = self.student_input(batch)
        return self.roles.student(x_t, t, batch.condition).x0

    @torch.no_grad()
    def student_input(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the student is trained on: pure noise, or the input of a random step.

        Backward simulation (2405.14867 section 4.5): the exit step is shared by all; the rollout starts from new noise,
        and the batch's own noise is the last that is added.
        """
        sampler, student = self.sampler, self.roles.student
        if self.settings.multistep_input == "real":
            real, condition = self.next_real(len(batch))
            batch.condition = condition
            index = self.noise.randint(0, sampler.steps - 1, len(batch))
            times = torch.stack([sampler.time(i, batch.noise) for i in range(sampler.steps)])
            t = times.gather(0, index[None])[0]
            x_t = student.schedule.add_noise(real, batch.noise, t)
            first = (index == 0).reshape(-1, 1, 1, 1)
            return torch.where(first, sampler.start(batch.noise), x_t), t
        exit_index = self.noise.shared_randint(0, sampler.steps - 1)
        if exit_index == 0 or sampler.transition == "ode":
            return sampler.rollout(student, batch.noise, batch.condition, exit_index, self.noise.randn_like)
        moves_left = iter(range(exit_index - 1, -1, -1))

        def draw(like: Tensor) -> Tensor:
            return batch.noise if next(moves_left) == 0 else self.noise.randn_like(like)

        fresh = self.noise.randn_like(batch.noise)
        return sampler.rollout(student, fresh, batch.condition, exit_index, draw)

    # -- losses --------------------------------------------------------------------------------------------

    def student_losses(self, x0: Tensor, batch: Batch) -> dict[str, tuple[float, Tensor]]:
        gradient = self.distribution_matching(x0.detach(), batch.condition)
        losses = {"distribution_matching": (1.0, distribution_matching_loss(x0, gradient))}
        gan = self.settings.gan
        if gan.student_weight > 0:
            losses["generator"] = (gan.student_weight, generator_loss(self.logits(x0, batch.condition)))
        return losses

    @torch.no_grad()
    def distribution_matching(self, x0: Tensor, condition: Condition) -> Tensor:
        """g at one draw of level and noise, the same for teacher and fake score."""
        own = self.settings
        t = self.draw_time(own.min_level, own.max_level, len(x0))
        x_t = self.roles.student.schedule.add_noise(x0, self.noise.randn_like(x0), t)
        null = self.family.null_condition(len(x0)) if own.guidance_scale != 1 else None
        teacher_x0 = guided(self.roles.teacher, x_t, t, condition, null, own.guidance_scale).x0
        fake_score_x0 = self.roles.fake_score(x_t, t, condition).x0
        return distribution_matching_gradient(x0, teacher_x0, fake_score_x0)

    def fake_score_losses(self, x0: Tensor, batch: Batch) -> dict[str, tuple[float, Tensor]]:
        own = self.settings
        t = self.draw_time(0, own.fake_score_max_level, len(x0))
        eps = self.noise.randn_like(x0)
        x_t = self.roles.student.schedule.add_noise(x0, eps, t)
        prediction = self.roles.fake_score(x_t, t, batch.condition)
        target = prediction.kind if own.fake_score_target == "native" else own.fake_score_target
        losses = {"denoising": (1.0, denoising_loss(prediction, x0, eps, target))}
        if own.gan.student_weight > 0:
            real, real_condition = self.next_real(len(x0))
            real_logits = self.logits(real, real_condition)
            fake_logits = self.logits(x0, batch.condition)
            losses["discriminator"] = (own.gan.discriminator_weight, discriminator_loss(real_logits, fake_logits))
        return losses

    def logits(self, x0: Tensor, condition: Condition) -> Tensor:
        """The discriminator on ``x0`` (B, C, H, W) noised at a level and noise of its own; (B, 1)."""
        gan = self.settings.gan
        if gan.noised:
            t = self.draw_time(0, gan.max_level, len(x0))
            x_t = self.roles.student.schedule.add_noise(x0, self.noise.randn_like(x0), t)
        else:
            t, x_t = self.draw_level(0, x0), x0
        return self.extra["discriminator"](self.roles.fake_score.features(x_t, t, condition))
