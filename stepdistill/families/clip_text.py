"""Prompts as the hidden states of one CLIP text encoder."""

from __future__ import annotations

import copy
import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stepdistill.conditions import ConditionKind
from stepdistill.denoiser import Condition
from stepdistill.readers import digest_tensors

from .condition_encoders import ConditionEncoder

MEASURED_AT_ONCE = 1000
"""Prompts that are tokenized in one call when their lengths are looked at."""


@torch.no_grad()
def encode_prompts(tokenizer: Any, text_encoder: PreTrainedModel, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Last hidden states (B, tokens, width), as the stock pipeline makes them, and which tokens are no padding."""
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    device = text_encoder.device
    mask = tokens.attention_mask.to(device)
    attended = mask if getattr(text_encoder.config, "use_attention_mask", False) else None
    return text_encoder(tokens.input_ids.to(device), attention_mask=attended)[0], mask


class PromptEncoder:
    """Prompts as vectors for a router: float32 whatever the pipeline computes in, so that training and serving route
    alike (in bfloat16 about one prompt in a thousand would change sides)."""

    def __init__(self, tokenizer: Any, text_encoder: PreTrainedModel):
        self.tokenizer = tokenizer
        is_float32 = all(p.dtype == torch.float32 for p in text_encoder.parameters())
        self.network = text_encoder if is_float32 else copy.deepcopy(text_encoder).float()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the encoder's weights and the tokenizer's vocabulary."""
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(f"{digest_tensors(self.network.state_dict())} {vocabulary}".encode()).hexdigest()

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Hidden states (B, tokens, width), and their means over the tokens that are no padding, (B, width)."""
        hidden, mask = encode_prompts(self.tokenizer, self.network, prompts)
        mask = mask.to(hidden).unsqueeze(-1)
        return hidden, (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


class CLIPText(ConditionEncoder):
    """``text`` (B, tokens, width): CLIP's last hidden states, padded to the tokenizer's length; prompts that are too
    long are cut, as the stock pipeline cuts them.  The null condition is the empty prompt."""

    kind: ConditionKind = "prompt"
    has_null = True

    def __init__(self, tokenizer: Any, text_encoder: PreTrainedModel):
        self.tokenizer, self.text_encoder = tokenizer, text_encoder.requires_grad_(False).eval()
        self._null: Tensor | None = None

    def encode(self, items: list, device: torch.device) -> Condition:
        return {"text": encode_prompts(self.tokenizer, self.text_encoder, items)[0].to(device)}

    def null(self, count: int, device: torch.device) -> Condition:
        if self._null is None:
            self._null = self.encode([""], device)["text"]
        return {"text": self._null.to(device).expand(count, -1, -1)}

    def prompts_cut(self, prompts: list[str]) -> list[int]:
        cut = []
        for start in range(0, len(prompts), MEASURED_AT_ONCE):
            texts = [str(prompt) for prompt in prompts[start : start + MEASURED_AT_ONCE]]
            tokens = self.tokenizer(texts, verbose=False)["input_ids"]
            cut += [start + i for i, ids in enumerate(tokens) if len(ids) > self.tokenizer.model_max_length]
        return cut

    def networks(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.text_encoder}

    def to(self, device: torch.device | str) -> None:
        super().to(device)
        self._null = None
