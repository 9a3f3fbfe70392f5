"""How released rewards prepare pictures, as differentiable functions."""

from __future__ import annotations

from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, pad, resize


def crop_square(pixels: Tensor, size: int) -> Tensor:
    """(B, 1 or 3, H, W) to (B, 3, size, size), differentiable: shorter side to ``size`` by bicubic, centre crop."""
    images = resize(pixels.float().expand(-1, 3, -1, -1), [size], InterpolationMode.BICUBIC, antialias=True)
    return center_crop(images, [size])


def pad_square(pixels: Tensor, size: int) -> Tensor:
    """(B, 1 or 3, H, W) to (B, 3, size, size), differentiable: longer side to ``size`` by bicubic, black around it."""
    sides = [max(1, round(side * size / max(pixels.shape[-2:]))) for side in pixels.shape[-2:]]
    images = resize(pixels.float().expand(-1, 3, -1, -1), sides, InterpolationMode.BICUBIC, antialias=True)
    high, wide = (size - side for side in sides)
    return pad(images, [wide // 2, high // 2, wide - wide // 2, high - high // 2], fill=-1.0)
