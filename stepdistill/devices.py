"""Devices and number formats by name."""

from __future__ import annotations

import torch

from .errors import UserError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def best_device() -> str:
    """``cuda`` where there is a GPU, else ``cpu``: schedules need float64, which MPS lacks."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def dtype_named(name: str, option: str) -> torch.dtype:
    """The number format of this name; ``option`` is what it was given by, for errors.

    Raises:
        UserError: no such format.
    """
    if name not in DTYPES:
        raise UserError(f"{option} {name}: use one of {', '.join(DTYPES)}")
    return DTYPES[name]
