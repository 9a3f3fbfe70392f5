"""What the times of a student's and its teacher's calls mean.

A student's call should cost its network passes.  Text encoder and decoder run once whoever draws, so the speed-up over
the teacher is compared with two things: the ratio of network passes, and what the parts allow, the same ratio with the
student's time a pass for both and the text encoder and decoder of each.
"""

from __future__ import annotations

import torch

from stepdistill.eval.show.tables import Cells, text_table

from .inference import Inference, Row
from .latency import PARTS, device_name
from .negative_cost import time_negative_prompts


def speed_up(teacher: Row, student: Row) -> dict[str, float]:
    """The whole call's speed-up, the ratio of network passes, and what the parts allow.

    ``allowed`` is ``(text + decoder + passes pass)_teacher / (text + decoder + passes pass)_student`` with the
    student's time a pass for both: what would be reached if nothing but the parts took time.
    """
    one_pass = student.milliseconds("denoiser") / student.latency.passes

    def parts(row: Row) -> float:
        return row.milliseconds("text_encoder") + row.milliseconds("decoder") + row.latency.passes * one_pass

    return {
        "speed_up": teacher.latency.seconds / student.latency.seconds,
        "passes": teacher.latency.passes / student.latency.passes,
        "denoiser": teacher.milliseconds("denoiser") / student.milliseconds("denoiser"),
        "allowed": parts(teacher) / parts(student),
    }


def describe(case: Inference, rows: list[Row]) -> str:
    """The rows in milliseconds, and the speed-up in words."""
    network = case.student.denoiser
    parameters = sum(p.numel() for p in network.parameters()) / 1e6
    head = (
        f"{type(network).__name__} of {parameters:.2f}M, {str(network.dtype).removeprefix('torch.')}, batch "
        f"{case.batch_size}, {device_name(case.student.device)}, {torch.get_num_threads()} threads; ms a call"
    )
    teacher, *students = rows
    lines = [head, text_table(_list_cells(rows)), *(_describe_speed_up(teacher, row) for row in students[:2])]
    cost = time_negative_prompts(case.student, case.batch_size, case.student_guidance, case.repeats)
    if cost is not None:
        lines.append(
            f"a negative prompt: the pass's cross-attentions take {cost['plain']:.2f} ms without, {cost['fused']:.2f} "
            f"with both branches in one call, {cost['two']:.2f} in two ({cost['fused'] / cost['two']:.2f} of it)"
        )
    return "\n".join(lines)


def _list_cells(rows: list[Row]) -> Cells:
    """A header, and the parts of each row's call."""
    names = [name.replace("_", " ") for name in PARTS]
    cells = [["", "steps", "passes", *names, "call", "rest %", "images/s", "peak GiB"]]
    for row in rows:
        milliseconds = [f"{row.milliseconds(part):.2f}" for part in PARTS]
        latency = row.latency
        cells.append(
            [
                f"{row.name}, {row.setup}",
                str(row.steps),
                f"{latency.passes:g}",
                *milliseconds,
                f"{1000 * latency.seconds:.2f}",
                f"{latency.shares['rest']:.1%}",
                f"{latency.images_per_second:.2f}",
                "-" if row.peak is None else f"{row.peak:.2f}",
            ]
        )
    if all(row.peak is None for row in rows):
        return [row[:-1] for row in cells]
    return cells


def _describe_speed_up(teacher: Row, student: Row) -> str:
    ratios = speed_up(teacher, student)
    return (
        f"{student.setup}: {ratios['speed_up']:.1f} x the teacher's speed; {ratios['passes']:g} x fewer passes "
        f"({ratios['speed_up'] / ratios['passes']:.2f} of it; the denoiser alone "
        f"{ratios['denoiser'] / ratios['passes']:.2f}); the parts allow {ratios['allowed']:.1f} "
        f"({ratios['speed_up'] / ratios['allowed']:.2f} of it)"
    )
