"""Distances of students over their training: the file of a run's measurements, a table, and one picture of both."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from stepdistill import files
from stepdistill.errors import UserError
from stepdistill.plain_files import parse_json, read_text
from stepdistill.run import differences

from .plots import style_axes, use_logarithm, use_thousands
from .tables import Cells

CURVE = "distances.json"
"""The file of a run's measurements over training."""
Curve = list[tuple[float, float]]
"""(network passes, distance), passes ascending."""


def read_curve(file: Path, protocol: dict[str, Any] | None = None) -> Curve:
    """The measurements of a run so far; none where there is no file or it cannot be read.

    Args:
        protocol: under which they must have been measured; a file that does not say is taken as it is.

    Raises:
        UserError: they were measured under another.
    """
    try:
        content = parse_json(read_text(file))
        written = content.get("protocol") if isinstance(content, dict) else None
        points = content["points"] if isinstance(content, dict) else content
        curve = [(float(passes), float(distance)) for passes, distance in points]
    except (OSError, ValueError, TypeError, KeyError, OverflowError):
        return []
    if not all(math.isfinite(number) for point in curve for number in point):
        return []
    odd = differences(written, protocol) if written and protocol else []
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


def distance_at(curve: Curve, passes: float) -> float | None:
    """The distance of the last measurement at or before ``passes`` (with 2 percent of tolerance); None before any."""
    distances = [distance for done, distance in curve if done <= 1.02 * passes]
    return distances[-1] if distances else None


def format_spread(values: list[float], digits: int) -> str:
    """Their mean, ± their standard deviation (unbiased) where there are several."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def curves_table(curves: dict[str, list[Curve]], columns: list[float], teacher: float) -> Cells:
    """Header and one row a student: its distance at each of ``columns`` passes, and the last over the teacher's; of
    several training seeds their mean ± standard deviation, and the mean over the teacher's."""
    header = ["", *(f"{column / 1000:.0f}k" for column in columns), "last / teacher"]
    rows = []
    for name, seeds in curves.items():
        cells = []
        for column in columns:
            distances = [distance_at(curve, column) for curve in seeds]
            known = [distance for distance in distances if distance is not None]
            cells.append("-" if len(known) < len(distances) else format_spread(known, 3))
        last = [curve[-1][1] for curve in seeds if curve]
        rows.append([name, *cells, f"{statistics.fmean(last) / teacher:.2f}" if last else "-"])
    return [header, *rows]


def draw_curves(
    curves: dict[str, list[Curve]], teacher: float, teacher_name: str, metric: str, columns: list[float], path: Path
) -> Path:
    """Write the picture: a line for each training seed, in the student's colour, and the table below; ``teacher`` is
    the distance that a dashed line stands at."""
    cells = curves_table(curves, columns, teacher)
    figure = Figure(figsize=(8.4, 5.2 + 0.28 * len(cells)), layout="constrained", dpi=110)
    axes, below = figure.subplots(2, 1, height_ratios=[5, 0.42 * len(cells) + 0.3])
    colours = {name: f"C{number}" for number, name in enumerate(curves)}
    for name, seeds in curves.items():
        label: str | None = name  # of the first line alone
        for curve in filter(None, seeds):
            xs, ys = zip(*curve, strict=True)
            width = 1.4 if len(seeds) == 1 else 1
            axes.plot(xs, ys, marker=".", linewidth=width, color=colours[name], label=label)
            label = None
    axes.axhline(teacher, color="black", linestyle="--", linewidth=1, label=teacher_name)
    use_logarithm(axes)
    use_thousands(axes)
    axes.set_xlabel("network passes in training (one picture each; a backward pass counts as two, or one to the input)")
    axes.set_ylabel(metric)
    style_axes(axes, "both")
    axes.legend(frameon=False)
    _draw_table(below, cells, colours)
    with files.replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    return path


def _draw_table(axes: Axes, cells: Cells, colours: dict[str, str]) -> None:
    """The cells as a picture; the first column of row n in the n-th colour."""
    axes.axis("off")
    lengths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    widths = [length / sum(lengths) for length in lengths]
    table = axes.table(
        cells[1:], colLabels=cells[0], colWidths=widths, loc="center", cellLoc="right", edges="horizontal"
    )
    table.auto_set_font_size(False)
    table.set_fontsize(9)
    for row, colour in enumerate(colours.values(), 1):
        table[row, 0].set_text_props(color=colour, ha="left")
