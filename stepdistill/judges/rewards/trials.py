"""Rewards without weights, for trials and tests."""

from __future__ import annotations

from torch import Tensor, nn


class Brightness(nn.Module):
    """The mean of a picture's pixels, in [-1, 1], (B,): ``stepdistill.judges.rewards:Brightness``, for trials."""

    def forward(self, pixels: Tensor, items: list) -> Tensor:
        return pixels.flatten(1).mean(1)


class Sharpness(nn.Module):
    """The mean absolute difference of neighbouring pixels, (B,), which blur lowers:
    ``stepdistill.judges.rewards:Sharpness``."""

    def forward(self, pixels: Tensor, items: list) -> Tensor:
        across = (pixels[..., 1:] - pixels[..., :-1]).abs().flatten(1).mean(1)
        return (across + (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().flatten(1).mean(1)) / 2
