"""Attention kernels by diffusers' names: one call, and whether a kernel runs on this machine."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend, dispatch_attention_fn
from torch import Tensor

AUTO, NATIVE = "auto", "native"
BACKENDS = tuple(name.value for name in AttentionBackendName)
"""diffusers' names of the kernels."""
FASTEST_OF = ("_native_cudnn", "_native_flash", "_native_efficient", "flash", "_flash_3", "xformers")
"""What ``auto`` tries besides ``native`` on a GPU: exact kernels that need no download.  Quantised ones (sage) are for
users who name them."""


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, backend: str | None) -> Tensor:
    """``softmax(Q K^T / sqrt(D) + mask) V``.

    Args:
        query, key, value: (B, H, L, D), (B, H, S, D), (B, H, S, D).
        mask: broadcastable to (B, H, L, S), boolean (True is seen) or added; None for none.
        backend: a name of ``BACKENDS``; None is native.
    """
    if backend in (None, NATIVE):
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    rows = (x.transpose(1, 2) for x in (query, key, value))
    return dispatch_attention_fn(*rows, attn_mask=mask, backend=AttentionBackendName(backend)).transpose(1, 2)


def try_backend(
    backend: str,
    device: torch.device | str,
    dtype: torch.dtype = torch.float32,
    head_dim: int = 64,
    gradients: bool = False,
    masked: bool = False,
) -> str | None:
    """None where ``backend`` runs on this machine, else the reason: it is tried on a small tensor.

    A ``_hub`` kernel is downloaded here, as diffusers does when it is chosen.
    """
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 32, head_dim, generator=generator) for _ in range(3))
    mask = None
    if masked:  # as a call has it: added, and hiding something
        mask = torch.zeros(1, 1, 1, 32).index_fill(-1, torch.arange(20, 32), float("-inf"))
    exact = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    inputs = [x.to(device, dtype).requires_grad_(gradients) for x in (query, key, value)]
    mask = None if mask is None else mask.to(device, dtype)
    try:
        with attention_backend(backend):  # checks what it needs, and puts the process-wide default back
            output = attend(inputs[0], inputs[1], inputs[2], mask, backend)
        if gradients:
            torch.autograd.grad(output.float().sum(), inputs)
    except Exception as error:  # of kernels and packages, many kinds
        return (" ".join(str(error).split()) or type(error).__name__).split(". ")[0].rstrip(".")[:160]
    wrong = (output.detach().float().cpu() - exact).abs().max().item()
    return None if wrong < 0.1 else f"its result is off by {wrong:.2g}"
