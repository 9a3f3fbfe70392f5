"""DMD2 (Yin et al., 2405.14867), on DMD (2311.18828).

Student: ``L = L_DM + w_g E[softplus(-D(x_t))]`` with the distribution-matching gradient
``g = (m_fake - m_teacher) / mean |x0 - m_teacher|`` at a random level (the teacher guided, the fake score not).
Fake score: denoising on the student's samples, plus ``w_d (softplus(D(fake_t)) + softplus(-D(real_t)))``; the
discriminator D is a head on the fake score's own mid-block, so that loss trains the fake score's encoder too.
``fake_score_updates`` fake-score updates for each student update.

Several steps: the student's input at step k is made by its own earlier steps from fresh noise (backward simulation),
the step is one draw for all samples and processes, and the gradient passes through that one step.

Departures from the released code: warm-up is counted in a role's own updates (there in iterations, over the number of
GPUs); times of an N-step student are those a stock scheduler can be configured to give; a guidance scale below 1 is
refused rather than read as 1; non-finite gradients are counted and skipped, never replaced; all passes of a run share
one precision; prompts are those of ``data`` for any number of steps (there, with backward simulation, the captions of
the real images: ``data.prompts_from_images``).  Its latents of real images are samples of the VAE's posterior, drawn
once; ``data.images.posterior: sample`` draws at every use.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.config import Section
from stepdistill.denoiser import Condition
from stepdistill.errors import UserError
from stepdistill.objectives.adversarial import discriminator_loss, generator_loss
from stepdistill.objectives.distribution_matching import distribution_matching_gradient
from stepdistill.objectives.surrogate import surrogate_loss
from stepdistill.roles.discriminator import DiscriminatorHead
from stepdistill.schedule import per_sample
from stepdistill.settings import RunSettings

from .base import DISCRIMINATOR, Batch, Losses, Needs, Parts, Passes
from .score import ScoreMethod, ScoreSettings
from .teachers import AskedTeacher


class GANSettings(Section):
    """The discriminator's part; off while ``student_weight`` is 0."""

    student_weight: float = Field(0.0, ge=0, description="w_g: 3e-3 ImageNet, 1e-3 SD1.5, 5e-3 SDXL; 0 turns it off")
    discriminator_weight: float = Field(1e-2, gt=0, description="w_d, in the fake score's loss")
    max_level: int = Field(999, ge=0, le=999, description="its inputs are noised at levels 0..this, in thousandths")
    noised: bool = Field(True, description="false: the discriminator sees clean samples at the lowest level")


class DMD2Settings(ScoreSettings):
    fake_score_updates: int = Field(5, ge=1, le=10_000, description="per student update: 5 ImageNet and SDXL, 10 SD1.5")
    multistep_input: Literal["simulation", "real"] = Field(
        "simulation", description="an N-step student's training inputs: its own earlier steps, or noised real samples"
    )
    gan: GANSettings = GANSettings()


class DMD2(ScoreMethod):
    name = "dmd2"
    title = "distribution matching, two time scales, optional GAN; one or more steps (2405.14867)"
    Settings = DMD2Settings
    settings: DMD2Settings

    def __init__(self, parts: Parts, teacher: AskedTeacher | None = None):
        super().__init__(parts, teacher)
        if self.settings.gan.student_weight > 0:
            with torch.random.fork_rng():
                torch.manual_seed(self.config.seed)
                features = self.probe_features(self.roles.fake_score.features, self.level_time(0, 1))
                head = DiscriminatorHead(*features.shape[1:])
            self.networks["discriminator"] = head.to(self.family.device)

    @classmethod
    def needs(cls, config: RunSettings) -> Needs:
        settings = cls.settings_of(config)
        from_real = settings.multistep_input == "real"
        images = settings.gan.student_weight > 0 or from_real
        if images and config.data.images is None:
            key = "gan.student_weight > 0" if settings.gan.student_weight > 0 else "multistep_input = real"
            raise UserError(f"dmd2.{key} needs real images: set data.images (folder, npz or dataset)")
        if from_real and config.sampler.steps == 1:
            raise UserError("dmd2.multistep_input = real needs sampler.steps above 1: one step starts at pure noise")
        return replace(super().needs(config), images=images)

    @classmethod
    def passes(cls, config: RunSettings) -> Passes:
        """With the GAN loss 2 more for the student's logits, 6 more for those of each fake-score update."""
        settings, passes = cls.settings_of(config), super().passes(config)
        gan = 6 * settings.fake_score_updates + 2 if settings.gan.student_weight > 0 else 0
        from_real = settings.multistep_input == "real"
        rollout = settings.samples_per_update * (config.sampler.steps - 1) / 2 if from_real else 0
        return replace(passes, per_update=passes.per_update + gan - rollout)

    def level_time(self, level: int, count: int) -> Tensor:
        """The time of one noise level, (count,)."""
        return self.roles.student.schedule.level(torch.full((count,), level, device=self.family.device))

    def prepare(self, batch: Batch) -> Batch:
        """With ``multistep_input: real`` real samples and their conditions."""
        if self.settings.multistep_input == "simulation":
            return batch
        real = self.next_real(len(batch))
        return replace(batch, condition=real.condition, real=real.samples)

    @torch.no_grad()
    def student_input(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Backward simulation, or with ``multistep_input: real`` noised real samples at a random step's time each."""
        if self.settings.multistep_input == "simulation":
            return super().student_input(batch)
        sampler = self.sampler
        index = self.noise.randint(0, sampler.steps - 1, len(batch))
        times = torch.stack([sampler.time(i, batch.noise) for i in range(sampler.steps)])
        t = times.gather(0, index[None])[0]
        x_t = self.roles.student.schedule.add_noise(batch.real, batch.noise, t)
        first = per_sample(index == 0, x_t)
        return torch.where(first, sampler.start(batch.noise), x_t), t

    # -- losses --------------------------------------------------------------------------------------------

    def student_losses(self, x0: Tensor, batch: Batch) -> Losses:
        gradient = self.distribution_matching(x0.detach(), batch.condition)
        losses = {"distribution_matching": (1.0, surrogate_loss(x0, gradient))}
        gan = self.settings.gan
        if gan.student_weight > 0:
            losses["generator"] = (gan.student_weight, generator_loss(self.logits(x0, batch.condition)))
        return losses

    @torch.no_grad()
    def distribution_matching(self, x0: Tensor, condition: Condition) -> Tensor:
        """g (B, ...) at one draw of level and noise."""
        pair = self.predict_both(x0, condition)
        return distribution_matching_gradient(x0, pair.teacher.x0, pair.fake_score.x0)

    def fake_score_losses(self, x0: Tensor, batch: Batch) -> Losses:
        losses = super().fake_score_losses(x0, batch)
        gan = self.settings.gan
        if gan.student_weight > 0:
            real = self.next_real(len(x0))
            real_logits = self.logits(real.samples, real.condition)
            fake_logits = self.logits(x0, batch.condition)
            losses["discriminator"] = (gan.discriminator_weight, discriminator_loss(real_logits, fake_logits))
        return losses

    def logits(self, x0: Tensor, condition: Condition) -> Tensor:
        """The discriminator on ``x0`` (B, C, H, W) noised at a level and noise of its own draw; (B, 1)."""
        gan = self.settings.gan
        if gan.noised:
            t = self.draw_time(0, gan.max_level, len(x0))
            x_t = self.roles.student.schedule.add_noise(x0, self.noise.randn_like(x0), t)
        else:
            t, x_t = self.level_time(0, len(x0)), x0
        logits = self.networks["discriminator"](self.roles.fake_score.features(x_t, t, condition))
        return self.observe(DISCRIMINATOR, logits)
