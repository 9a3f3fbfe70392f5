"""The attention modules of a diffusers network, and which processor each has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn

from . import kernels
from .fused import fuse_projections, separate_projections
from .kernels import NATIVE
from .processor import AttentionProcessor


def find_attention(network: nn.Module) -> Iterator[Any]:
    """The attention modules of a diffusers network; nn.Module does not declare their attributes."""
    return (module for module in network.modules() if hasattr(module, "processor") and hasattr(module, "to_q"))


def head_width(attn: Any) -> int:
    """Channels of one head of an attention module."""
    return int(attn.to_q.weight.shape[0] // attn.heads)


def install(network: nn.Module, user: str) -> dict[str, str]:
    """Give the older attention modules an :class:`AttentionProcessor` on behalf of ``user``.

    Returns:
        The modules that are left as they are, with the reason.
    """
    skipped = {}
    for name, module in network.named_modules():
        if not (isinstance(module, Attention) and hasattr(module, "to_q")):
            continue
        if type(module.processor) is AttnProcessor2_0:
            module.set_processor(AttentionProcessor(module.processor))
        if isinstance(module.processor, AttentionProcessor):
            module.processor.users.add(user)
        elif not hasattr(module.processor, "_attention_backend"):
            skipped[name] = f"has a {type(module.processor).__name__} already"
    return skipped


def release(network: nn.Module, user: str) -> None:
    """Undo :func:`install`: when the last user leaves, the stock processors come back."""
    for module in find_attention(network):
        processor = module.processor
        if isinstance(processor, AttentionProcessor):
            processor.users.discard(user)
            if not processor.users:
                module.set_processor(processor.stock)


def set_backend(network: nn.Module, backend: str) -> dict[str, str]:
    """Compute every attention of ``network`` by ``backend`` (a name of ``kernels.BACKENDS``), and of no other network.

    Masked attention stays native where the kernel takes no masks.

    Returns:
        The modules that are left as they are, with the reason.
    """
    skipped = {} if backend == NATIVE else install(network, "backend")
    masked: dict[tuple[torch.device, torch.dtype, int], str] = {}
    for module in find_attention(network):
        processor = module.processor
        if isinstance(processor, AttentionProcessor):
            weight = module.to_q.weight
            place = (weight.device, weight.dtype, head_width(module))
            if backend != NATIVE and place not in masked:
                masked[place] = NATIVE if kernels.try_backend(backend, *place, masked=True) else backend
            processor._attention_backend = None if backend == NATIVE else AttentionBackendName(backend)
            processor.masked_backend = masked.get(place, NATIVE)
        elif hasattr(processor, "_attention_backend"):
            processor._attention_backend = AttentionBackendName(backend)  # None would be the process-wide default
    if backend == NATIVE:
        release(network, "backend")
    return skipped


def fuse(network: nn.Module) -> dict[str, str]:
    """Q, K and V of self-attention as one product, K and V of cross-attention too.

    The separate weights become views of the fused ones, so whatever changes the former in place (an optimizer, a LoRA
    merged into them) changes the latter, and no memory is spent.  The fused ones are outside of the state dict, so that
    saving writes what it always wrote (diffusers' ``fuse_qkv_projections`` writes both).  Where
    a LoRA is injected later, or weights are replaced or moved, the module goes back to its separate projections by
    itself; compiled code notices the LoRA alone.

    Returns:
        The modules that are left as they are, with the reason.
    """
    skipped = {}
    install(network, "fused")
    for name, attn in network.named_modules():
        if isinstance(attn, Attention) and isinstance(attn.processor, AttentionProcessor):
            reason = fuse_projections(attn)
            if reason is not None:
                skipped[name] = reason
    return skipped


def unfuse(network: nn.Module) -> None:
    """Undo :func:`fuse`."""
    for attn in find_attention(network):
        separate_projections(attn)
    release(network, "fused")
