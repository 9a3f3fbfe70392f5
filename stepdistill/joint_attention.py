"""Negative prompts in joint attention (SD3, Flux): NASA's MMDiT form, ready for the families that will use it.

In a joint block every token asks every token.  2412.02687 (version 3) applies NASA to the part where image queries meet
text keys and says no more; that is read here as

    Z_image = softmax([Q K_image^T, Q K+^T] / sqrt(D)) [V_image; V+]
              - a softmax([Q K_image^T, Q K-^T] / sqrt(D)) [0; V-]

so the image-to-image part and the text's own rows stay as they are, and equal prompts scale the text's share of the
image rows by 1 - a.  Not verified against the authors' code, which is not public.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import apply_rotary_emb
from torch import Tensor, nn

from stepdistill.attention import attend, negative_away

Rows = tuple[Tensor, Tensor, Tensor]
"""Q, K, V of some tokens, each (B, H, L, D)."""


def joint_negative_attention(
    image: Rows, text: Rows, negative: Rows, scale: float | Tensor, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The image's rows (B, H, I, D), steered; the text's (B, H, T+, D), as without a negative prompt; and those of the
    negative text (B, H, T-, D), a stream of its own that the next block needs.

    Both branches of the image's rows are one call on a batch of 2B, padded and masked where T+ and T- differ.
    """
    tokens, length, own = (rows[0].shape[2] for rows in (image, text, negative))
    wide = max(length, own)

    def padded(x: Tensor) -> Tensor:
        return F.pad(x, (0, 0, 0, wide - x.shape[2]))

    query = torch.cat([torch.cat([image[0], padded(text[0])], 2)] * 2)
    key = torch.cat([torch.cat([image[1], padded(side[1])], 2) for side in (text, negative)])
    values = (image[2], text[2]), (torch.zeros_like(image[2]), negative[2])
    value = torch.cat([torch.cat([own_image, padded(own_text)], 2) for own_image, own_text in values])
    mask = None
    if length != own:
        seen = torch.ones(2, 1, 1, tokens + wide, dtype=torch.bool, device=query.device)
        seen[0, ..., tokens + length :] = seen[1, ..., tokens + own :] = False
        mask = seen.repeat_interleave(len(image[0]), 0)
    positive, away = attend(query, key, value, mask, backend).chunk(2)
    steered = negative_away(positive[:, :, :tokens], away[:, :, :tokens], scale)
    joined = (torch.cat([image[i], negative[i]], 2) for i in (1, 2))
    return steered, positive[:, :, tokens : tokens + length], attend(negative[0], *joined, None, backend)


class JointNegativeProcessor:
    """NASA for the attention modules of SD3 (``Attention`` with added projections) and Flux (``FluxAttention``).

    Call it as ``attn(hidden_states, encoder_hidden_states=..., negative_hidden_states=..., negative_scale=...)``; gives
    the image's, the text's and the negative text's outputs, each through its own output projection.
    """

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        *,
        negative_hidden_states: Tensor,
        negative_scale: float | Tensor,
        negative_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            hidden_states: (B, I, C), the image's tokens.
            encoder_hidden_states, negative_hidden_states: (B, T+, C), (B, T-, C).
            negative_scale: a, a number or (B,).
            attention_mask: must be None; neither model masks its text.
            image_rotary_emb: Flux's (cos, sin) of text and image tokens, text first; ``negative_rotary_emb`` the same
                for the negative text, the first one's by default (equal lengths).

        Raises:
            ValueError: a mask.
        """
        if attention_mask is not None:
            raise ValueError("joint attention with a negative prompt takes no mask")
        image = _rows(attn, hidden_states, "to_q", "to_k", "to_v", attn.norm_q, attn.norm_k)
        added = ("add_q_proj", "add_k_proj", "add_v_proj", attn.norm_added_q, attn.norm_added_k)
        text, negative = (_rows(attn, x, *added) for x in (encoder_hidden_states, negative_hidden_states))
        if image_rotary_emb is not None:
            other = image_rotary_emb if negative_rotary_emb is None else negative_rotary_emb
            split = encoder_hidden_states.shape[1]
            image = _turned(image, [angle[split:] for angle in image_rotary_emb])
            text = _turned(text, [angle[:split] for angle in image_rotary_emb])
            negative = _turned(negative, [angle[: negative_hidden_states.shape[1]] for angle in other])
        streams = joint_negative_attention(image, text, negative, negative_scale)
        image, text, negative = (x.transpose(1, 2).flatten(2) for x in streams)
        image = attn.to_out[1](attn.to_out[0](image))
        last = isinstance(attn, Attention) and attn.context_pre_only
        return (image, text, negative) if last else (image, attn.to_add_out(text), attn.to_add_out(negative))


def _rows(
    attn: nn.Module, x: Tensor, q: str, k: str, v: str, norm_q: nn.Module | None, norm_k: nn.Module | None
) -> Rows:
    query, key, value = (getattr(attn, name)(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for name in (q, k, v))
    return (query if norm_q is None else norm_q(query), key if norm_k is None else norm_k(key), value)


def _turned(rows: Rows, angles: list[Tensor]) -> Rows:
    query, key, value = rows
    return (*(apply_rotary_emb(x, tuple(angles), sequence_dim=2) for x in (query, key)), value)
