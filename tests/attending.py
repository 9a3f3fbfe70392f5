"""Attention modules and networks of tests, and NASA written out by hand."""

from __future__ import annotations

import tiny
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention
from torch import nn

from stepdistill.attention.modules import install
from stepdistill.attention.processor import AttentionProcessor

F64 = torch.float64
QUERIES, WIDTH, TEXT_WIDTH, HEADS, HEAD_DIM = 5, 12, 10, 3, 4
KINDS = {
    "plain": {},
    "bias": {"bias": True},
    "no_bias_at_all": {"out_bias": False},
    "residual": {"bias": True, "residual_connection": True, "rescale_output_factor": 1.7},
    "layer_norms": {"bias": True, "cross_attention_norm": "layer_norm", "norm_num_groups": 3, "qk_norm": "layer_norm"},
    "group_norm_of_the_text": {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 2},
    "rms": {"qk_norm": "rms_norm", "residual_connection": True, "rescale_output_factor": 0.5},
}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def module(kind: str = "bias", **changes) -> Attention:
    """A cross-attention in float64, every parameter random, norms too."""
    sizes = {"query_dim": WIDTH, "cross_attention_dim": TEXT_WIDTH, "heads": HEADS, "dim_head": HEAD_DIM}
    attn = Attention(**{**sizes, **KINDS[kind], **changes}).double().eval()
    generator = seeded(1)
    with torch.no_grad():
        for parameter in attn.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=F64) * 0.6)
    return attn


def steerable(kind: str = "bias", **changes) -> Attention:
    attn = module(kind, **changes)
    assert install(attn, "test") == {}
    assert type(attn.processor) is AttentionProcessor
    return attn


def tokens(count: int, length: int, width: int = TEXT_WIDTH, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, length, width, generator=seeded(100 + seed), dtype=F64)


def added(seen: torch.Tensor, hidden: float = -10000.0) -> torch.Tensor:
    """(B, 1, S), as UNet2DConditionModel prepares an ``encoder_attention_mask``."""
    return ((~seen).to(F64) * hidden)[:, None]


def layer_norm(x: torch.Tensor, norm: nn.Module) -> torch.Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def of_kind(x: torch.Tensor, norm: nn.Module | None) -> torch.Tensor:
    """The norms of queries and keys, written out."""
    if norm is None:
        return x
    if isinstance(norm, nn.LayerNorm):
        return layer_norm(x, norm)
    return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight


def group_norm(x: torch.Tensor, norm: nn.GroupNorm) -> torch.Tensor:
    """Of one sample's tokens (S, C): each group of channels over all tokens."""
    groups = x.unflatten(-1, (norm.num_groups, -1))
    mean = groups.mean((0, 2), keepdim=True)
    variance = (groups - mean).square().mean((0, 2), keepdim=True)
    return ((groups - mean) / (variance + norm.eps).sqrt()).flatten(1) * norm.weight + norm.bias


def linear(x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def branch(attn: Attention, hidden: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """softmax(Q K^T / sqrt(D)) V of one sample (L, C) and the tokens that it may see (S, W), head by head: (L, H D)."""
    if isinstance(attn.norm_cross, nn.LayerNorm):
        text = layer_norm(text, attn.norm_cross)
    elif attn.norm_cross is not None:
        text = group_norm(text, attn.norm_cross)
    query, key, value = linear(hidden, attn.to_q), linear(text, attn.to_k), linear(text, attn.to_v)
    parts = []
    for head in range(attn.heads):
        columns = slice(head * HEAD_DIM, (head + 1) * HEAD_DIM)
        scores = of_kind(query[:, columns], attn.norm_q) @ of_kind(key[:, columns], attn.norm_k).T / HEAD_DIM**0.5
        weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
        parts.append(weights @ value[:, columns])
    return torch.cat(parts, -1)


def before_output(attn, x, text, text_seen, negative, negative_seen, scales) -> torch.Tensor:
    """Z = Z+ - a Z-, (B, L, H D); masked tokens are not there at all."""
    rows = []
    for i in range(len(x)):
        hidden = x[i] if attn.group_norm is None else group_norm(x[i], attn.group_norm)
        plus = text[i] if text_seen is None else text[i][text_seen[i]]
        minus = negative[i % len(negative)]
        minus = minus if negative_seen is None else minus[negative_seen[i % len(negative_seen)]]
        rows.append(branch(attn, hidden, plus) - scales[i] * branch(attn, hidden, minus))
    return torch.stack(rows)


def output_of(attn, z, x) -> torch.Tensor:
    out = linear(z, attn.to_out[0])
    return (out + (x if attn.residual_connection else 0)) / attn.rescale_output_factor


SEEN = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 0, 1, 1, 1, 0]]).bool()
NEGATIVE_SEEN = torch.tensor([[1, 1, 1, 0], [0, 1, 0, 1]]).bool()
CASES = {
    "equal_lengths": (6, 6, None, None),
    "shorter_negative": (6, 4, None, None),
    "longer_negative": (6, 9, None, None),
    "text_masked": (6, 6, SEEN, None),
    "text_masked_shorter_negative": (6, 3, SEEN, None),
    "negative_masked": (6, 4, None, NEGATIVE_SEEN),
    "both_masked": (6, 4, SEEN, NEGATIVE_SEEN),
}


def condition_unet() -> UNet2DConditionModel:
    return tiny.condition_unet().double().eval().requires_grad_(False)


def call_unet(unet: UNet2DConditionModel, steer: dict | None = None, mask: bool = False, **changes) -> torch.Tensor:
    dtype = unet.dtype
    x = torch.randn(2, 4, 8, 8, generator=seeded(3), dtype=F64).to(dtype)
    arguments = {"encoder_hidden_states": tokens(2, 6, 8, seed=4).to(dtype), **changes}
    if mask:
        arguments["encoder_attention_mask"] = SEEN
    return unet(x, torch.tensor([999, 20]), cross_attention_kwargs=steer, **arguments).sample
