"""Diff-Instruct (2305.18455): the integral Kullback-Leibler divergence, without DMD's normaliser.

Student: ``grad = E_t[w(t) (s_fake(x_t) - s_teacher(x_t)) dx_t/dx0 dx0/dtheta]``, the teacher guided where
``guidance_scale`` is not 1.  Fake score: denoising on the student's samples.  One update of either in turn, the fake
score first.

The paper's w(t), levels, rates and order of updates could not be verified: ``weight: sigma2`` is that of variational
score distillation, ``x0`` is DMD's without its normaliser.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.denoiser import Condition
from stepdistill.objectives.integral_kl import Weight, integral_kl_gradient
from stepdistill.objectives.surrogate import surrogate_loss

from .base import Batch, Losses
from .score import ScoreMethod, ScoreSettings


class DiffInstructSettings(ScoreSettings):
    first: Literal["student", "fake_score"] = "fake_score"
    weight: Weight = Field("sigma2", description="w(t): sigma2, x0 (sigma^2/alpha^2) or one")


class DiffInstruct(ScoreMethod):
    name = "diffinstruct"
    title = "integral KL divergence of the noised distributions (2305.18455)"
    Settings = DiffInstructSettings
    settings: DiffInstructSettings

    def student_losses(self, x0: Tensor, batch: Batch) -> Losses:
        return {"integral_kl": (1.0, surrogate_loss(x0, self.integral_kl(x0.detach(), batch.condition)))}

    @torch.no_grad()
    def integral_kl(self, x0: Tensor, condition: Condition) -> Tensor:
        """The gradient in x0 (B, ...) at one draw of level and noise."""
        pair = self.predict_both(x0, condition)
        alpha, sigma = self.roles.student.schedule.alpha_sigma(pair.t)
        return integral_kl_gradient(pair.teacher.x0, pair.fake_score.x0, alpha, sigma, self.settings.weight)
