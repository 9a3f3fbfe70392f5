"""Human Preference Score v2 (2306.09341): the cosine of picture and prompt, as ``hpsv2.score`` gives it.

Pictures are prepared as that does it: longer side to the model's size by bicubic, then black at the two other sides.  A
picture whose longer side is that size already is padded too; the library leaves it and cannot take it unless it is
square.  It was checked on a small model of random weights in a file of HPS v2's layout: against open_clip, and against
hpsv2 1.2's own model, tokenizer and transform, with the antialiasing that torchvision has had by default since 0.17.
The names and shapes of the two ViT-H-14 were compared at two layers.  The library runs in half precision, this does
not.  It was not run with the released weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.judges.clip import ClipSettings
from stepdistill.judges.load import load_clip

from .files import read_state, require_prompts
from .pixels import pad_square
from .settings import HPS_MODEL, NEEDS, RewardSettings


def load_hps(settings: RewardSettings, device: str | torch.device) -> Callable[[Tensor, list], Tensor]:
    """The score as a function of pixels and items.

    Raises:
        UserError: the file is missing or is not HPS's.
    """
    read_state(str(settings.weights), "hps")
    try:
        scorer = load_clip(
            settings.clip or ClipSettings(model=HPS_MODEL, pretrained=settings.weights, prefix=""), device
        )
    except UserError as error:
        raise UserError(f"reward hps (weights: {NEEDS['hps']['weights']}): {error}") from None
    size = scorer.size[0]
    return lambda pixels, items: scorer.cosine(pad_square(pixels, size), require_prompts(items, pixels, "hps"))
