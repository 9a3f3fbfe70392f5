"""Rewards and perceptual models that configs of tests name as module:attribute."""

import torch
from torch import nn

from stepdistill.judges.rewards import Brightness

__all__ = [
    "Brightness",
    "Broken",
    "Constant",
    "Difference",
    "FirstValue",
    "Index",
    "ShiftedFirstValue",
    "TimesLabel",
    "scalar",
]


class Difference(nn.Module):
    """A perceptual model: the mean squared difference to the real picture, (B,)."""

    def loss(self, pixels, real, indices):
        assert len(indices) == len(pixels) == len(real)
        return (pixels - real).square().flatten(1).mean(1)


class Index(nn.Module):
    """A perceptual model: which picture it is told that the real one is, (B,)."""

    def loss(self, pixels, real, indices):
        return torch.tensor(indices, dtype=torch.float32) + 0 * pixels.flatten(1).mean(1)


class FirstValue(nn.Module):
    """A reward: the first value of a picture, of toys the x-coordinate, (B,)."""

    def forward(self, pixels, items):
        return pixels[:, 0, 0, 0]


class TimesLabel(nn.Module):
    """A reward: the mean of a picture times one more than its label, (B,)."""

    def forward(self, pixels, items):
        return pixels.flatten(1).mean(1) * (torch.tensor(items, dtype=torch.float32) + 1)


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


def raises(pixels, items):
    """Not a reward: it fails."""
    return {}["here"]


def leaves(pixels, items):
    """Not a reward: it ends the process."""
    raise SystemExit(7)


def nothing(pixels, items):
    """Not a reward: it gives nothing."""


def counts(pixels, items):
    """Not a reward: integers."""
    return torch.arange(len(pixels))


def not_numbers(pixels, items):
    """Not a reward: NaN."""
    return pixels.flatten(1).mean(1) * float("nan")


def of_pixels_alone(pixels):
    """Not a reward: it takes no items."""
    return pixels.flatten(1).mean(1)


def detached(pixels, items):
    """A reward without a gradient."""
    return pixels.detach().flatten(1).mean(1)


class Extractor(nn.Module):
    """An extractor of three features that fails on every picture."""

    num_features = 3

    def forward(self, images):
        raise RuntimeError("no pictures, please")


class NoArguments:
    """Made without arguments, and fails."""

    def __init__(self):
        raise RuntimeError("no weights here")


class WrongLoss:
    """A perceptual model that gives one number for all pictures."""

    def loss(self, pixels, real, indices):
        return (pixels - real).square().mean()


class DetachedLoss:
    """A perceptual model without a gradient."""

    def loss(self, pixels, real, indices):
        return (pixels - real).square().flatten(1).mean(1).detach()


class OtherLoss:
    """A perceptual model that takes other arguments."""

    def loss(self, pixels):
        return pixels.flatten(1).mean(1)
