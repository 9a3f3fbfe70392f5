"""Rewards by what a config says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.config import Section
from stepdistill.errors import UserError
from stepdistill.judges.clip import ClipSettings
from stepdistill.judges.load import check_clip, load_clip
from stepdistill.plugins import import_attribute

from .aesthetic import load_aesthetic
from .files import read_state, require_prompts
from .hps import load_hps
from .image_reward import load_image_reward
from .pick_score import load_pick_score
from .reward import Reward
from .settings import NEEDS, RewardSettings
from .user import import_reward


def load_clip_cosine(settings: RewardSettings, device: str | torch.device) -> Callable[[Tensor, list], Tensor]:
    """The cosine of picture and prompt by any CLIP, as a function of pixels and items."""
    scorer = load_clip(settings.require_clip(), device)
    return lambda pixels, items: scorer.cosine(pixels, require_prompts(items, pixels, "clip"))


LOADERS: dict[str, Callable[[RewardSettings, str | torch.device], Callable[[Tensor, list], Tensor]]] = {
    "aesthetic": load_aesthetic,
    "image_reward": load_image_reward,
    "pick_score": load_pick_score,
    "hps": load_hps,
    "clip": load_clip_cosine,
}
"""What gives each kind's score; a user's is imported."""


def load_reward(settings: RewardSettings, device: str | torch.device = "cpu") -> Reward:
    """The reward that the settings name, on ``device``, frozen (eval, no parameter with a gradient).

    Raises:
        UserError: files or packages are missing, or are not what the reward needs.
    """
    _check_reward(settings)
    score = LOADERS.get(settings.reward, import_reward)(settings, device)
    return Reward(settings.reward, settings.weight, settings.hinge, score)


def load_rewards(settings: list[RewardSettings], device: str | torch.device = "cpu") -> list[Reward]:
    """:func:`load_reward` for each; a second one of a name is called ``name#2``, and so on."""
    loaded: list[Reward] = []
    for one in settings:
        reward = load_reward(one, device)
        count = sum(other.name.split("#")[0] == reward.name for other in loaded)
        loaded.append(replace(reward, name=f"{reward.name}#{count + 1}") if count else reward)
    return loaded


def check_models(value: Any, shape: tuple[int, int, int], items: list) -> None:
    """Refuse rewards and CLIP models, wherever they stand in a section, that are missing or whose files cannot be read;
    a user's (``module:attribute``) are loaded and tried.

    Args:
        shape: (C, H, W) of the pictures; items: prompts or labels of two of them, [] for none.

    Raises:
        UserError: a file, folder or module is missing or no such model.
    """
    if isinstance(value, ClipSettings):
        check_clip(value, shape, items)
    elif isinstance(value, list):
        for part in value:
            check_models(part, shape, items)
    elif isinstance(value, Section):
        if isinstance(value, RewardSettings):
            _check_reward(value)
            if ":" in value.reward:
                load_reward(value).try_on(shape, items)
            elif value.weights is not None and Path(value.weights).is_file():
                read_state(value.weights, value.reward)
        for _, part in value:
            check_models(part, shape, items)


def _check_reward(settings: RewardSettings) -> None:
    if ":" in settings.reward:
        import_attribute(settings.reward, "reward")
    for key in ("weights", "config"):
        path = getattr(settings, key)
        if path is not None and not Path(path).exists():
            what = NEEDS[settings.reward].get(key, "it")
            raise UserError(f"reward {settings.reward}: {key} {path} is missing; download {what}, to that path")
