"""The table of a comparison: what every entry reached, and what it cost."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from stepdistill.eval.show.curves import spread

from .contestants import Contestant, read_cost


def summary(teacher: dict[str, Any], rows: list[tuple[Contestant, int | None, dict[str, Any]]]) -> list[list[str]]:
    """Header, the teacher, and a row for each entry and number of steps: means over training seeds, ± their standard
    deviation (unbiased) where there are several; best distance first."""
    groups: dict[tuple[str, int], list[tuple[Contestant, dict[str, Any]]]] = {}
    for made, _, row in rows:
        groups.setdefault((made.title, row["steps"]), []).append((made, row))
    measures = [("distance", "frechet", 3), ("precision", "precision", 3), ("recall", "recall", 3)]
    measures += [("diversity", "diversity", 2), ("CLIP", "clip_score", 4)]
    shown = [m for m in measures if teacher.get(m[1]) is not None]
    header = [
        "",
        "steps",
        *(name for name, _, _ in shown),
        "over teacher",
        "passes",
        "minutes",
        "peak GiB",
        "trained",
        "seeds",
    ]
    own = [f"{teacher[key]:.{digits}f}" for _, key, digits in shown]
    cells = [header, ["teacher", str(teacher["steps"]), *own, "1.00", "", "", "", "", ""]]
    ordered = sorted(groups.items(), key=lambda item: fmean([row["frechet"] for _, row in item[1]]))
    for (title, steps), group in ordered:
        values = [spread([row[key] for _, row in group], digits) for _, key, digits in shown]
        ratio = fmean([row["frechet"] for _, row in group]) / teacher["frechet"]
        cells.append(
            [title, str(steps), *values, f"{ratio:.2f}", *_costs([made for made, _ in group]), str(len(group))]
        )
    return cells


def _costs(made: list[Contestant]) -> list[str]:
    """Passes (a tuning's on top of its base's), minutes, peak memory, trained parameters: means over seeds."""
    costs = [(read_cost(one), read_cost(one.base) if one.base else None) for one in made]
    if not all(cost and base != {} for cost, base in costs):
        return ["-"] * 4
    passes = f"{fmean([cost['passes'] for cost, _ in costs]) / 1000:.0f}k"
    if costs[0][1]:
        passes = f"{fmean([base['passes'] for _, base in costs]) / 1000:.0f}k + {passes}"
    first = costs[0][0]
    several = f"{first['students']} x " if first["students"] > 1 else ""
    peak = "-" if first["peak_gib"] is None else f"{fmean([cost['peak_gib'] for cost, _ in costs]):.2f}"
    minutes = f"{fmean([cost['minutes'] for cost, _ in costs]):.1f}"
    return [passes, minutes, peak, f"{several}{first['parameters'] / 1e6:.2f}M"]


def aligned(cells: list[list[str]]) -> str:
    """Cells as text, right-aligned columns."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)


def markdown(cells: list[list[str]]) -> str:
    """Cells as a Markdown table, the first row its header."""
    header, *rows = cells
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]) + "\n"
