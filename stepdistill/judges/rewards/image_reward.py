"""ImageReward (2304.05977) through its library.

Its library's preprocessing (shorter side to 224 by bicubic, centre crop, CLIP's mean and standard deviation) is done on
tensors instead of PIL images.  image-reward 1.5 itself was compared, with transformers 4.55.4 and random weights of its
architecture: rewards and gradients.  It was not run with ImageReward's weights, and it does not import with the
transformers that this package needs (4.56 and later dropped what it imports): there the library must be a patched copy,
else this kind is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stepdistill.errors import UserError, first_line
from stepdistill.judges.clip import ClipScorer

from .files import freeze, read_state, require_prompts
from .pixels import crop_square
from .settings import NEEDS, RewardSettings


def load_image_reward(settings: RewardSettings, device: str | torch.device) -> Callable[[Tensor, list], Tensor]:
    """The score as a function of pixels and items.

    Raises:
        UserError: the library or a file is missing, or the file is not ImageReward's.
    """
    state = read_state(str(settings.weights), "image_reward")
    library = _import_library()
    try:
        model: Any = library.load(settings.weights, device=device, med_config=settings.config)
    except Exception as error:  # the library raises many kinds; the user needs the file and the reason
        raise UserError(
            f"reward image_reward: ImageReward cannot load {settings.weights} with {settings.config} "
            f"({first_line(error)}); it also needs the tokenizer bert-base-uncased in the Hugging Face cache"
        ) from None
    used = ("mlp.", "blip.visual_encoder.", "blip.text_encoder.")  # the library loads any file, with no complaint
    missing = [name for name, _ in model.named_parameters() if name.startswith(used) and name not in state]
    if missing:
        raise UserError(
            f"reward image_reward: {settings.weights} has no {missing[0]} ({len(missing)} such tensors); "
            f"download {NEEDS['image_reward']['weights']}"
        )
    model = freeze(model, device)

    def score(pixels: Tensor, items: list) -> Tensor:
        tokens = model.blip.tokenizer(
            require_prompts(items, pixels, "image_reward"),
            padding="max_length",
            truncation=True,
            max_length=35,
            return_tensors="pt",
        )
        pictures = prepare_pixels(pixels)
        return model.score_gard(tokens.input_ids.to(device), tokens.attention_mask.to(device), pictures).squeeze(-1)

    return score


def prepare_pixels(pixels: Tensor) -> Tensor:
    """ImageReward's preprocessing, differentiable: (B, 1 or 3, H, W) in [-1, 1] to (B, 3, 224, 224), normalised."""
    mean, std = (torch.tensor(v, device=pixels.device).reshape(1, 3, 1, 1) for v in (ClipScorer.mean, ClipScorer.std))
    return ((crop_square(pixels, 224) + 1) / 2 - mean) / std


def _import_library() -> Any:
    try:
        import ImageReward
    except ImportError as error:
        raise UserError(
            f"reward image_reward: needs the package image-reward ({first_line(error)}); pip install image-reward "
            "clip-anytorch.  Version 1.5 does not import with transformers 4.56 or later: patch it, or name another "
            "reward as module:attribute"
        ) from None
    return ImageReward
