"""The raw configs of several students, from the one that they share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepdistill.config import merge
from stepdistill.data.router import FILE
from stepdistill.errors import UserError
from stepdistill.seeds import LARGEST

SEED_STEP = 100
"""Between students' seeds: more than the offsets within a run."""


def split_shared(stages: list[dict[str, Any]], where: str) -> tuple[list, list]:
    """The raw stages that all students share, and those of each student.

    Raises:
        UserError: shared stages do not come first, or are all.
    """
    shared = [stage for stage in stages if stage.get("shared")]
    if stages[: len(shared)] != shared:
        raise UserError(f"{where}: stages: those with shared = true come before the students' own")
    if stages and len(shared) == len(stages):
        raise UserError(f"{where}: stages: all are shared; at least the last one must be each student's own")
    return shared, stages[len(shared) :]


def seed_of(raw: dict[str, Any], student: int) -> Any:
    """A student's seed in a raw config or stage; what is no integer stays, and is refused with its key later.

    Raises:
        UserError: it is above the largest seed.
    """
    seed = raw.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed > LARGEST:
        return seed
    moved = seed + SEED_STEP * student
    if moved > LARGEST:
        raise UserError(f"seed = {seed}: student {student}'s would be {moved:,}, above {LARGEST:,}; take a lower seed")
    return moved


def raw_student(common: dict[str, Any], student: int, output: Path) -> dict[str, Any]:
    """The raw config of one student's run or stages; ``output`` is the folder of the whole."""
    changes = {
        "output": str(output / f"student-{student}"),
        "seed": seed_of(common, student),
        "data": {"part": {"router": str(output / FILE), "student": student}},
        "evaluation": {"enabled": False},
    }
    return merge(common, changes)
