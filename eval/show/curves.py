"""Distances of several students over their training, as one picture: curves above, a table below."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from stepdistill import files
from stepdistill.errors import UserError
from stepdistill.readers import parse_json, read_text
from stepdistill.run import differences

CURVE = "distances.json"
"""The file of a run's measurements over training."""
Curve = list[tuple[float, float]]
"""(network passes, distance), passes ascending."""


def read_curve(file: Path, protocol: dict[str, Any] | None = None) -> Curve:
    """The measurements of a run so far; none where the file is not there or cannot be read.

    Args:
        protocol: under which they must have been measured; a file that does not say is taken as it is.

    Raises:
        UserError: they were measured under another.
    """
    try:
        content = parse_json(read_text(file))
        there = content.get("protocol") if isinstance(content, dict) else None
        points = content["points"] if isinstance(content, dict) else content
        curve = [(float(passes), float(distance)) for passes, distance in points]
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return []
    if not all(math.isfinite(number) for point in curve for number in point):
        return []
    odd = differences(there, protocol) if there and protocol else []
    if odd:
        raise UserError(
            f"{file}: measured under another protocol: {'; '.join(odd[:3])}; give the same, or another output folder"
        )
    return curve


def write_curve(file: Path, curve: Curve, protocol: dict[str, Any]) -> None:
    """What :func:`read_curve` reads.

    Raises:
        UserError: it cannot be written.
    """
    files.write_json(file, {"protocol": protocol, "points": curve})


def at(curve: Curve, passes: float) -> float | None:
    """The distance of the last measurement at or before ``passes`` (with 2 percent of tolerance); None before any."""
    seen = [distance for done, distance in curve if done <= 1.02 * passes]
    return seen[-1] if seen else None


def spread(values: list[float], digits: int) -> str:
    """Their mean, ± their standard deviation (unbiased) where there are several."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def curves_table(curves: dict[str, list[Curve]], columns: list[float], teacher: float) -> list[list[str]]:
    """Header and one row a student: its distance at each of ``columns`` passes, and the last over the teacher's; of
    several training seeds their mean ± standard deviation, and the mean over the teacher's."""
    header = ["", *(f"{column / 1000:.0f}k" for column in columns), "last / teacher"]
    rows = []
    for name, seeds in curves.items():
        found = [[at(curve, column) for curve in seeds] for column in columns]
        cells = ["-" if None in distances else spread(distances, 3) for distances in found]
        last = [curve[-1][1] for curve in seeds if curve]
        rows.append([name, *cells, f"{statistics.fmean(last) / teacher:.2f}" if last else "-"])
    return [header, *rows]


def logarithmic(axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2, 3 and 5 of every power of ten."""
    axes.set_yscale("log")
    for which in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        which(lambda value, _: f"{value:g}" if f"{value:g}".lstrip("0.")[:1] in "1235" else "")


def in_thousands(axes) -> None:
    """An x axis of network passes: 200k."""
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")


def draw_curves(
    curves: dict[str, list[Curve]], teacher: float, teacher_name: str, metric: str, columns: list[float], path: Path
) -> Path:
    """Write the picture: a line for each training seed, in the student's colour; ``teacher`` is the distance that a
    dashed line stands at."""
    from matplotlib.figure import Figure

    cells = curves_table(curves, columns, teacher)
    figure = Figure(figsize=(8.4, 5.2 + 0.28 * len(cells)), layout="constrained", dpi=110)
    axes, below = figure.subplots(2, 1, height_ratios=[5, 0.42 * len(cells) + 0.3])
    colours = {name: f"C{number}" for number, name in enumerate(curves)}
    for name, seeds in curves.items():
        for again, curve in enumerate(filter(None, seeds)):
            own = {"color": colours[name], "label": None if again else name}
            axes.plot(*zip(*curve, strict=True), marker=".", linewidth=1.4 if len(seeds) == 1 else 1, **own)
    axes.axhline(teacher, color="black", linestyle="--", linewidth=1, label=teacher_name)
    logarithmic(axes)
    in_thousands(axes)
    axes.set_xlabel("network passes in training (one picture each; a backward pass counts as two, or one to the input)")
    axes.set_ylabel(metric)
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    below.axis("off")
    lengths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    widths = [length / sum(lengths) for length in lengths]
    table = below.table(
        cells[1:], colLabels=cells[0], colWidths=widths, loc="center", cellLoc="right", edges="horizontal"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    for row, name in enumerate(curves, 1):
        table[row, 0].set_text_props(color=colours[name], ha="left")
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path
