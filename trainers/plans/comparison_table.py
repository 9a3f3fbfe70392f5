"""The table of a comparison: what every run reached, and what it cost."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from stepdistill.eval.show.curves import format_spread

from .compared import ComparedRun, read_cost

MEASURES = [
    ("distance", "frechet", 3),
    ("precision", "precision", 3),
    ("recall", "recall", 3),
    ("diversity", "diversity", 2),
    ("CLIP", "clip_score", 4),
]
"""Title, key of an evaluation's rows, digits."""
COSTS = ["passes", "minutes", "peak GiB", "trained"]
Row = dict[str, Any]


def summary_table(teacher: Row, rows: list[tuple[ComparedRun, Row]]) -> list[list[str]]:
    """Header, the teacher, and a line for each title and number of steps: means over training seeds, ± their standard
    deviation (unbiased) where there are several; best distance first."""
    groups: dict[tuple[str, int], list[tuple[ComparedRun, Row]]] = {}
    for run, row in rows:
        groups.setdefault((run.title, row["steps"]), []).append((run, row))
    measures = [measure for measure in MEASURES if teacher.get(measure[1]) is not None]
    titles = [title for title, _, _ in measures]
    cells = [["", "steps", *titles, "over teacher", *COSTS, "seeds"]]
    values = [f"{teacher[key]:.{digits}f}" for _, key, digits in measures]
    cells.append(["teacher", str(teacher["steps"]), *values, "1.00", *([""] * len(COSTS)), ""])
    for (title, steps), group in sorted(groups.items(), key=lambda item: _mean_distance(item[1])):
        values = [format_spread([row[key] for _, row in group], digits) for _, key, digits in measures]
        ratio = _mean_distance(group) / teacher["frechet"]
        costs = cost_cells([run for run, _ in group])
        cells.append([title, str(steps), *values, f"{ratio:.2f}", *costs, str(len(group))])
    return cells


def _mean_distance(group: list[tuple[ComparedRun, Row]]) -> float:
    return fmean([row["frechet"] for _, row in group])


def cost_cells(runs: list[ComparedRun]) -> list[str]:
    """Passes (a tuning's on top of the tuned run's), minutes, peak memory, trained parameters: means over seeds."""
    costs = [read_cost(run.folder) for run in runs]
    before = [read_cost(run.tuned.folder) for run in runs if run.tuned is not None]
    if not all(costs) or not all(before):
        return ["-"] * len(COSTS)
    passes = _thousands(costs)
    if before:
        passes = f"{_thousands(before)} + {passes}"
    minutes = f"{fmean([cost['minutes'] for cost in costs]):.1f}"
    peak = "-"
    if costs[0]["peak_gib"] is not None:
        peak = f"{fmean([cost['peak_gib'] for cost in costs]):.2f}"
    trained = f"{costs[0]['parameters'] / 1e6:.2f}M"
    if costs[0]["students"] > 1:
        trained = f"{costs[0]['students']} x {trained}"
    return [passes, minutes, peak, trained]


def _thousands(costs: list[dict[str, Any]]) -> str:
    return f"{fmean([cost['passes'] for cost in costs]) / 1000:.0f}k"
