"""The numbers of one target: every metric of a seed's pictures, and what several seeds make of them."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

import torch

from stepdistill.errors import UserError

from .precision_recall import diversity, precision_recall
from .sampling import Looked

if TYPE_CHECKING:
    from .evaluate import EvaluationSettings, _Tools


def numbers(looked: Looked, seed: int, tools: _Tools) -> dict[str, Any]:
    """Every metric of one seed's pictures."""
    settings, reference = tools.settings, tools.reference
    kid: tuple = (None, None)
    if settings.kid and len(reference.features):
        kid = reference.kernel(looked.features, settings.kid_subsets, settings.kid_subset_size, seed)
    both: tuple = (None, None)
    if settings.precision_recall:
        both = precision_recall(reference.features, looked.features, settings.neighbours, tools.device)
    return {
        "frechet": reference.frechet(looked.features),
        "kid_mean": kid[0],
        "kid_std": kid[1],
        "precision": both[0],
        "recall": both[1],
        "clip_score": None if looked.scores is None else float(looked.scores.mean()),
        "rewards": {name: float(value.double().mean()) for name, value in looked.rewards.items()},
    }


def over_seeds(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The one seed's numbers, or means over seeds with ``std`` (unbiased) and all of them as ``per_seed``.

    ``kid_std`` is over subsets for one seed, over seeds for several.
    """
    if len(found) == 1:
        return found[0]
    keys = [key for key, value in found[0].items() if isinstance(value, float) and key != "kid_std"]
    mean = {key: statistics.fmean(own[key] for own in found) for key in keys}
    std = {key: statistics.stdev(own[key] for own in found) for key in keys}
    names = found[0]["rewards"]
    rewards = {name: statistics.fmean(own["rewards"][name] for own in found) for name in names}
    std["rewards"] = {name: statistics.stdev(own["rewards"][name] for own in found) for name in names}
    mean |= {"kid_std": std.get("kid_mean"), "rewards": rewards}
    return {**found[0], **mean, "std": std, "per_seed": found}


def check_diversity(name: str, conditions: list | None, settings: EvaluationSettings) -> None:
    alone = conditions is not None and len(set(conditions)) == len(conditions) and settings.seeds == 1
    if settings.diversity and alone:
        raise UserError(
            f"{name}: diversity is of pictures of one condition, and each of the {len(conditions)} is drawn once; draw "
            "more samples than conditions, or repeat with --seeds 2 or more"
        )


def pooled_diversity(looked: list[Looked], conditions: list | None, tools: _Tools) -> float | None:
    """Over the pictures of all seeds together."""
    if not tools.settings.diversity:
        return None
    own = [None] * tools.settings.samples if conditions is None else conditions
    return diversity(torch.cat([part.features for part in looked]), own * len(looked), tools.device)
