"""Tables as lists of cells, the header first: an evaluation's rows as cells, and cells as text or Markdown."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

Cells = list[list[str]]
"""A table's rows, the header first."""
Row = dict[str, Any]
"""What was measured of one target."""


def text_table(cells: Cells) -> str:
    """Cells as text: the first column to the left, the others to the right, a rule under the header."""
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    lines = []
    for row in cells:
        padded = [text.rjust(width) for text, width in zip(row, widths, strict=True)]
        padded[0] = row[0].ljust(widths[0])
        lines.append("  ".join(padded).rstrip())
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([lines[0], rule, *lines[1:]])


def markdown_table(cells: Cells) -> str:
    """Cells as a Markdown table."""
    header, *rows = cells
    return "\n".join(f"| {' | '.join(row)} |" for row in [header, ["---"] * len(header), *rows]) + "\n"


def results_table(rows: list[Row], metric: str = "frechet") -> Cells:
    """The rows of an evaluation; ``ratio`` and ``speed`` are against the first one.

    Columns that no row has a value for are left out.  ``metric`` names the distance (``protocol["metric"]``).  ± is the
    standard deviation over seeds; KID's of one seed that over subsets.
    """
    if not rows:
        return [["name"]]
    columns = _list_columns(rows, metric)
    return [[name for name, _ in columns], *[[_format_cell(cell, row) for _, cell in columns] for row in rows]]


def _list_columns(rows: list[Row], metric: str) -> list[tuple[str, Callable[[Row], str]]]:
    """Each column's name, and what it shows of a row."""
    first = rows[0]
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("name", lambda row: row["name"]),
        ("steps", lambda row: str(row["steps"])),
        ("passes", lambda row: f"{row['passes_per_image']:g}"),
        (metric, partial(_format_mean, key="frechet", form=".3f")),
        ("ratio", lambda row: f"{row['frechet'] / max(first['frechet'], 1e-12):.2f}"),
    ]
    if any(row.get("parameters") for row in rows):
        columns.append(("params", lambda row: _format_parameters(row["parameters"])))
    if any(row.get("kid_mean") is not None for row in rows):
        columns.append(("KID x1000", lambda row: f"{1000 * row['kid_mean']:.2f} ± {1000 * row['kid_std']:.2f}"))
    for key in ("precision", "recall", "diversity"):
        if any(row.get(key) is not None for row in rows):
            columns.append((key, partial(_format_mean, key=key, form=".3f")))
    if any(row.get("clip_score") is not None for row in rows):
        columns.append(("CLIP", partial(_format_mean, key="clip_score", form=".4f")))
    for name in dict.fromkeys(name for row in rows for name in row.get("rewards") or {}):
        columns.append((name.rpartition(":")[2], partial(_format_reward, name=name)))
    columns.append(("images/s", lambda row: f"{row['images_per_second']:.1f}"))
    columns.append(("speed", lambda row: f"{row['images_per_second'] / first['images_per_second']:.1f}x"))
    if any(row.get("latency") for row in rows):
        columns.append(("ms/call", lambda row: f"{1000 * row['latency']['seconds']:.1f}"))
        columns.append(("text|denoiser|decoder|rest", lambda row: _format_shares(row["latency"]["shares"])))
    return columns


def _format_cell(cell: Callable[[Row], str], row: Row) -> str:
    try:
        return cell(row)
    except (KeyError, TypeError, ZeroDivisionError):  # this row was not measured for that column
        return "-"


def _format_mean(row: Row, key: str, form: str) -> str:
    """``0.341``, or ``0.341 ± 0.012`` where the row is of several seeds."""
    std = (row.get("std") or {}).get(key)
    return f"{row[key]:{form}}" if std is None else f"{row[key]:{form}} ± {std:{form}}"


def _format_reward(row: Row, name: str) -> str:
    rewards = {**row["rewards"], "std": (row.get("std") or {}).get("rewards")}
    return _format_mean(rewards, name, ".3f")


def _format_parameters(counts: list[int]) -> str:
    """``0.69M``, or ``4 x 0.39M`` of several students, one of which draws a picture."""
    size = f"{max(counts) / 1e6:.2f}M"
    return size if len(counts) == 1 else f"{len(counts)} x {size}"


def _format_shares(shares: dict[str, float]) -> str:
    return "|".join(f"{share:.0%}" for share in shares.values())
