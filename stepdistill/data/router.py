"""The router of several students (MSD, 2410.23274, section 4): which student draws which condition.

Every condition belongs to one student, for training and serving alike.  :mod:`stepdistill.data.partition` makes a
router; here it is applied, written and read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from stepdistill.errors import UserError, reading
from stepdistill.files import write_json
from stepdistill.plain_files import read_json

from .clustering import assign_to_centres, descend

FILE = "router.json"
Embed = Callable[[list[str]], Tensor]
"""Prompts to embeddings (B, D), float32."""


@dataclass(frozen=True)
class Router:
    """A partition: lists of labels, or numbers that cut embeddings; JSON throughout, so that its hash is the same
    wherever it is read."""

    kind: Literal["labels", "medians", "kmeans"]
    students: int
    parameters: dict[str, Any]
    encoder: str | None = None

    @property
    def hash(self) -> str:
        """SHA-256 of all that decides a route."""
        return hashlib.sha256(json.dumps(self._content(), sort_keys=True).encode()).hexdigest()

    def _content(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "students": self.students,
            "parameters": self.parameters,
            "encoder": self.encoder,
        }

    @property
    def labels(self) -> list[int]:
        """All labels that are divided, ascending; of a router of labels."""
        return sorted(label for part in self.parameters["labels"] for label in part)

    # -- routes --------------------------------------------------------------------------------------------

    def route_labels(self, labels: Sequence[int]) -> list[int]:
        """The student of each label.

        Raises:
            UserError: a label that belongs to none.
        """
        student_of = {label: k for k, part in enumerate(self.parameters["labels"]) for label in part}
        for label in labels:
            if label not in student_of:
                known = sorted(student_of)
                raise UserError(
                    f"label {label}: no student draws it; the students' labels are {known[0]}..{known[-1]}"
                    + ("" if len(known) == known[-1] - known[0] + 1 else " with gaps")
                )
        return [student_of[label] for label in labels]

    def route_embeddings(self, embeddings: Tensor) -> list[int]:
        """The student of each embedding (B, D)."""
        x = embeddings.detach().cpu().double()
        cells = descend(x, self.parameters) if self.kind == "medians" else assign_to_centres(x, self.parameters)
        return cells.tolist()

    def route_cached(self, prompts: list[str], embed: Embed, folder: Path) -> list[int]:
        """:meth:`route` of prompts, from a file in ``folder`` if it was made before; written there otherwise."""
        key = f"{self.hash} {json.dumps(prompts)}"
        file = folder / f"routes-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        with contextlib.suppress(OSError, ValueError):  # not there, or damaged: made anew
            routes = read_json(file, list)
            if len(routes) == len(prompts) and set(routes) <= set(range(self.students)):
                return routes
        routes = self.route(prompts, embed)
        write_json(file, routes)
        return routes

    def route(self, items: Sequence[Any], embed: Embed | None, batch: int = 64) -> list[int]:
        """The student of each label or prompt; a prompt's does not depend on the others.

        Raises:
            UserError: a label that belongs to none.
            ValueError: prompts without ``embed``.
        """
        if self.kind == "labels":
            return self.route_labels(items)
        if embed is None:
            raise ValueError("prompts are routed by their embeddings")
        distinct = list(dict.fromkeys(items))
        students = self.route_embeddings(embed_in_batches(distinct, embed, batch))
        student_of = dict(zip(distinct, students, strict=True))
        return [student_of[item] for item in items]

    # -- files ---------------------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write the router as JSON, with its hash.

        Raises:
            UserError: it cannot be written.
        """
        write_json(path, {**self._content(), "hash": self.hash})

    @classmethod
    def load(cls, path: Path) -> Router:
        """Read what :meth:`save` has written.

        Raises:
            UserError: not there, damaged, or changed since it was written.
        """
        if not path.exists():
            raise UserError(f"{path}: no such router; it is written when the students' training starts")
        with reading(path, "take the router that the students were trained with", "damaged"):
            content = read_json(path)
            router = cls(content["kind"], content["students"], content["parameters"], content["encoder"])
            written = str(content["hash"])
        if router.hash != written:
            raise UserError(
                f"{path}: its hash says {written[:12]} and its content is {router.hash[:12]}; it was changed, take the "
                "one that the students were trained with"
            )
        return router


def embed_in_batches(prompts: list[str], embed: Embed, batch: int = 64) -> Tensor:
    """Embeddings (N, D) on the CPU."""
    starts = range(0, len(prompts), batch)
    bar = tqdm(starts, desc="routes", unit="batch", disable=len(starts) < 20, leave=False)
    return torch.cat([embed(prompts[i : i + batch]).detach().cpu() for i in bar])
