"""Which student draws which condition: partitions of labels and prompts, and the router that remembers one (MSD,
2410.23274, section 4).

Every condition belongs to one student, for training and serving alike.  Labels: ``order`` (consecutive ones, the
paper's choice on ImageNet), ``table``, ``random``.  Prompts, by the teacher's own text embeddings, averaged over the
tokens that are no padding: ``medians`` (the first principal axis is cut at its median, the second in each half at that
half's own, and so on: 2^m equal parts), or ``kmeans`` with offsets that make the cells equal.  The paper cuts text
embeddings "along 4 quadrants" and does not say of which axes, and did not use k-means because its cells were uneven;
``medians`` and the offsets are choices made here.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from tqdm import tqdm

from stepdistill.config import Section
from stepdistill.errors import UserError, reading
from stepdistill.files import write_json
from stepdistill.readers import read_json
from stepdistill.seeds import Seed

FILE = "router.json"
FIT_MOST = 50_000
"""Prompts that axes, medians and centres are fitted on, drawn at random from more."""
Embed = Callable[[list[str]], Tensor]
"""Prompts to embeddings (B, D), float32."""


class PartitionSettings(Section):
    """The section ``msd``: how many students, and who draws what."""

    students: int = Field(ge=1, le=1000, description="K")
    partition: Literal["order", "table", "random", "medians", "kmeans"] = Field(
        "order", description="of labels: order, table, random; of prompts: medians, kmeans"
    )
    table: list[list[int]] | None = Field(None, description="the labels of each student")
    seed: Seed = Field(0, description="of random and kmeans")

    @model_validator(mode="after")
    def _whole(self):
        if (self.table is None) != (self.partition != "table"):
            raise ValueError("table goes with partition = table; set both or neither")
        if self.table is not None and len(self.table) != self.students:
            raise ValueError(f"table has {len(self.table)} lists for students = {self.students}; one for each")
        if self.table is not None and not all(self.table):
            raise ValueError("table: a student without labels has nothing to learn; give each some")
        if self.partition == "medians" and self.students & (self.students - 1):
            raise ValueError(f"partition = medians makes 2, 4, 8, ... parts, not {self.students}; use kmeans")
        return self


@dataclass(frozen=True)
class Router:
    """A partition.  ``parts`` of labels (K lists), or numbers that cut embeddings; JSON throughout, so that its hash is
    the same wherever it is read."""

    kind: Literal["labels", "medians", "kmeans"]
    students: int
    parameters: dict[str, Any]
    encoder: str | None = None

    @property
    def hash(self) -> str:
        """SHA-256 of all that decides a route."""
        return hashlib.sha256(json.dumps(self._said(), sort_keys=True).encode()).hexdigest()

    def _said(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "students": self.students,
            "parameters": self.parameters,
            "encoder": self.encoder,
        }

    @property
    def labels(self) -> list[int]:
        """All that are divided, ascending; of a router of labels."""
        return sorted(label for part in self.parameters["labels"] for label in part)

    # -- routes --------------------------------------------------------------------------------------------

    def route_labels(self, labels: Sequence[int]) -> list[int]:
        """The student of each label.

        Raises:
            UserError: a label that belongs to none.
        """
        owner = {label: k for k, part in enumerate(self.parameters["labels"]) for label in part}
        for label in labels:
            if label not in owner:
                known = sorted(owner)
                raise UserError(
                    f"label {label}: no student draws it; the students' labels are {known[0]}..{known[-1]}"
                    + ("" if len(known) == known[-1] - known[0] + 1 else " with gaps")
                )
        return [owner[label] for label in labels]

    def route_embeddings(self, embeddings: Tensor) -> list[int]:
        """The student of each embedding (B, D)."""
        x = embeddings.detach().cpu().double()
        if self.kind == "medians":
            return _down_the_tree(_projected(x, self.parameters), self.parameters["thresholds"]).tolist()
        centres = torch.tensor(self.parameters["centres"], dtype=torch.float64)
        offsets = torch.tensor(self.parameters["offsets"], dtype=torch.float64)
        return (_squared_distances(x, centres) - offsets).argmin(1).tolist()

    def kept_routes(self, prompts: list[str], embed: Embed, folder: Path) -> list[int]:
        """:meth:`route` of prompts, from a file in ``folder`` if it was made before; written there otherwise."""
        said = f"{self.hash} {json.dumps(prompts)}"
        file = folder / f"routes-{hashlib.sha256(said.encode()).hexdigest()[:16]}.json"
        with contextlib.suppress(OSError, ValueError):  # not there, or damaged: made anew
            found = read_json(file, list)
            if len(found) == len(prompts) and set(found) <= set(range(self.students)):
                return found
        found = self.route(prompts, embed)
        write_json(file, found)
        return found

    def route(self, items: Sequence, embed: Embed | None, batch: int = 64) -> list[int]:
        """The student of each label or prompt; a prompt's does not depend on those beside it.

        Raises:
            UserError: a label that belongs to none.
        """
        if self.kind == "labels":
            return self.route_labels(items)
        distinct = list(dict.fromkeys(items))
        found = dict(zip(distinct, self.route_embeddings(_embedded(distinct, embed, batch)), strict=True))
        return [found[item] for item in items]

    # -- files ---------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Raises:
        UserError: it cannot be written."""
        write_json(path, {**self._said(), "hash": self.hash})

    @classmethod
    def load(cls, path: Path) -> Router:
        """Raises:
        UserError: not there, damaged, or changed since it was written."""
        if not path.exists():
            raise UserError(f"{path}: no such router; it is written when the students' training starts")
        with reading(path, "take the router that the students were trained with", "damaged"):
            said = read_json(path)
            router = cls(said["kind"], said["students"], said["parameters"], said["encoder"])
            written = str(said["hash"])
        if router.hash != written:
            raise UserError(
                f"{path}: its hash says {written[:12]} and its content is {router.hash[:12]}; it was changed, take the "
                "one that the students were trained with"
            )
        return router


# -- making one --------------------------------------------------------------------------------------------


def make_router(settings: PartitionSettings, items: list, kind: str, encoder: Any = None) -> Router:
    """The router of labels or prompts ``items``; a function of its arguments alone.

    Args:
        kind: the teacher's conditions, ``none``, ``label`` or ``prompt``.
        encoder: for prompts, with a ``fingerprint``; called on prompts it gives hidden states and embeddings.

    Raises:
        UserError: a partition that does not fit the conditions, or more students than conditions.
    """
    count, how = settings.students, settings.partition
    if kind == "none":
        raise UserError("msd: this teacher takes no conditions, so there is nothing to divide among students")
    fits = ("order", "table", "random") if kind == "label" else ("medians", "kmeans")
    if how not in fits:
        raise UserError(f"msd.partition = {how}: for a teacher of {kind}s use one of {', '.join(fits)}")
    distinct = sorted(set(items))  # the order that they are given in decides nothing
    if len(distinct) < count:
        raise UserError(f"msd.students = {count}: there are only {len(distinct)} {kind}s; use fewer students")
    if kind == "label":
        return Router("labels", count, {"labels": _label_parts(settings, sorted(distinct))})
    if len(distinct) > FIT_MOST:
        chosen = np.random.default_rng(settings.seed).choice(len(distinct), FIT_MOST, replace=False)
        distinct = [distinct[i] for i in sorted(chosen)]
    embeddings = _embedded(distinct, lambda prompts: encoder(prompts)[1]).double()
    different = len(torch.unique(embeddings, dim=0))  # that the encoder tells apart
    if different >= count:
        made = _medians(embeddings, count) if how == "medians" else _balanced_kmeans(embeddings, count, settings.seed)
        router = Router(how, count, made, encoder.fingerprint)
        if len(set(router.route_embeddings(embeddings))) == count:
            return router
    raise UserError(
        f"msd.students = {count}: {different} different text embeddings cannot be divided among them by {how}; "
        "use fewer students, or more prompts"
    )


def _label_parts(settings: PartitionSettings, labels: list[int]) -> list[list[int]]:
    if settings.table is None:
        order = list(labels)
        if settings.partition == "random":
            order = [labels[i] for i in np.random.default_rng(settings.seed).permutation(len(labels))]
        return [sorted(int(label) for label in part) for part in np.array_split(order, settings.students)]
    named = [label for part in settings.table for label in part]
    for label in named:
        if label not in labels:
            raise UserError(f"msd.table: label {label} is not one of the run's {labels[0]}..{labels[-1]}")
        if named.count(label) > 1:
            raise UserError(f"msd.table: label {label} stands twice; every label belongs to one student")
    missing = sorted(set(labels) - set(named))
    if missing:
        raise UserError(f"msd.table: label {missing[0]} belongs to no student; add it to one")
    return [sorted(part) for part in settings.table]


def _embedded(prompts: list[str], embed: Embed, batch: int = 64) -> Tensor:
    """(N, D) on the CPU."""
    starts = range(0, len(prompts), batch)
    bar = tqdm(starts, desc="routes", unit="batch", disable=len(starts) < 20, leave=False)
    return torch.cat([embed(prompts[i : i + batch]).detach().cpu() for i in bar])


def _as_float32(values: Tensor) -> list:
    """Nested lists of what float32 keeps."""
    return values.float().tolist()


def _projected(x: Tensor, parameters: dict[str, Any]) -> Tensor:
    """(N, m) coordinates along the axes."""
    mean = torch.tensor(parameters["mean"], dtype=torch.float64)
    return (x - mean) @ torch.tensor(parameters["axes"], dtype=torch.float64).reshape(-1, x.shape[1]).T


def _down_the_tree(coordinates: Tensor, thresholds: list[list[float]]) -> Tensor:
    """Leaves (N,): at level l the l-th coordinate against its node's threshold."""
    node = torch.zeros(len(coordinates), dtype=torch.long)
    for level, own in enumerate(thresholds):
        right = coordinates[:, level] > torch.tensor(own, dtype=torch.float64)[node]
        node = 2 * node + right
    return node


def _medians(x: Tensor, count: int) -> dict[str, Any]:
    """Nested medians along the principal axes, (mean, axes, thresholds a level)."""
    levels = count.bit_length() - 1
    mean = x.mean(0)
    _, _, axes = torch.linalg.svd(x - mean, full_matrices=False)
    axes = torch.nn.functional.pad(axes, (0, 0, 0, max(0, levels - len(axes))))[:levels]
    signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()  # a decomposition leaves them open
    parameters: dict[str, Any] = {"mean": _as_float32(mean), "axes": _as_float32(axes * signs), "thresholds": []}
    coordinates = _projected(x, parameters)
    for level in range(levels):
        node = _down_the_tree(coordinates, parameters["thresholds"])
        cuts = []
        for own in range(2**level):
            values = coordinates[node == own, level].sort().values
            half = len(values) // 2
            if half == 0:  # nothing to cut
                cuts.append(coordinates.new_zeros(()))
                continue
            cuts.append((values[half - 1] + values[half]) / 2)  # between two, so that none stands on it
        parameters["thresholds"].append(_as_float32(torch.stack(cuts)))
    return parameters


def _squared_distances(x: Tensor, centres: Tensor) -> Tensor:
    return torch.cdist(x, centres).square()


def _balanced_kmeans(x: Tensor, count: int, seed: int, rounds: int = 50) -> dict[str, Any]:
    """Lloyd's rounds with cells ``argmin |x - c_k|^2 - w_k``: the offsets w make them equal (a power diagram)."""
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
    kept = torch.tensor(_as_float32(centres), dtype=torch.float64)
    offsets = _equal_offsets(_squared_distances(x, kept), offsets, 400)
    return {"centres": _as_float32(centres), "offsets": _as_float32(offsets)}


def _equal_offsets(distances: Tensor, offsets: Tensor, sweeps: int = 60) -> Tensor:
    """Offsets (K,) with cells as equal as they get: each in turn is set so that its own cell has N / K."""
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
