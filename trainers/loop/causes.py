"""Why updates were skipped, in words: what was not finite first, and what helps against that."""

from __future__ import annotations

from stepdistill.finiteness import NotFinite
from stepdistill.settings import RunSettings
from stepdistill.trainers.methods.base import CONDITIONS, REAL, REWARD

GRADIENT = "gradient"
"""What is not finite where all else is."""
FROZEN_SHARE, LEARNING_SHARE = 0.01, 0.5
"""Of a role's updates: where more are skipped the run ends, for causes that do not train and so will not mend, and for
those that may."""


def too_many(role: str, skipped: int, taken: int, in_a_row: int, limit: int, frozen: bool) -> str | None:
    """What ends the run, in words, where the skipped updates of a role are too many; None where they are not.

    Args:
        limit: ``train.non_finite_limit``, of skipped updates in a row.  Of those that were not in a row as many end it
            where the cause is ``frozen`` and they are more than 1 % of all, and ten times as many where they are most.
    """
    if in_a_row >= limit:
        return f"{in_a_row} non-finite gradients of the {role} in a row"
    share = skipped / (skipped + taken)
    if (frozen and skipped >= limit and share > FROZEN_SHARE) or (skipped >= 10 * limit and share > LEARNING_SHARE):
        return f"{skipped} of {skipped + taken} gradients of the {role} were non-finite"
    return None


def advice(cause: NotFinite | None, role: str, updates: dict[str, int], learning: set[str], config: RunSettings) -> str:
    """What is not finite and what to do about it, where an update of ``role`` was skipped.

    Args:
        cause: the first thing that was not finite; None where only the gradient is not.
        updates: by optimizer, how many were taken.
        learning: the names of the networks that train.
    """
    if cause is None:
        return f"every prediction is finite and the gradient is not; lower optimizer.{role}.lr"
    if cause.name == REAL:
        return "the real data are not finite; the teacher's VAE overflows: set teacher.dtype=float32"
    if cause.name == CONDITIONS:
        return "the encoded conditions are not finite; the text encoder overflows: set teacher.dtype=float32"
    if cause.name.startswith(REWARD):
        return f"{cause.name} gives numbers that are not finite; mend it, or remove it from the config"
    problem = f"the {cause.name}'s prediction is not finite{cause.when}"
    if cause.name not in learning:
        return f"{problem}; {_of_the_teacher(config)}"
    optimizer = next(name for name in (cause.name, "fake_score", role) if name in updates)
    if updates[optimizer] == 0:
        return f"{problem}, before its first update; {_of_the_teacher(config)}"
    return f"{problem}; lower optimizer.{optimizer}.lr"


def _of_the_teacher(config: RunSettings) -> str:
    teacher = config.teacher
    if teacher.dtype == "float16":
        return "load it in float32 or bfloat16 (float16 overflows): set teacher.dtype=float32"
    if teacher.dtype != "float32" or config.train.precision != "float32":
        return "set teacher.dtype=float32 and train.precision=float32"
    return f"the weights or the scheduler of {teacher.path} are broken; look at its own pictures"


def lines(skipped: dict[str, int], updates: dict[str, int], causes: dict[str, int]) -> list[str]:
    """What was skipped in a whole run, for its end; [] where nothing was."""
    skipped_lines = [
        f"note: {count} of {count + updates[role]} updates of the {role} were skipped, not finite"
        for role, count in skipped.items()
        if count
    ]
    names = ", ".join(f"{name} {count}" for name, count in sorted(causes.items()))
    return [*skipped_lines, f"note: what was not finite first, and how often: {names}"] if skipped_lines else []
