"""Cells of equal size among points: nested medians along principal axes, and k-means with offsets.

No library has what this needs: scipy's and scikit-learn's k-means give cells of uneven size, and a router has to hold
numbers from which any machine computes the same cell.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

Parameters = dict[str, Any]
"""What :func:`descend` and :func:`assign_to_centres` need, in JSON's types."""


# -- medians -----------------------------------------------------------------------------------------------


def nested_medians(x: Tensor, count: int) -> Parameters:
    """``count`` = 2^m cells of points (N, D): the mean, m axes, and for each level the thresholds of its nodes."""
    levels = count.bit_length() - 1
    mean = x.mean(0)
    _, _, axes = torch.linalg.svd(x - mean, full_matrices=False)
    axes = torch.nn.functional.pad(axes, (0, 0, 0, max(0, levels - len(axes))))[:levels]
    signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # a decomposition leaves them undetermined
    parameters: Parameters = {"mean": _as_float32(mean), "axes": _as_float32(axes * signs), "thresholds": []}
    coordinates = _project(x, parameters)
    for level in range(levels):
        nodes = _descend(coordinates, parameters["thresholds"])
        cuts = []
        for node in range(2**level):
            values = coordinates[nodes == node, level].sort().values
            half = len(values) // 2
            if half == 0:  # nothing to cut
                cuts.append(coordinates.new_zeros(()))
                continue
            cuts.append((values[half - 1] + values[half]) / 2)  # between two points, so that none is at the threshold
        parameters["thresholds"].append(_as_float32(torch.stack(cuts)))
    return parameters


def descend(x: Tensor, parameters: Parameters) -> Tensor:
    """The cell of each point (N, D) by :func:`nested_medians`' parameters, (N,)."""
    return _descend(_project(x, parameters), parameters["thresholds"])


def _project(x: Tensor, parameters: Parameters) -> Tensor:
    """Coordinates (N, m) along the axes."""
    mean = torch.tensor(parameters["mean"], dtype=torch.float64)
    return (x - mean) @ torch.tensor(parameters["axes"], dtype=torch.float64).reshape(-1, x.shape[1]).T


def _descend(coordinates: Tensor, thresholds: list[list[float]]) -> Tensor:
    """Nodes (N,): at level l the l-th coordinate is compared with the threshold of the node reached so far."""
    nodes = torch.zeros(len(coordinates), dtype=torch.long)
    for level, of_nodes in enumerate(thresholds):
        right = coordinates[:, level] > torch.tensor(of_nodes, dtype=torch.float64)[nodes]
        nodes = 2 * nodes + right
    return nodes


# -- k-means -----------------------------------------------------------------------------------------------


def balanced_kmeans(x: Tensor, count: int, seed: int, rounds: int = 50) -> Parameters:
    """Lloyd's rounds on points (N, D) with cells ``argmin |x - c_k|^2 - w_k``: the offsets w make them equal (a power
    diagram)."""
    generator = np.random.default_rng(seed)
    centres = x[[int(generator.integers(len(x)))]]
    while len(centres) < count:  # k-means++
        weight = _squared_distances(x, centres).min(1).values.clamp(min=0)
        share = (weight / weight.sum()).numpy() if weight.sum() > 0 else None
        centres = torch.cat([centres, x[[int(generator.choice(len(x), p=share))]]])
    offsets = torch.zeros(count, dtype=torch.float64)
    for _ in range(rounds):
        distances = _squared_distances(x, centres)
        offsets = _equal_offsets(distances, offsets)
        cell = (distances - offsets).argmin(1)
        moved = torch.stack([x[cell == k].mean(0) if (cell == k).any() else centres[k] for k in range(count)])
        if torch.equal(moved, centres):
            break
        centres = moved
    stored = torch.tensor(_as_float32(centres), dtype=torch.float64)
    offsets = _equal_offsets(_squared_distances(x, stored), offsets, 400)
    return {"centres": _as_float32(centres), "offsets": _as_float32(offsets)}


def assign_to_centres(x: Tensor, parameters: Parameters) -> Tensor:
    """The cell of each point (N, D) by :func:`balanced_kmeans`' parameters, (N,)."""
    centres = torch.tensor(parameters["centres"], dtype=torch.float64)
    offsets = torch.tensor(parameters["offsets"], dtype=torch.float64)
    return (_squared_distances(x, centres) - offsets).argmin(1)


def _equal_offsets(distances: Tensor, offsets: Tensor, sweeps: int = 60) -> Tensor:
    """Offsets (K,) with cells as equal as they get: each in turn is set so that its cell has N / K."""
    total, count = distances.shape
    best, least = offsets, total + 1
    for _ in range(sweeps):
        sizes = torch.bincount((distances - offsets).argmin(1), minlength=count)
        worst = int((sizes - total / count).abs().max())
        if worst < least:
            best, least = offsets.clone(), worst
        if worst <= 1:
            break
        k = int((sizes - total / count).abs().argmax())
        others = (distances - offsets)[:, [j for j in range(count) if j != k]].min(1).values
        needed = (distances[:, k] - others).sort().values  # a point is k's where the offset is above this
        rank = min(max(1, round(total / count)), total - 1)
        offsets = offsets.clone()
        offsets[k] = (needed[rank - 1] + needed[rank]) / 2
    return best


def _squared_distances(x: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(x, centres).square()


def _as_float32(values: Tensor) -> list[Any]:
    """Nested lists of numbers rounded to float32."""
    return values.float().tolist()
