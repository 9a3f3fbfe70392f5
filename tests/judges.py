"""Rewards and perceptual models that configs of tests name as module:attribute."""

import torch
from torch import nn

from stepdistill.rewards import Brightness

__all__ = ["Brightness", "Broken", "Constant", "Difference", "FirstValue", "ShiftedFirstValue", "scalar"]


class Difference(nn.Module):
    """A perceptual model: the mean squared difference to the real picture, (B,)."""

    def loss(self, pixels, real, indices):
        assert len(indices) == len(pixels) == len(real)
        return (pixels - real).square().flatten(1).mean(1)


class FirstValue(nn.Module):
    """A reward: the first value of a picture, of toys the x-coordinate, (B,)."""

    def forward(self, pixels, items):
        return pixels[:, 0, 0, 0]


class ShiftedFirstValue(FirstValue):
    """The same and 8, (B,)."""

    def forward(self, pixels, items):
        return super().forward(pixels, items) + 8


class Broken(nn.Module):
    """A reward that is no number for the first picture, (B,)."""

    def forward(self, pixels, items):
        means = pixels.flatten(1).mean(1)
        return torch.cat([means[:1] * torch.nan, means[1:]])


class Constant(nn.Module):
    """A reward to which all pictures are equal, (B,)."""

    def forward(self, pixels, items):
        return torch.full((len(pixels),), 0.5)


def scalar(pixels, items):
    """Not a reward: one number for the whole batch."""
    return torch.zeros(())
