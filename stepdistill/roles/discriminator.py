"""Discriminators that read a denoising network's features: its mid-block's (DMD2, 2405.14867 section 4.3), or those of
all of its blocks (PCM, 2405.18407)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

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


class MapHead(nn.Module):
    """A feature map (B, C, h, w) to one logit for each of its places, (B, 1, h, w): PCM's head.

    Two 3x3 convolutions with GroupNorm and LeakyReLU, the second next to a skip connection, and a 1x1 convolution.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.first, self.second = (
            nn.Sequential(
                nn.Conv2d(channels, channels, 3, 1, 1),
                nn.GroupNorm(norm_groups(channels), channels),
                nn.LeakyReLU(),
            )
            for _ in range(2)
        )
        self.last = nn.Conv2d(channels, 1, 1)

    def forward(self, features: Tensor) -> Tensor:
        hidden = self.first(features)
        return self.last(hidden + self.second(hidden))


class MapHeads(nn.Module):
    """PCM's discriminator: ``heads`` heads on each of several feature maps of ``channels`` channels.

    Departure: narrow maps have fewer groups (:func:`norm_groups`).  Float32 whatever the features are.
    """

    def __init__(self, channels: Sequence[int], heads: int = 4):
        super().__init__()
        self.maps = nn.ModuleList(nn.ModuleList(MapHead(count) for _ in range(heads)) for count in channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C, h, w), one for each of ``channels``, to the logits (B, 1, h, w) of every head."""
        with torch.autocast(features[0].device.type, enabled=False):
            pairs = zip(self.maps, features, strict=True)
            return [head(feature_map.float()) for heads, feature_map in pairs for head in heads.children()]
