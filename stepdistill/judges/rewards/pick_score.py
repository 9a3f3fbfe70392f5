"""PickScore (Pick-a-Pic, 2305.01569): the cosine of picture and prompt by a CLIP that people's choices tuned.

It is the raw cosine, without the authors' factor of the exponential of ``logit_scale``, about 100: on a scale of 0.2,
not of 20.  Pictures are prepared as its processor does it, which is the same as ImageReward's at the model's size.  It
was checked on a small CLIPModel of random weights against transformers' own features and CLIPImageProcessor, not with
the released weights.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError, first_line, reading
from stepdistill.judges.clip import ClipScorer
from stepdistill.plain_files import read_json
from stepdistill.stock.loading import load_network

from .files import freeze, require_prompts
from .pixels import crop_square
from .settings import NEEDS, RewardSettings


class _TransformersClip(nn.Module):
    """A transformers CLIPModel with the two methods that a ClipScorer calls; tokens are a tokenizer's output."""

    model: Any

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def encode_image(self, images: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=images).pooler_output

    def encode_text(self, tokens: Any) -> Tensor:
        return self.model.get_text_features(**tokens).pooler_output


def load_pick_score(settings: RewardSettings, device: str | torch.device) -> Callable[[Tensor, list], Tensor]:
    """The score as a function of pixels and items.

    Raises:
        UserError: the model or its tokenizer is missing, or they do not fit each other.
    """
    model = _load_model(str(settings.weights))
    tokenizer = _load_tokenizer(settings, model.config.text_config)
    size, length = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings

    def tokenize(prompts: list[str]) -> Any:
        return tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")

    towers = freeze(_TransformersClip(model), device)
    scorer = ClipScorer(towers, None, tokenize, f"PickScore {settings.weights}", device=device, size=(size, size))
    return lambda pixels, items: scorer.cosine(crop_square(pixels, size), require_prompts(items, pixels, "pick_score"))


def _load_model(folder: str) -> Any:
    from transformers import CLIPModel

    remedy = f"download {NEEDS['pick_score']['weights']}, to that path"
    if not Path(folder).is_dir():
        raise UserError(f"reward pick_score: weights {folder} is no folder; {remedy}")
    what = f"reward pick_score: {folder}"
    with reading(what, remedy, "has no config.json of a model"):
        kind = read_json(Path(folder) / "config.json")["model_type"]
    if kind != "clip":
        raise UserError(f"{what} is a model of type {kind}, not clip; {remedy}")
    with reading(what, remedy, "cannot be loaded"):
        return load_network(CLIPModel, folder, what, remedy=remedy)


def _load_tokenizer(settings: RewardSettings, text: Any) -> Any:
    """The tokenizer in ``config``, else in ``weights``; transformers makes an empty one of a folder without files."""
    from transformers import CLIPTokenizer

    folder = Path(str(settings.config or settings.weights))
    remedy = "name the folder of laion/CLIP-ViT-H-14-laion2B-s32B-b79K's tokenizer as config"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"reward pick_score: {folder} has no tokenizer (tokenizer.json, or vocab.json); {remedy}")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise UserError(
            f"reward pick_score: the tokenizer in {folder} cannot be read ({first_line(error)}); {remedy}"
        ) from None
    if len(tokenizer) != text.vocab_size or text.eos_token_id not in (2, tokenizer.eos_token_id):  # 2: it is the last
        raise UserError(
            f"reward pick_score: the tokenizer in {folder} has {len(tokenizer)} tokens, end at "
            f"{tokenizer.eos_token_id}, and the model {text.vocab_size}, end at {text.eos_token_id}; {remedy}"
        )
    return tokenizer
