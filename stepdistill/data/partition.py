"""Partitions of labels and prompts among several students (MSD, 2410.23274, section 4).

Labels: ``order`` (consecutive ones, the paper's choice on ImageNet), ``table``, ``random``.  Prompts, by the teacher's
text embeddings, averaged over the tokens that are no padding: ``medians`` (the first principal axis is cut at its
median, the second in each half at the median of that half, and so on: 2^m equal parts), or ``kmeans`` with offsets that
make the cells equal.  The paper cuts text embeddings "along 4 quadrants" and does not say of which axes, and did not
use k-means because its cells were uneven; ``medians`` and the offsets are choices made here.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator

from stepdistill.config import Section
from stepdistill.errors import UserError
from stepdistill.seeds import Seed

from .clustering import balanced_kmeans, nested_medians
from .router import Router, embed_in_batches

FIT_MOST = 50_000
"""Prompts that axes, medians and centres are fitted on, drawn at random from more."""


class PartitionSettings(Section):
    """The section ``msd``: how many students, and which conditions each draws."""

    students: int = Field(ge=1, le=1000, description="K")
    partition: Literal["order", "table", "random", "medians", "kmeans"] = Field(
        "order", description="of labels: order, table, random; of prompts: medians, kmeans"
    )
    table: list[list[int]] | None = Field(None, description="the labels of each student")
    seed: Seed = Field(0, description="of random and kmeans")

    @model_validator(mode="after")
    def _check_table(self) -> PartitionSettings:
        if (self.table is None) != (self.partition != "table"):
            raise ValueError("table goes with partition = table; set both or neither")
        if self.table is not None and len(self.table) != self.students:
            raise ValueError(f"table has {len(self.table)} lists for students = {self.students}; one for each")
        if self.table is not None and not all(self.table):
            raise ValueError("table: a student without labels has nothing to learn; give each some")
        if self.partition == "medians" and self.students & (self.students - 1):
            raise ValueError(f"partition = medians makes 2, 4, 8, ... parts, not {self.students}; use kmeans")
        return self


def make_router(settings: PartitionSettings, items: list[Any], kind: str, encoder: Any = None) -> Router:
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
    distinct = sorted(set(items))  # the order of the items decides nothing
    if len(distinct) < count:
        raise UserError(f"msd.students = {count}: there are only {len(distinct)} {kind}s; use fewer students")
    if kind == "label":
        return Router("labels", count, {"labels": _divide_labels(settings, distinct)})
    if len(distinct) > FIT_MOST:
        chosen = np.random.default_rng(settings.seed).choice(len(distinct), FIT_MOST, replace=False)
        distinct = [distinct[i] for i in sorted(chosen)]
    embeddings = embed_in_batches(distinct, lambda prompts: encoder(prompts)[1]).double()
    different = len(torch.unique(embeddings, dim=0))  # prompts that the encoder tells apart
    if different >= count:
        if how == "medians":
            router = Router("medians", count, nested_medians(embeddings, count), encoder.fingerprint)
        else:
            parameters = balanced_kmeans(embeddings, count, settings.seed)
            router = Router("kmeans", count, parameters, encoder.fingerprint)
        if len(set(router.route_embeddings(embeddings))) == count:
            return router
    raise UserError(
        f"msd.students = {count}: {different} different text embeddings cannot be divided among them by {how}; "
        "use fewer students, or more prompts"
    )


def _divide_labels(settings: PartitionSettings, labels: list[int]) -> list[list[int]]:
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
