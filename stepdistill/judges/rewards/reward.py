"""A frozen reward, whatever computes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.errors import UserError, describe_value, running
from stepdistill.objectives.feedback import hinge_loss


@dataclass
class Reward:
    """A frozen reward: ``score`` maps pixels and items to (B,), higher is better."""

    name: str
    weight: float
    hinge: float | None
    score: Callable[[Tensor, list], Tensor]

    def __call__(self, pixels: Tensor, items: list) -> Tensor:
        """Rewards (B,), differentiable in the pixels.

        Args:
            pixels: (B, 1 or 3, H, W) in [-1, 1], not clamped; items: the B prompts or labels, [] without conditions.

        Raises:
            UserError: the reward fails, is not (B,), or it needs prompts and these items are not.
        """
        with running(f"reward {self.name}: called on {len(pixels)} pictures it"):
            rewards = self.score(pixels, items)
        if not isinstance(rewards, Tensor) or rewards.shape != (len(pixels),) or not rewards.is_floating_point():
            raise UserError(
                f"reward {self.name}: gave {describe_value(rewards)} for {len(pixels)} pictures; one number a picture, "
                "(B,), is needed"
            )
        return rewards

    def try_on(self, shape: tuple[int, int, int], items: list, device: str | torch.device = "cpu") -> None:
        """Compute the rewards of two pictures (C, H, W) of noise.

        Raises:
            UserError: as :meth:`__call__`, or a reward is not finite.
        """
        pixels = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(device)
        if not self(pixels, items).isfinite().all():
            raise UserError(f"reward {self.name}: gave a reward that is not finite for pictures of noise; mend it")

    def loss(self, pixels: Tensor, items: list) -> Tensor:
        """``weight`` times :func:`~stepdistill.objectives.feedback.hinge_loss`, a scalar."""
        return self.weight * hinge_loss(self(pixels, items), self.hinge)
