"""The lines of a dry run that every kind of plan shares."""

from __future__ import annotations

from collections.abc import Iterator

from stepdistill.families.base import Family

from .build import Fit, teacher_notes
from .prepare import Prepared


def student_line(prepared: Prepared) -> str:
    """The student's steps and times, and its size where that is not the teacher's."""
    family, sampler, changes = prepared.family, prepared.sampler, prepared.job.config.roles.network
    size = ""
    if changes is not None:
        student = sum(p.numel() for p in family.altered_network(changes).parameters())
        teacher = sum(p.numel() for p in family.network.parameters())
        size = f", {student / 1e6:.2f}M parameters ({student / teacher - 1:+.0%})"
    steps = "1 step" if sampler.steps == 1 else f"{sampler.steps} steps"
    return f"{steps} at t = {', '.join(f'{t:g}' for t in sampler.times)}{size}"


def data_lines(fit: Fit, family: Family) -> str:
    """What is trained on, whole lines with a title of ten characters; "" where there is nothing to say."""
    lines = fit.lines(family)
    return "".join(f"{'data' if number == 0 else '':10s}{line}\n" for number, line in enumerate(lines))


def method_lines(prepared: Prepared, indent: int) -> str:
    """What the method itself says of its plan, whole lines."""
    job = prepared.job
    return "".join(f"{' ' * indent}{line}\n" for line in job.method.describe(job.config))


def notes(prepared: Prepared) -> Iterator[str]:
    """What a user should know of the teacher, a line each."""
    for note in teacher_notes(prepared.family, prepared.sampler):
        yield f"note: {note}"
