"""Which kernel computes a network's attention: the one that a config names, or the fastest here."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from stepdistill.errors import UserError

from . import kernels
from .kernels import AUTO, BACKENDS, FASTEST_OF, NATIVE
from .modules import find_attention, head_width


def require_backend(
    backend: str,
    key: str,
    device: torch.device | str,
    dtype: torch.dtype,
    gradients: bool,
    networks: Iterable[nn.Module] = (),
) -> None:
    """Refuse a backend that does not run here, on the heads of ``networks``.

    Raises:
        UserError: it is unknown, or fails; the message names the config's ``key``.
    """
    if backend in (AUTO, NATIVE):
        return
    if backend not in BACKENDS:
        raise UserError(f"{key} = {backend}: use auto, or one of diffusers' backends: {', '.join(sorted(BACKENDS))}")
    reason = try_on_heads(backend, device, dtype, networks, gradients)
    if reason is not None:
        raise UserError(f"{key} = {backend}: it does not run on this {torch.device(device).type} ({reason}); use auto")


def try_on_heads(
    backend: str, device: torch.device | str, dtype: torch.dtype, networks: Iterable[nn.Module], gradients: bool
) -> str | None:
    """:func:`~.kernels.try_backend` on every width of head that ``networks`` have: kernels differ in those that they
    take."""
    widths = sorted({head_width(module) for network in networks for module in find_attention(network)}) or [64]
    reasons = {width: kernels.try_backend(backend, device, dtype, width, gradients) for width in widths}
    failed = [width for width in widths if reasons[width] is not None]
    if not failed:
        return None
    reason = reasons[failed[0]]
    return reason if len(failed) == len(widths) else f"heads of {failed[0]}: {reason}"


def choose_fastest(
    network: nn.Module, device: torch.device, dtype: torch.dtype, gradients: bool = False
) -> tuple[str, dict[str, str]]:
    """The fastest exact backend for ``network`` on this device, and why each other one is not it.

    On a GPU the candidates are timed on the network's widest attention; elsewhere it is native: on a CPU, SDPA's own
    choice is the fused kernel already.
    """
    if torch.device(device).type != "cuda":
        return NATIVE, {", ".join(FASTEST_OF): f"on a {torch.device(device).type} SDPA's own choice is fused already"}
    sizes = [(module.heads, head_width(module)) for module in find_attention(network)]
    heads, width = max(sizes, key=lambda size: size[0] * size[1], default=(8, 64))
    times, reasons = {}, {}
    for backend in (NATIVE, *FASTEST_OF):
        reason = None if backend == NATIVE else try_on_heads(backend, device, dtype, [network], gradients)
        if reason is None:
            times[backend] = time_backend(backend, device, dtype, heads, width)
        else:
            reasons[backend] = reason
    best = min(times, key=lambda name: times[name] * (0.97 if name == NATIVE else 1))  # noise must not decide
    reasons |= {name: f"{time / times[best]:.2f} x the time" for name, time in times.items() if name != best}
    return best, reasons


def time_backend(backend: str, device: torch.device, dtype: torch.dtype, heads: int, width: int) -> float:
    """The median seconds of one call on 4,096 tokens."""
    query = torch.randn(1, heads, 4096, width, device=device, dtype=dtype)
    from torch.utils.benchmark import Timer  # warns, when it is imported, where there is no CUDA

    call = {"attend": kernels.attend, "query": query, "backend": backend}
    timer = Timer("attend(query, query, query, None, backend)", globals=call, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.05).median
