"""Teacher score matching: a student smaller than its teacher learns its scores first (MSD, 2410.23274, stage 0).

    L = E lambda_t |mu_student(x_t, t, c) - mu_teacher(x_t, t, c)|^2,   x_t a real image noised to a random level

A narrower network cannot take the teacher's weights, and score distillation from random ones does not converge
properly; after this stage it is a small multi-step model whose weights start the one-step student (``roles.network``
says its size).  lambda_t is that of the teacher's own training: the squared error of its own prediction (eps, v, flow),
and ``sigma^-2 + sigma_data^-2`` on x0 for EDM.  For a teacher that is the posterior mean this loss has the gradient of
denoising on the data, with less variance, and its optimum is 0 for a large enough student.

Not known from the sources at hand: the stage's length, its rate, and whether its images are a part's own or all
(``images: all``, one run for all students, is the cheaper reading).  The target is the teacher's conditional
prediction; ``guidance_scale`` bakes guidance in.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from stepdistill.config import Section
from stepdistill.denoiser import guided
from stepdistill.errors import UserError
from stepdistill.objectives.denoising import denoising_loss
from stepdistill.settings import RunSettings

from .base import Batch, DirectMethod, Losses, Needs, Passes


class TSMSettings(Section):
    guidance_scale: float = Field(1.0, ge=0, description="of the teacher's prediction; 1 is none")
    images: Literal["all", "own"] = Field("all", description="of several students: every image, or those of its part")
    min_level: int = Field(0, ge=0, le=999, description="lowest noise level, in thousandths of the schedule")
    max_level: int = Field(999, ge=0, le=999, description="highest level, included, in thousandths")

    @model_validator(mode="after")
    def _levels(self):
        if self.min_level > self.max_level:
            raise ValueError(f"min_level = {self.min_level} is above max_level = {self.max_level}")
        return self


class TSM(DirectMethod):
    name = "tsm"
    title = "teacher score matching: the first stage of a student smaller than its teacher (2410.23274)"
    Settings = TSMSettings
    settings: TSMSettings

    @classmethod
    def needs(cls, config: RunSettings) -> Needs:
        if config.data.images is None:
            raise UserError("method = tsm matches scores on noised real images: set data.images (folder, npz, dataset)")
        settings = config.tsm
        return Needs(images=True, divides_images=settings.images == "own", null_condition=settings.guidance_scale != 1)

    @classmethod
    def passes(cls, config: RunSettings) -> Passes:
        """The student's three, and the teacher's, guided."""
        return Passes(4.0 + (config.tsm.guidance_scale != 1))

    def next_batch(self) -> Batch:
        return self.next_real_batch()

    def student_losses(self, batch: Batch) -> Losses:
        settings, schedule = self.settings, self.roles.student.schedule
        t = self.draw_time(settings.min_level, settings.max_level, len(batch))
        x_t = schedule.add_noise(batch.real, batch.noise, t)
        null = self.family.null_condition(len(batch)) if settings.guidance_scale != 1 else None
        with torch.no_grad():
            teacher = guided(self.roles.teacher, x_t, t, batch.condition, null, settings.guidance_scale)
        prediction = self.roles.student(x_t, t, batch.condition)
        return {"score_matching": (1.0, denoising_loss(prediction, teacher.x0, teacher.eps, prediction.kind))}
