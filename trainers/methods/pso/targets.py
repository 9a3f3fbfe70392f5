"""PSO towards target pictures, against samples of the same conditions."""

from __future__ import annotations

import torch
from torch import Tensor
from tqdm import tqdm

from stepdistill.errors import UserError
from stepdistill.finiteness import is_finite
from stepdistill.roles.role import Role
from stepdistill.trainers.methods.base import Batch, Losses, Parts

from .base import PSOMethod


class Targets(PSOMethod):
    """Real pictures win over samples of the tuned or the untuned model."""

    def __init__(self, parts: Parts):
        super().__init__(parts)
        if self.settings.best is not None and parts.real is not None:  # an export needs no images
            parts.real.restrict(self._best_targets(self.settings.best))

    @torch.no_grad()
    def _best_targets(self, share: float, batch: int = 64) -> list[int]:
        """The images with the highest rewards, ``share`` of each label's (of all, where conditions are no labels)."""
        real, scores = self.parts.real, []
        subset = torch.tensor(real.subset)
        read: list[int] = []
        for index in tqdm(subset.split(batch), desc="rewards of the targets", unit="batch"):
            pixels, index = real.images.readable(index.tolist())
            if pixels is not None:
                read += index
                scores.append(self.judge(pixels.to(self.family.device), real.items(index), log=False).cpu())
        real.images.check_readable()
        scores, everything = torch.cat(scores), torch.tensor(read)
        if not is_finite(scores):
            index = int(everything[(~scores.isfinite()).nonzero()[0]])
            raise UserError(
                f"pso.best: the rewards of image {index} of {real.images.source} are not finite; mend the reward, or "
                "remove it from pso.rewards"
            )
        labels = torch.tensor(real.items(read) if self.family.condition_kind == "label" else [0] * len(scores))
        best = []
        for label in labels.unique():
            (index,) = torch.where(labels == label)
            count = max(1, round(share * len(index)))
            best += everything[index[scores[index].argsort(descending=True, stable=True)[:count]]].tolist()
        return sorted(best)

    def next_batch(self) -> Batch:
        return self.next_real_batch()

    def student_losses(self, batch: Batch) -> Losses:
        if self.settings.loss == "diffusion":
            return {"diffusion": (1.0, self.diffusion(batch))}
        if self.settings.likelihood == "transition":
            return self.preference(*self.target_and_moves(batch))
        return self.preference(*self.denoising_ratios(batch, self.samples(batch)))

    def target_and_moves(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log ratios (B, M) of targets noised to the rollout's times, and of the moves of own samples."""
        moves, _ = self.roll_out(self.sampled_role, batch.noise, batch.condition, self.noise.randn_like)
        targets = []
        for move in moves:
            noise = self.noise.randn_like(batch.real)
            t = self.rollout.time(move.index, noise)
            targets.append(self.error_ratio(batch.real, noise, t, batch.condition, 1.0))
        return torch.stack(targets, 1), self.move_ratios(moves, batch.condition)

    @torch.no_grad()
    def samples(self, batch: Batch) -> Tensor:
        """Samples of the batch's conditions (B, ...) by the student's own sampler."""
        return self.sampler.sample(self.sampled_role, batch.noise, batch.condition, self.noise.randn_like)

    @property
    def sampled_role(self) -> Role:
        """The model whose samples lose."""
        return self.roles.teacher if self.settings.reference_samples == "untuned" else self.roles.student

    def diffusion(self, batch: Batch) -> Tensor:
        """The student's mean denoising error on the targets, a scalar."""
        errors = []
        for steps in self.draw_steps(len(batch)):
            noise = self.noise.randn_like(batch.real)
            t = self.times(steps, noise, self.sampler)
            errors.append(self.errors(self.roles.student, batch.real, noise, t, batch.condition))
        return torch.stack(errors).mean()
