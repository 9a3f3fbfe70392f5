"""LAION's aesthetic predictor, on a CLIP model's picture embeddings.

It was run with random weights against a hand-written forward, not with LAION's file, whose layout is that of its
author's ``simple_inference.py``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError
from stepdistill.judges.clip import ClipScorer
from stepdistill.judges.load import load_clip

from .files import freeze, read_state
from .settings import NEEDS, RewardSettings


class AestheticHead(nn.Module):
    """LAION's aesthetic predictor: embeddings (B, E) of any length to scores (B,), about 1 to 10.

    Five linear layers with dropout and no activation between them, on the embedding over its L2 norm; in float32 also
    under autocast, whose bfloat16 would round a score of 5 to steps of 0.03.
    """

    def __init__(self, width: int = 768):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.layers(nn.functional.normalize(embeddings.float(), dim=-1)).squeeze(-1)


def load_aesthetic(settings: RewardSettings, device: str | torch.device) -> Callable[[Tensor, list], Tensor]:
    """The score as a function of pixels and items.

    Raises:
        UserError: a file is missing or is not what the predictor needs.
    """
    state = read_state(str(settings.weights), "aesthetic")
    first = state.get("layers.0.weight")
    head = AestheticHead(first.shape[1] if first is not None and first.ndim == 2 else 768)
    try:
        head.load_state_dict(state)
    except RuntimeError:
        raise UserError(
            f"reward aesthetic: {settings.weights} is not {NEEDS['aesthetic']['weights']}, nor of its layout "
            "(layers.0, 2, 4, 6 and 7 of widths E, 1024, 128, 64, 16, 1)"
        ) from None
    scorer, head = load_clip(settings.require_clip(), device), freeze(head, device)
    _check_width(scorer, head, settings, device)
    return lambda pixels, items: head(scorer.embed(pixels))


@torch.no_grad()
def _check_width(scorer: ClipScorer, head: AestheticHead, settings: RewardSettings, device: str | torch.device) -> None:
    width = head.layers[0].in_features
    clip_width = scorer.embed(torch.zeros(1, 3, *scorer.size, device=device)).shape[-1]
    if width != clip_width:
        raise UserError(
            f"reward aesthetic: {settings.weights} reads embeddings of length {width}, and the CLIP model "
            f"{scorer.tag} gives {clip_width}; name the model that the predictor was trained on"
        )
