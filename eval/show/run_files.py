"""What pages read of a run's folder; a file that is missing or damaged gives nothing and stops no page."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from stepdistill.config import read_mapping
from stepdistill.errors import UserError
from stepdistill.plain_files import parse_json, read_bytes

MOST_BYTES = 2**30
"""Of a file that a page is made of."""
NOT_CURVES = {"iteration", "seconds", "passes"}


def read_text(path: Path) -> str | None:
    """A text file, what is not UTF-8 replaced; None where it cannot be read."""
    try:
        return read_bytes(path, MOST_BYTES).decode("utf-8", errors="replace")
    except (OSError, ValueError):
        return None


def read_json(path: Path) -> Any:
    """A JSON file's value, None where it cannot be read."""
    try:
        return parse_json(read_text(path) or "")
    except ValueError:
        return None


def read_config(run: Path) -> dict[str, Any]:
    """A run's ``config.yaml``, {} where it cannot be read."""
    try:
        return read_mapping(run / "config.yaml")
    except (OSError, UserError):
        return {}


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a ``metrics.jsonl``; lines that are cut short are passed over."""
    rows = []
    for line in (read_text(path) or "").splitlines():
        with contextlib.suppress(ValueError):
            row = parse_json(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def read_metrics(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Every scalar of a ``metrics.jsonl`` as (iterations, values), null as NaN; lines cut short are passed over."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in read_rows(path):
        if not is_number(row.get("iteration")):
            continue
        for name, value in row.items():
            number = isinstance(value, float) or is_number(value)
            if number and name not in NOT_CURVES and not name.startswith("updates/"):
                xs, ys = curves.setdefault(name, ([], []))
                xs.append(float(row["iteration"]))
                ys.append(float(value))
    return curves


def cost_cells(run: Path) -> list[Any]:
    """Student updates, network passes and minutes so far, each ``-`` where the run does not say."""
    last = (read_rows(run / "metrics.jsonl") or [{}])[-1]
    minutes = f"{last['seconds'] / 60:.1f}" if is_number(last.get("seconds")) else "-"
    passes = f"{last['passes']:,}" if is_number(last.get("passes")) else "-"
    return [last.get("updates/student", "-"), passes, minutes]


def is_number(value: Any) -> bool:
    """Whether a row's value can be drawn: finite, and of a size that a float has."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
