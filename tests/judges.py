"""Rewards and perceptual models that configs of tests name as module:attribute."""

import torch
from torch import nn


class Brightness(nn.Module):
    """The mean of a picture's pixels in [-1, 1], (B,)."""

    def forward(self, pixels, items):
        return pixels.flatten(1).mean(1)


class Difference(nn.Module):
    """A perceptual model: the mean squared difference to the real picture, (B,)."""

    def loss(self, pixels, real, indices):
        assert len(indices) == len(pixels) == len(real)
        return (pixels - real).square().flatten(1).mean(1)


def scalar(pixels, items):
    """Not a reward: one number for the whole batch."""
    return torch.zeros(())
