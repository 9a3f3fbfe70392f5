"""A discriminator that reads a denoising network's mid-block features (DMD2, 2405.14867 section 4.3)."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class _Reached(Exception):
    """Raised by the hook to end a forward pass once the feature is there: the decoder is never run."""


def features_at(module: nn.Module, forward: Callable[[], object]) -> Tensor:
    """The output of ``module`` during ``forward()``, (B, F, h, w); what comes after ``module`` is not computed."""
    found: list[Tensor] = []

    def keep(_module, _inputs, output):
        found.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    handle = module.register_forward_hook(keep)
    try:
        forward()
    except _Reached:
        pass
    finally:
        handle.remove()
    return found[0]


CHANNELS_A_GROUP = 8
"""At least so many channels share a norm's group: after the last 4x4 convolution a group sees one value a channel, so
a group of one channel is always 0 (its logit is a constant), and one of two is nothing but a sign."""


def norm_groups(channels: int) -> int:
    """The groups of the head's norms: 32 as in DMD2 where each then has 8 channels or more (from 256 channels on);
    else the most, a power of two, that leaves 8 in each; 1 for less than 16 channels."""
    groups = math.gcd(32, channels)
    while groups > 1 and channels // groups < CHANNELS_A_GROUP:
        groups //= 2
    return groups


class DiscriminatorHead(nn.Module):
    """Features (B, C, h, w) to one logit a sample, (B, 1).

    As in DMD2: stride-2 4x4 convolutions (GroupNorm 32, SiLU) down to 4x4, one 4x4 convolution to 1x1, GroupNorm,
    SiLU, and a 1x1 convolution.  Departures: narrow networks have fewer groups (:func:`norm_groups`), and any size
    h, w is taken (DMD2's is wired to 1024, 512 and 64 pixels): maps smaller than 4x4 get a kernel of their own size,
    and a non-square or odd map is pooled to 4x4 before the last step.  Float32 whatever the features are.
    """

    def __init__(self, channels: int, height: int, width: int):
        super().__init__()
        groups = norm_groups(channels)
        layers: list[nn.Module] = []
        while min(height, width) >= 8:
            layers += [nn.Conv2d(channels, channels, 4, 2, 1), nn.GroupNorm(groups, channels), nn.SiLU()]
            height, width = height // 2, width // 2
        kernel = (min(height, 4), min(width, 4))
        if (height, width) != kernel:
            layers.append(nn.AdaptiveAvgPool2d(kernel))
        layers += [nn.Conv2d(channels, channels, kernel), nn.GroupNorm(groups, channels), nn.SiLU()]
        layers.append(nn.Conv2d(channels, 1, 1))
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        with torch.autocast(features.device.type, enabled=False):
            return self.layers(features.float()).flatten(1)
