"""One attention module: a kernel of one's choice, fused projections, and a negative branch (NASA)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from .fused import fused_projection
from .kernels import NATIVE, attend


class AttentionProcessor:
    """diffusers' ``AttnProcessor2_0``, with a kernel for one network alone, fused projections and a negative branch.

    Without any of them its arithmetic is the stock one's, bit for bit.

    NASA (2412.02687 version 3, eqs. 7 to 9): a cross-attention that is given ``negative_hidden_states`` gives

        Z = softmax(Q K+^T / sqrt(D)) V+ - a softmax(Q K-^T / sqrt(D)) V-

    before the output projection, so that the projection's bias counts once, with the same projections for both
    prompts.  Both branches are one call on a batch of 2B.  Self-attention is untouched.  a = 0 is the plain attention,
    to the bit; there is no compensation: equal prompts scale the branch by 1 - a, and an empty negative prompt is not
    nothing.
    """

    _attention_backend: AttentionBackendName | None = None  # the name that diffusers looks for
    _parallel_config = None

    def __init__(self, stock: AttnProcessor2_0 | None = None):
        self.stock = AttnProcessor2_0() if stock is None else stock
        self.users: set[str] = set()
        self.masked_backend = NATIVE

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        negative_hidden_states: Tensor | None = None,
        negative_mask: Tensor | None = None,
        negative_scale: float | Tensor = 0.0,
    ) -> Tensor:
        """
        Args:
            hidden_states: (B, L, C), or (B, C, h, w) for a VAE's.
            encoder_hidden_states: (B, S+, W), the text; None for self-attention.
            attention_mask: of the text, as diffusers' UNets prepare it: added, (B, 1, S+); or boolean.
            negative_hidden_states: (B, S-, W) or (1, S-, W); S- need not be S+.
            negative_mask: (B, S-) or (1, S-), boolean, True is seen; at least one a row.
            negative_scale: a, a number or one a sample, (B,) or (1,).

        Raises:
            ValueError: a negative prompt of another batch size.
        """
        residual = hidden_states
        if attn.spatial_norm is not None:
            hidden_states = attn.spatial_norm(hidden_states, temb)
        shape = hidden_states.shape
        if len(shape) == 4:
            hidden_states = hidden_states.flatten(2).transpose(1, 2)
        count = len(hidden_states)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        mask = attention_mask
        if mask is not None:
            mask = attn.prepare_attention_mask(mask, context.shape[1], count).view(
                count, attn.heads, -1, mask.shape[-1]
            )
        crossed = encoder_hidden_states is not None
        negative = None
        if crossed and negative_hidden_states is not None and not _is_zero(negative_scale):
            negative = negative_hidden_states.to(context)
        if crossed and attn.norm_cross is not None:  # each by itself: a group norm is over the tokens too
            context = attn.norm_encoder_hidden_states(context)
            if negative is not None:
                negative = attn.norm_encoder_hidden_states(negative)
        if negative is not None:
            context, mask = _join_prompts(context, mask, negative, negative_mask)
        query, key, value = _project(attn, hidden_states, context, is_self=not crossed)
        if negative is not None:
            query = torch.cat([query, query])
        backend = self._attention_backend if mask is None else self.masked_backend
        output = attend(query, key, value, mask, None if backend is None else str(AttentionBackendName(backend).value))
        if negative is not None:
            plain, negated = output.chunk(2)
            output = subtract_negative(plain, negated, negative_scale)
        output = output.transpose(1, 2).reshape(count, -1, attn.heads * output.shape[-1]).to(query.dtype)
        output = attn.to_out[1](attn.to_out[0](output))
        if len(shape) == 4:
            output = output.transpose(-1, -2).reshape(shape)
        if attn.residual_connection:
            output = output + residual
        return output / attn.rescale_output_factor


def _is_zero(scale: float | Tensor) -> bool:
    """Whether a scale is the number 0; a tensor's values are not looked at, which would wait for the device."""
    return not isinstance(scale, Tensor) and scale == 0


def subtract_negative(positive: Tensor, negative: Tensor, scale: float | Tensor) -> Tensor:
    """``Z+ - a Z-`` (2412.02687 version 3, eq. 9), all (B, H, L, D); ``scale`` a number or (B,)."""
    if isinstance(scale, Tensor):
        scale = scale.to(positive).reshape(-1, 1, 1, 1)
    return positive - scale * negative


def _join_prompts(
    context: Tensor, mask: Tensor | None, negative: Tensor, negative_mask: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Both prompts as one batch (2B, max(S+, S-), W), padded, and the mask that hides the padding, where one is needed:
    added, (2B, 1 or H, 1 or L, S)."""
    count, length, _ = context.shape
    if len(negative) not in (1, count):
        raise ValueError(
            f"{len(negative)} negative prompts for a batch of {count}: give one for all, or one a picture "
            "(images_per_prompt), with guidance off"
        )
    negative = negative.expand(count, -1, -1)
    negative_length = negative.shape[1]
    if mask is None and negative_mask is None and negative_length == length:
        return torch.cat([context, negative]), None
    wide = max(length, negative_length)
    hidden = float("-inf")

    def as_added(seen: Tensor) -> Tensor:
        return torch.zeros_like(seen, dtype=context.dtype).masked_fill(~seen, hidden)

    if mask is None:
        mask = context.new_zeros(count, 1, 1, length)
    elif mask.dtype == torch.bool:
        mask = as_added(mask)
    if negative_mask is None:
        added = context.new_zeros(count, 1, 1, negative_length)
    else:
        added = as_added(negative_mask.bool().expand(count, -1)[:, None, None])
    mask = F.pad(mask, (0, wide - length), value=hidden)
    added = F.pad(added, (0, wide - negative_length), value=hidden).expand(-1, *mask.shape[1:3], -1)
    padded = [F.pad(x, (0, 0, 0, wide - x.shape[1])) for x in (context, negative)]
    return torch.cat(padded), torch.cat([mask.to(added), added])


def _project(attn: Attention, hidden: Tensor, context: Tensor, is_self: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Q (B, H, L, D) of ``hidden``, K and V of ``context`` (the same tensor where ``is_self``), through the fused
    weights where the module has some for this use that are still equal to the separate ones."""
    fused = None if is_self == attn.is_cross_attention else fused_projection(attn)
    if fused is None:
        query, key, value = attn.to_q(hidden), attn.to_k(context), attn.to_v(context)
    elif is_self:
        query, key, value = F.linear(hidden, *fused).chunk(3, -1)
    else:
        query, (key, value) = attn.to_q(hidden), F.linear(context, *fused).chunk(2, -1)
    query, key, value = (x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (query, key, value))
    if attn.norm_q is not None:
        query = attn.norm_q(query)
    if attn.norm_k is not None:
        key = attn.norm_k(key)
    return query, key, value
