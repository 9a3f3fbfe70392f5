"""Random pictures as readers take and give them, and refusals in one line."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from stepdistill.errors import UserError


def random_pixels(count: int, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


def as_batch(array: np.ndarray) -> torch.Tensor:
    """The batch that a reader returns for uint8 (N, H, W[, C])."""
    array = array[..., None] if array.ndim == 3 else array
    return torch.from_numpy(array.astype(np.float32)).permute(0, 3, 1, 2) / 127.5 - 1


def assert_refused(call, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message
