"""Pixels to the bytes that a picture file would hold."""

from __future__ import annotations

import torch
from torch import Tensor


def signed_to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1], any shape, to uint8 0..255, rounded to the nearest."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def unit_to_bytes(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1], any shape, to uint8 0..255, rounded to the nearest."""
    return (pixels.float() * 255).round().clamp(0, 255).to(torch.uint8)
