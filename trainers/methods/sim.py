"""SIM, score implicit matching (2410.16794), and SiD, score identity distillation (2404.04057).

Student: the mean of ``-w(t) d'(y)^T residual`` with ``y = s_fake - s_teacher``, ``residual = s_fake + eps/sigma`` at
x_t (``stepdistill.objectives.score_divergence``).  The gradient flows from x_t through teacher, fake score and the
normaliser in d' into the sample; both networks' parameters stay as they are.  So three networks' activations are held:
``train.gradient_checkpointing`` is for this method.
Fake score: denoising on the student's samples, without guidance.
One fake-score update for each student update, with fresh time and noise for either.  SiD's code updates the fake score
first, on samples of its own (``first: fake_score``); the default here is DMD2's order, the student first, which saves a
pass.

``objective``: ``sim``, ``full`` (``+ w d(y)``: the sampling law is followed too) or ``sid`` with ``sid_alpha``, where
1 is half of SIM with the squared distance and 1/2 half of its full form.

The authors published no training code, and the paper's c, w(t), time law and text-to-image settings could not be
verified.  Defaults are their group's nearest public recipe (SiD's for EDM): levels up to 800 of 1000 of Karras' grid
for the student, a lognormal noise level for the fake score of an EDM teacher; c after 2310.14189 (0.00054 sqrt(D), in
x0); batch and rates are the config's.  The generator is called at ``sampler.init_sigma`` = 2.5 there.  On VP schedules
that is the timestep of this sigma/alpha, fed with noise of unit variance as every stock scheduler feeds it.

Departures from SiD's code: the loss is a mean over elements too (a constant factor, which Adam does not see); values
that are not finite are counted and skipped, never replaced; no augmentation and no dropout; gradients are clipped
(there only in fp16); ``train.ema_decay`` has the ramp of :class:`stepdistill.roles.ema.EMA` and not SiD's, a
half-life that grows with the samples seen.  SiD-LSG weighs the fake score's v error by SNR / (SNR + 1), which is
``fake_score_target: eps``, and guides the fake score too, which is not offered.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.config import Section
from stepdistill.errors import UserError
from stepdistill.objectives.score_divergence import (
    Distance,
    PseudoHuber,
    Space,
    SquaredL2,
    full_loss,
    score_terms,
    sid_loss,
    sid_weight,
    sim_loss,
)
from stepdistill.settings import RunSettings

from .base import Batch, Losses, Needs, Passes
from .score import ScoreMethod, ScoreSettings


class LognormalSettings(Section):
    """``ln(sigma/alpha) ~ N(mean, std^2)`` (2206.00364, table 1)."""

    mean: float = -1.2
    std: float = Field(1.2, gt=0)


class SIMSettings(ScoreSettings):
    min_level: int = Field(
        0, ge=0, le=999, description="the student's levels, in thousandths, are uniform from this (0; SD: 20)"
    )
    max_level: int = Field(800, ge=0, le=999, description="to this (SiD's tmax 800; on Stable Diffusion 979)")
    objective: Literal["sim", "full", "sid"] = "sim"
    sid_alpha: float = Field(1.2, description="of objective sid: 1.2 in SiD, 1 in SiD-LSG and SIM's squared distance")
    distance: Literal["pseudo_huber", "squared_l2"] = Field("pseudo_huber", description="d; sid has its own")
    space: Space = Field("x0", description="where y, and so c, is measured: x0 or score (sigma^2/alpha apart)")
    c: float | None = Field(None, gt=0, description="of pseudo_huber, in that space; 0.00054 sqrt(D) in x0 by default")
    weight: Literal["one", "sid"] = Field("one", description="sid: over the sample's mean |x0 - m_teacher|")
    fake_score_law: Literal["uniform"] | LognormalSettings = Field(
        "uniform",
        description="uniform in its levels (fake_score_min_level..), or {mean, std} of ln sigma/alpha (EDM: -1.2, 1.2)",
    )


class SIM(ScoreMethod):
    name = "sim"
    title = "score implicit matching, and SiD: the gradient goes through both scores (2410.16794, 2404.04057)"
    Settings = SIMSettings
    settings: SIMSettings

    @classmethod
    def needs(cls, config: RunSettings) -> Needs:
        settings = cls.settings_of(config)
        huber = settings.objective != "sid" and settings.distance == "pseudo_huber"
        if settings.c is not None and not huber:
            raise UserError("sim.c is of distance = pseudo_huber with objective sim or full; remove it")
        if huber and settings.space == "score" and settings.c is None:
            raise UserError("sim.space = score: c has no default in this space; set sim.c")
        levels = settings.fake_score_min_level, settings.fake_score_max_level
        if settings.fake_score_law != "uniform" and levels != (0, 999):
            raise UserError(
                "sim.fake_score_min_level and fake_score_max_level are of fake_score_law = uniform; remove them"
            )
        return super().needs(config)

    @classmethod
    def passes(cls, config: RunSettings) -> Passes:
        """2 more than a score method: back through teacher and fake score, and through the null branch once more."""
        passes, guidance = super().passes(config), float(cls.settings_of(config).guidance_scale != 1)
        return replace(passes, per_update=passes.per_update + 2 + guidance)

    @property
    def distance(self) -> Distance:
        if self.settings.distance == "squared_l2":
            return SquaredL2()
        c = self.settings.c
        return PseudoHuber(0.00054 * torch.Size(self.family.sample_shape).numel() ** 0.5 if c is None else c)

    def student_losses(self, x0: Tensor, batch: Batch) -> Losses:
        settings, pair = self.settings, self.predict_both(x0, batch.condition)
        y, residual = score_terms(pair.teacher, pair.fake_score, x0, settings.space)
        match settings.objective:
            case "sim":
                losses = sim_loss(y, residual, self.distance)
            case "full":
                losses = full_loss(y, residual, self.distance)
            case "sid":
                losses = sid_loss(y, residual, settings.sid_alpha)
        if settings.weight == "sid":
            losses = losses * sid_weight(x0, pair.teacher.x0)
        return {settings.objective: (1.0, losses.mean() / x0[0].numel())}

    def fake_score_draw(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        law = self.settings.fake_score_law
        if law == "uniform":
            return super().fake_score_draw(x0)
        ratio = (law.mean + law.std * self.noise.randn(len(x0)).double()).exp()
        return self.roles.student.schedule.at_noise_ratio(ratio), self.noise.randn_like(x0)
