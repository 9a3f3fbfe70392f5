"""One attention module's projections as one product, of which the separate weights are views."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

BUFFERS = ("_fused_weight", "_fused_bias")
AttentionModule = Any
"""diffusers' attention: nn.Module does not declare its attributes."""


def _parts(attn: AttentionModule) -> list[nn.Module]:
    return [attn.to_k, attn.to_v] if attn.is_cross_attention else [attn.to_q, attn.to_k, attn.to_v]


def fuse_projections(attn: nn.Module) -> str | None:
    """Fuse a module's projections; gives the reason where it is left as it is."""
    parts = _parts(attn)
    odd = next((type(part) for part in parts if type(part) is not nn.Linear), None)
    if odd is not None:
        kind = f"{odd.__module__.split('.')[0]}'s {odd.__name__}"
        return f"its projections are {kind}, not torch's Linear; fuse a LoRA into the weights first"
    for buffer, name in zip(BUFFERS, ("weight", "bias"), strict=True):
        attn.register_buffer(buffer, _join([getattr(part, name) for part in parts]), persistent=False)
    return None


def is_fused(attn: nn.Module) -> bool:
    """Whether :func:`fuse_projections` has been here."""
    return hasattr(attn, BUFFERS[0])


def separate_projections(attn: nn.Module) -> None:
    """Undo :func:`fuse_projections`."""
    if is_fused(attn):
        for parameter in (p for part in _parts(attn) for p in part.parameters()):
            parameter.data = parameter.data.clone()  # no view any more
        for name in BUFFERS:
            delattr(attn, name)


def _join(parts: list[nn.Parameter | None]) -> Tensor | None:
    """One tensor of which the parameters are views from now on."""
    present = [part for part in parts if part is not None]
    if not present:
        return None
    whole = torch.cat([part.detach() for part in present])
    for part, view in zip(present, whole.split([len(part) for part in present]), strict=True):
        part.data = view
    return whole


def _are_views(parts: list[nn.Parameter | None], whole: Tensor | None) -> bool:
    """Whether the parameters, one after the other, still are ``whole``."""
    if whole is None:
        return all(part is None for part in parts)
    place = whole.data_ptr()
    for part in parts:
        if part is None or part.data_ptr() != place:
            return False
        place += part.nbytes
    return True


def fused_projection(attn: AttentionModule) -> tuple[Tensor, Tensor | None] | None:
    """The fused weight and bias; None where the module has none, where the separate weights are no longer views of
    them, or where those train."""
    if not is_fused(attn):
        return None
    parts, fused = _parts(attn), (attn._fused_weight, attn._fused_bias)
    if any(type(part) is not nn.Linear for part in parts):
        return None
    if torch.is_grad_enabled() and any(parameter.requires_grad for part in parts for parameter in part.parameters()):
        return None
    if not torch.compiler.is_compiling():  # which knows no addresses
        weights, biases = ([getattr(part, name) for part in parts] for name in ("weight", "bias"))
        if not (_are_views(weights, fused[0]) and _are_views(biases, fused[1])):
            return None
    return fused
