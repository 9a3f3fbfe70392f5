"""What a denoising network computes in: the one rule for every call.

Noisy samples, times and predictions are float32.  Weights may be float32, bfloat16 or float16.  A network of float32
weights computes in float32, or in bfloat16 where the run asks for it (``train.precision = bf16``); one that holds
half-precision weights computes in bfloat16, on a CPU as on a GPU, since its calls would mix dtypes otherwise.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn

HALF = (torch.bfloat16, torch.float16)


def autocast_dtype(network: nn.Module, requested: torch.dtype | None = None) -> torch.dtype | None:
    """What calls of ``network`` are cast to: ``requested``, else bfloat16 where it holds half-precision weights.

    None is float32.
    """
    if requested is None and any(parameter.dtype in HALF for parameter in network.parameters()):
        return torch.bfloat16
    return requested


def computing(device: torch.device, dtype: torch.dtype | None) -> contextlib.AbstractContextManager[Any]:
    """A context for one call of a network that computes in ``dtype``, as :func:`autocast_dtype` gives it.

    One for each call: a cast that a call without gradients has cached must not serve a call with gradients.
    """
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def keep_norms_in_float32(network: nn.Module) -> None:
    """Keep what a float16 network normalises with in float32; other networks are left alone.

    A CPU's kernels take bfloat16 samples with float32 weights or bfloat16 ones, not with float16 ones.
    """
    for module in network.modules():
        norm = isinstance(module, nn.GroupNorm | nn.LayerNorm)
        if norm and module.weight is not None and module.weight.dtype == torch.float16:
            module.float()
