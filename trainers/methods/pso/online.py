"""PSO on the student's own rollouts, judged by rewards."""

from __future__ import annotations

import torch
from torch import Tensor

from stepdistill.denoiser import cat_conditions
from stepdistill.objectives.preference import clamp_log_ratio
from stepdistill.trainers.methods.base import Batch, Losses

from .base import PSOMethod


class Online(PSOMethod):
    """Two rollouts of the student for each condition; the better is the winner."""

    def student_losses(self, batch: Batch) -> Losses:
        return self.preference(*self.log_ratios(batch))

    def log_ratios(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Log ratios (B, M) of the better and the worse of two rollouts, and which pairs are no tie (B,).

        A score that is not finite is no opinion: it makes its pair's ratios NaN.
        """
        count = len(batch)
        second = batch.noise if self.settings.shared_start else self.noise.randn_like(batch.noise)
        condition = cat_conditions(batch.condition, batch.condition)
        moves, x0 = self.roll_out(self.roles.student, torch.cat([batch.noise, second]), condition, self.draw_both)
        with torch.no_grad():
            scores = self.judge(self.parts.decode(x0), [*batch.items, *batch.items])
        first, other = clamp_log_ratio(self.move_ratios(moves, condition), self.settings.clamp).chunk(2)
        better = (scores[:count] > scores[count:])[:, None]
        counts = scores[:count] != scores[count:]
        self.log("ties", (~counts).float().mean())
        broken = (0 * scores).view(2, count).sum(0)[:, None]  # 0, or NaN
        return torch.where(better, first, other) + broken, torch.where(better, other, first) + broken, counts

    def draw_both(self, like: Tensor) -> Tensor:
        """Noise for both rollouts of each pair (2B, ...), half by half: the same on any number of processes."""
        return torch.cat([self.noise.randn_like(half) for half in like.chunk(2)])
