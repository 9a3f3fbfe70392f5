"""PSO on preference pairs: Diffusion-DPO (2311.12908) at the student's own times."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.trainers.methods.base import REAL, Batch, Losses

from .base import PSOMethod


@dataclass(frozen=True)
class PairBatch(Batch):
    """A batch whose ``real`` are the winners; ``loser`` (B, C, H, W) the others."""

    loser: Tensor | None = None


class Pairs(PSOMethod):
    """Denoising errors of both sides, with shared noise and times."""

    def next_batch(self) -> PairBatch:
        count = self.config.train.batch_size
        pairs = self.parts.preferences.batch(self.parts.shares.take("real", count), count, self.noise.randn_like)
        self.observe(REAL, torch.cat([pairs.winner, pairs.loser]))
        self.observe_condition(pairs.condition)
        noise = self.noise.randn_like(pairs.winner)
        return PairBatch(pairs.condition, noise, pairs.items, pairs.winner, tuple(pairs.indices), loser=pairs.loser)

    def student_losses(self, batch: PairBatch) -> Losses:
        return self.preference(*self.denoising_ratios(batch, batch.loser))
