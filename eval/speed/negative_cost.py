"""What a negative prompt costs inside a pass's cross-attentions."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.attention.kernels import attend
from stepdistill.attention.modules import find_attention
from stepdistill.attention.processor import AttentionProcessor, subtract_negative
from stepdistill.eval.stock_pipeline import StockPipeline

from .latency import Clock


def time_negative_prompts(
    stock: StockPipeline, batch_size: int, guidance_scale: float | None, repeats: int
) -> dict[str, float] | None:
    """Milliseconds of one pass's cross-attentions: plain, and with a negative prompt in one call of both branches and
    in two; None for a pipeline without cross-attention.  Medians of interleaved runs on the tensors of a pass."""
    if stock.condition_kind != "prompt" or not _find_cross_attention(stock):
        return None
    calls = _record_cross_attention(stock, batch_size, guidance_scale)
    processor, clock = AttentionProcessor(), Clock(stock.device)

    def attend_twice(attn: Any, hidden: Tensor, text: Tensor) -> Tensor:
        def project(projection: nn.Module, x: Tensor) -> Tensor:
            return projection(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        query = project(attn.to_q, hidden)
        positive, negative = (
            attend(query, project(attn.to_k, text), project(attn.to_v, text), None, None) for _ in range(2)
        )
        return attn.to_out[0](subtract_negative(positive, negative, 0.5).transpose(1, 2).flatten(2))

    ways = {
        "plain": lambda attn, hidden, text: processor(attn, hidden, text),
        "fused": lambda attn, hidden, text: processor(
            attn, hidden, text, negative_hidden_states=text, negative_scale=0.5
        ),
        "two": attend_twice,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    with torch.no_grad():
        for _ in range(4 * repeats + 1):
            for name, way in ways.items():
                start = clock.now()
                for call in calls:
                    way(*call)
                times[name].append(clock.now() - start)
    return {name: 1000 * statistics.median(seconds[1:]) for name, seconds in times.items()}


def _record_cross_attention(
    stock: StockPipeline, batch_size: int, guidance_scale: float | None
) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """Module, hidden states and text of every cross-attention in one step of the pipeline."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []

    def record(module: nn.Module, arguments: tuple, options: dict) -> None:
        calls.append((module, arguments[0], options["encoder_hidden_states"]))

    hooks = [module.register_forward_pre_hook(record, with_kwargs=True) for module in _find_cross_attention(stock)]
    noise = torch.randn(batch_size, *stock.noise_shape, generator=torch.Generator().manual_seed(0))
    try:
        stock.generate(["a picture"] * batch_size, noise, 1, None, guidance_scale)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _find_cross_attention(stock: StockPipeline) -> list[nn.Module]:
    return [m for m in find_attention(stock.denoiser) if getattr(m, "is_cross_attention", False)]
