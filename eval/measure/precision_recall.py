"""Precision, recall and diversity of features: what one distance of two sets mixes into one number.

Distances are float64 from sums of squares, block by block; nothing is approximated.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor

from stepdistill.errors import UserError

BLOCK = 2000
"""Rows of a block of distances."""
MOST_OF_A_CONDITION = 1000
"""Pictures of one condition, the first ones, whose pairs :func:`diversity` takes."""


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """``|a_i - b_j|^2``, (N, M), float64, of float64 rows (N, F) and (M, F)."""
    return (a.square().sum(1)[:, None] + b.square().sum(1)[None] - 2 * a @ b.T).clamp(min=0)


def squared_radii(features: Tensor, k: int, block: int = BLOCK) -> Tensor:
    """The squared distance of each row (N, F), float64, to its k-th nearest other row, (N,)."""
    radii = []
    for start in range(0, len(features), block):
        distances = squared_distances(features[start : start + block], features)
        rows = torch.arange(len(distances), device=features.device)
        distances[rows, rows + start] = torch.inf  # of a row to itself
        radii.append(distances.kthvalue(k, dim=1).values)
    return torch.cat(radii)


def share_inside(points: Tensor, manifold: Tensor, radii: Tensor, block: int = BLOCK) -> float:
    """The share of ``points`` (N, F) in at least one of the balls around ``manifold`` (M, F), squared radii (M,)."""
    blocks = points.split(block)
    return sum(int((squared_distances(rows, manifold) <= radii).any(1).sum()) for rows in blocks) / len(points)


def precision_recall(
    real: Tensor, fake: Tensor, k: int = 3, device: str | torch.device = "cpu", block: int = BLOCK
) -> tuple[float, float]:
    """Improved precision and recall (Kynkäänniemi et al., 1904.06991, eq. 1 and 2).

    ``f(x, X) = 1`` where ``|x - x'| <= |x' - NN_k(x', X)|`` for some x' in X, NN_k the k-th nearest other; precision is
    the mean of f(fake, real), recall that of f(real, fake).  Both depend on the sets' sizes, which the paper has equal:
    of real (M, F) and fake (N, F) the first min(M, N) are used.

    Raises:
        UserError: no more than k of either.
    """
    count = min(len(real), len(fake))
    if count <= k:
        raise UserError(
            f"precision and recall: {len(real)} reference features and {len(fake)} pictures; each needs more than "
            f"{k} neighbours, raise samples or name a reference that keeps features"
        )
    real, fake = (x[:count].to(device, torch.float64) for x in (real, fake))
    centre = real.mean(0).round()  # so that squares are small; of whole numbers, so that what is exact stays so
    real, fake = real - centre, fake - centre
    precision = share_inside(fake, real, squared_radii(real, k, block), block)
    return precision, share_inside(real, fake, squared_radii(fake, k, block), block)


def diversity(features: Tensor, conditions: Sequence[Hashable], device: str | torch.device = "cpu") -> float | None:
    """How far apart pictures of one condition are: the mean over conditions of the mean pairwise distance,

    ``D = 1/|C| sum_c 2 / (n_c (n_c - 1)) sum_{i<j in c} |x_i - x_j|``

    of features (N, F) with their N conditions, as DMD2 (2405.14867, table 6) has it with LPIPS.  Conditions with one
    picture are left out; None where all have one.  Of a condition the first ``MOST_OF_A_CONDITION`` count.
    """
    rows: dict[Hashable, list[int]] = {}
    for row, condition in enumerate(conditions):
        rows.setdefault(condition, []).append(row)
    means = []
    for indices in rows.values():
        if len(indices) > 1:
            of_condition = features[indices[:MOST_OF_A_CONDITION]].to(device, torch.float64)
            of_condition = of_condition - of_condition.mean(0)
            above = torch.triu_indices(len(of_condition), len(of_condition), 1, device=of_condition.device)
            means.append(squared_distances(of_condition, of_condition)[above[0], above[1]].sqrt().mean())
    return float(torch.stack(means).mean()) if means else None
