"""Regression on the teacher's noise-sample pairs: DMD's regression loss alone (2311.18828 section 3.3), as DMD2 uses it
to warm up a one-step student before score distillation (2405.14867, appendix; SDXL from timestep 399).

    L = E distance(decode(G(z)), decode(y)),   y the teacher's deterministic sample of the noise z

``distance``: LPIPS (VGG) on decoded pictures enlarged to at least ``lpips_size``, the papers' choice, or a squared
error on samples.  Pairs are made by ``stepdistill pairs CONFIG``, or when the run starts.  The warm-up of DMD2 on SDXL
is 10,000 pairs at guidance 8, a batch of 256, lr 1e-5, about 2,000 to 3,000 updates.  One of several students sees the
pairs of all (MSD, 2410.23274: with its own alone coverage is lost).  Departures: the samples are of the teacher's DDIM
or Euler steps (DMD's of Heun's or PNDM's), and DMD's own use of this loss, beside the distribution-matching one, is not
here: it is a stage before.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field
from torch import Tensor, nn

from stepdistill.config import Section, UserPath
from stepdistill.data.teacher_pairs import PairPlan, PairRecipe
from stepdistill.errors import UserError
from stepdistill.run import PAIRS
from stepdistill.seeds import RunSeed
from stepdistill.settings import RunSettings

from .base import REAL, Batch, DirectMethod, Losses, Needs, Passes, Phase


class RegressionSettings(Section):
    pairs: UserPath | None = Field(None, description="the folder of the pairs; 'pairs' in the run's by default")
    count: int = Field(10_000, ge=1, le=10**9, description="pairs")
    shard: int = Field(1000, ge=1, le=10**6, description="pairs a file")
    pair_batch: int = Field(64, ge=1, le=65_536, description="pairs made at a time")
    guidance_scale: float = Field(1.0, ge=0, description="of the teacher's samples; baked into the student")
    seed: RunSeed | None = Field(None, description="of the pairs' noise; the run's by default")
    distance: Literal["mse", "lpips"] = "mse"
    lpips_size: int = Field(224, ge=16, le=4096, description="smaller pictures are enlarged to this side for LPIPS")
    decoder: UserPath | None = Field(
        None, description="an AutoencoderTiny for LPIPS on latents; the teacher's by default"
    )


class Regression(DirectMethod):
    name = "regression"
    title = "regression on the teacher's noise-sample pairs: DMD's loss, DMD2's warm-up (2311.18828)"
    Settings = RegressionSettings
    settings: RegressionSettings

    @classmethod
    def needs(cls, config: RunSettings) -> Needs:
        if config.sampler.steps != 1:
            raise UserError("method = regression trains one step; remove sampler.steps")
        settings = config.regression
        lpips = settings.distance == "lpips"
        return Needs(
            null_condition=settings.guidance_scale != 1,
            lpips=lpips,
            pixels=lpips,
            decoder=settings.decoder,
            teacher_pairs=PairPlan(cls.recipe(config), cls.folder(config), settings.pair_batch),
        )

    @classmethod
    def passes(cls, config: RunSettings) -> Passes:
        """The student's three; before them the pairs', as if none were there."""
        settings = config.regression
        return Passes(3.0, settings.count * config.teacher.steps * (1 + (settings.guidance_scale != 1)))

    @classmethod
    def describe(cls, config: RunSettings) -> list[str]:
        count, folder = config.regression.count, cls.folder(config)
        return [f"pairs: {count:,} of {config.teacher.steps} teacher steps each, once, in {folder}"]

    @classmethod
    def recipe(cls, config: RunSettings) -> PairRecipe:
        """What the pairs are made by."""
        settings = config.regression
        seed = config.seed if settings.seed is None else settings.seed
        return PairRecipe(settings.count, settings.shard, config.teacher.steps, settings.guidance_scale, seed)

    @classmethod
    def folder(cls, config: RunSettings) -> Path:
        """Where the pairs are."""
        return Path(config.regression.pairs or Path(config.output) / PAIRS)

    def phases(self) -> list[Phase]:
        begin = self.parts.teacher_pairs.open
        return [Phase(self.name, "student", self.config.train.updates, self.updates, begin)]

    def next_batch(self) -> Batch:
        """The next pairs; ``real`` is the teacher's sample."""
        count = self.config.train.batch_size
        noise, real = self.parts.teacher_pairs.batch(self.parts.shares.take("real", count), count)
        self.observe_condition(real.condition)
        return Batch(real.condition, noise, real.items, self.observe(REAL, real.samples), tuple(real.indices))

    def student_losses(self, batch: Batch) -> Losses:
        sampler = self.sampler
        x_t = sampler.start(batch.noise)
        x0 = self.roles.student(x_t, sampler.time(0, x_t), batch.condition).x0
        if self.settings.distance == "mse":
            return {"regression": (1.0, (x0 - batch.real).square().mean())}
        return {"regression": (1.0, self._lpips(self.parts.decode(x0), self.parts.decode(batch.real)))}

    def _lpips(self, pixels: Tensor, target: Tensor) -> Tensor:
        size = self.settings.lpips_size
        pictures = [p.expand(-1, 3, -1, -1) for p in (pixels, target)]
        if min(pixels.shape[-2:]) < size:
            pictures = [nn.functional.interpolate(p, size=(size, size), mode="bilinear") for p in pictures]
        return self.parts.lpips(*pictures).mean()
