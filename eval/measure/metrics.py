"""The numbers of one target: every metric of a seed's pictures, and what several seeds make of them."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from stepdistill.errors import UserError

from .precision_recall import diversity, precision_recall
from .sampling import BatchFeatures
from .settings import Protocol
from .tools import Tools


def compute_metrics(batch: BatchFeatures, seed: int, tools: Tools) -> dict[str, Any]:
    """Every metric of one seed's pictures; None where the protocol leaves it out."""
    protocol, reference = tools.protocol, tools.reference
    kid_mean = kid_std = precision = recall = None
    if protocol.kid and len(reference.features):
        kid_mean, kid_std = reference.kernel(batch.features, protocol.kid_subsets, protocol.kid_subset_size, seed)
    if protocol.precision_recall:
        precision, recall = precision_recall(reference.features, batch.features, protocol.neighbours, tools.device)
    return {
        "frechet": reference.frechet(batch.features),
        "kid_mean": kid_mean,
        "kid_std": kid_std,
        "precision": precision,
        "recall": recall,
        "clip_score": None if batch.scores is None else float(batch.scores.mean()),
        "rewards": {name: float(value.double().mean()) for name, value in batch.rewards.items()},
    }


def average_seeds(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The one seed's numbers, or means over seeds with ``std`` (unbiased) and all of them as ``per_seed``.

    ``kid_std`` is over subsets for one seed, over seeds for several.
    """
    first = metrics[0]
    if len(metrics) == 1:
        return first
    keys = [key for key, value in first.items() if isinstance(value, float) and key != "kid_std"]
    mean: dict[str, Any] = {key: statistics.fmean(row[key] for row in metrics) for key in keys}
    std: dict[str, Any] = {key: statistics.stdev(row[key] for row in metrics) for key in keys}
    names = first["rewards"]
    rewards = {name: statistics.fmean(row["rewards"][name] for row in metrics) for name in names}
    std["rewards"] = {name: statistics.stdev(row["rewards"][name] for row in metrics) for name in names}
    mean |= {"kid_std": std.get("kid_mean"), "rewards": rewards}
    return {**first, **mean, "std": std, "per_seed": metrics}


def check_diversity(name: str, conditions: list | None, protocol: Protocol) -> None:
    """Refuse a diversity of pictures none of which share a condition.

    Raises:
        UserError: each condition is drawn once.
    """
    if not protocol.diversity or conditions is None or protocol.seeds > 1:
        return
    if len(set(conditions)) == len(conditions):
        raise UserError(
            f"{name}: diversity is of pictures of one condition, and each of the {len(conditions)} is drawn once; draw "
            "more samples than conditions, or repeat with --seeds 2 or more"
        )


def compute_diversity(batches: list[BatchFeatures], conditions: list | None, tools: Tools) -> float | None:
    """The diversity of the pictures of all seeds together; None where the protocol leaves it out.

    ``conditions``: of one seed's pictures, the same for every seed; None for an unconditional pipeline.
    """
    if not tools.protocol.diversity:
        return None
    labels = [None] * tools.protocol.samples if conditions is None else conditions
    return diversity(torch.cat([batch.features for batch in batches]), labels * len(batches), tools.device)
