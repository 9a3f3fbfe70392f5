"""The two-time-scale loop that all score-distillation methods share (DMD2, 2405.14867 section 4.2).

Every iteration updates the fake score; the student is updated too when ``iteration % fake_score_updates == 0``, and
then first: the fake score trains on the samples that were made before that update.  Methods differ in
:meth:`ScoreTrainer.student_losses`, in how a sample is made, and in which teacher is asked.
"""

from __future__ import annotations

import abc

import torch
from stepdistill.trainers.base import Batch, Trainer
from torch import Tensor


class ScoreTrainer(Trainer):
    """Fake score and student on two time scales."""

    @property
    @abc.abstractmethod
    def fake_score_updates(self) -> int:
        """Fake-score updates for each student update."""

    @abc.abstractmethod
    def make_sample(self, batch: Batch) -> Tensor:
        """x0 (B, C, H, W) from the student, with a graph to it where gradients are on."""

    @abc.abstractmethod
    def student_losses(self, x0: Tensor, batch: Batch) -> dict[str, tuple[float, Tensor]]:
        """Weight and scalar loss by name, as functions of the sample ``x0``, a leaf that wants a gradient."""

    @abc.abstractmethod
    def fake_score_losses(self, x0: Tensor, batch: Batch) -> dict[str, tuple[float, Tensor]]:
        """Weight and scalar loss by name of the fake score (and what trains with it) on detached samples."""

    def iteration(self) -> None:
        accumulation = self.config.train.gradient_accumulation
        student_turn = self.counters["iteration"] % self.fake_score_updates == 0
        kept: list[tuple[Batch, Tensor]] = []
        for _ in range(accumulation):
            batch = self.next_batch()
            with torch.set_grad_enabled(student_turn):
                x0 = self.make_sample(batch)
            if student_turn:
                gradient = self.sample_gradient(x0.detach(), batch)
                x0.backward(gradient / accumulation)
            kept.append((batch, x0.detach()))
        if student_turn:
            self.update("student")
        for batch, x0 in kept:
            losses = self.fake_score_losses(x0, batch)
            (self._total("fake_score", losses) / accumulation).backward()
        self.update("fake_score")

    def sample_gradient(self, x0: Tensor, batch: Batch) -> Tensor:
        """The gradient of the student's losses in the sample, (B, C, H, W).

        The graph is cut at x0, so what the losses pass through (teacher, fake score, discriminator) is freed before the
        student's own backward, and none of their parameters can gather a gradient: only x0's is asked for.
        """
        leaf = x0.requires_grad_()
        total = torch.zeros_like(x0)
        losses = self.student_losses(leaf, batch)
        for name, (weight, loss) in losses.items():
            (part,) = torch.autograd.grad(weight * loss, leaf)
            self.log(f"sample_grad/{name}", part.norm())
            total += part
        self._total("student", losses)
        return total

    def _total(self, role: str, losses: dict[str, tuple[float, Tensor]]) -> Tensor:
        total = sum(weight * loss for weight, loss in losses.values())
        self.log(f"loss/{role}", total)
        if len(losses) > 1:
            for name, (_, loss) in losses.items():
                self.log(f"loss/{name}", loss)
        return total
