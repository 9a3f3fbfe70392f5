"""One self-contained page of many runs: numbers, curves over passes and over time, pictures, and what differs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stepdistill.errors import UserError
from stepdistill.eval.measure.protocols import require_same
from stepdistill.eval.measure.results import read_results

from .curves import CURVE, in_thousands, logarithmic, read_curve
from .html import escape, guarded, html_table, image, missing, read_config, svg, thin, write_page
from .run_page import cost_cells, evaluation_table, is_number, metric_rows

PASSES = "network passes"
REMEDY = "measure them under one: stepdistill evaluate A=RUN/student B=RUN/student --output both.json"


@dataclass(frozen=True)
class Together:
    """What was made of all runs together, in place of each run's own.

    Attributes:
        evaluation: a file with rows of all.
        grid: a picture of all on the same noise.
        level: name and distance of a dashed line in the curves; ``metric`` is what they show.
        summary: a table of all, its header first.
        titles: run to what it is called together with its other training seeds, which are drawn in one colour.
    """

    evaluation: Path
    grid: Path
    level: tuple[str, float]
    metric: str
    summary: list[list[str]] = field(default_factory=list)
    titles: dict[str, str] = field(default_factory=dict)


def write_comparison(runs: list[Path] | dict[str, Path], page: Path, together: Together | None = None) -> Path:
    """Write one page of several runs, from whatever of them is there; the missing is named.

    Args:
        runs: run folders, by name or called as they are.
        together: None: each run's own ``evaluation.json``, which must agree in protocol, and ``grid.png``.

    Raises:
        UserError: a folder that is no run, or numbers of different protocols.
    """
    named = runs if isinstance(runs, dict) else _named(runs)
    for run in named.values():
        if not (run / "config.yaml").is_file():
            raise UserError(f"run {run}: holds no config.yaml, so it is not a run; name a distillation's output folder")
    titles = {name: name for name in named} | (together.titles if together else {})
    one_noise = together is not None or _one_noise(named)
    first = {titles[name]: name for name in reversed(named)}.values()  # of each title's training seeds
    sections = [
        ("Runs", guarded("metrics.jsonl", lambda: _runs(named))),
        ("Evaluation", guarded("evaluation.json", lambda: _measured(named, together))),
        ("Distance over training", guarded(CURVE, lambda: _distances(named, titles, together))),
        ("Losses over training", guarded("metrics.jsonl", lambda: _losses(named, titles))),
        (f"Pictures, {'on the same noise' if one_noise else 'each on its own noise'}", _pictures(named, together)),
        (
            "Where the configs differ",
            config_differences({n: read_config(run) for n, run in named.items() if n in first}),
        ),
    ]
    return write_page(page, "Comparison of " + ", ".join(dict.fromkeys(titles.values())), sections)


def _named(runs: list[Path]) -> dict[str, Path]:
    """Runs by the shortest ends of their paths that tell them apart."""
    resolved = [run.resolve() for run in runs]
    if len(set(resolved)) < len(resolved):
        raise UserError(f"{', '.join(map(str, runs))}: a run is named twice; name each once")
    depth = next(n for n in range(1, 1000) if len({run.parts[-n:] for run in resolved}) == len(resolved))
    return {"/".join(path.parts[-depth:]): run for path, run in zip(resolved, runs, strict=True)}


# -- numbers -------------------------------------------------------------------------------------------------


def _runs(named: dict[str, Path]) -> str:
    rows: list[list[Any]] = [["run", "method", "student updates", "network passes", "minutes"]]
    rows += [[name, read_config(run).get("method", "-"), *cost_cells(run)] for name, run in named.items()]
    return html_table(rows)


def _measured(named: dict[str, Path], together: Together | None) -> str:
    return _own_numbers(named) if together is None else _numbers(together)


def _numbers(together: Together) -> str:
    file, summary = together.evaluation, together.summary
    found = read_results(file)
    rows = missing(f"{file.name}, or it cannot be read") if found is None else evaluation_table(*found)
    return (html_table(summary) if summary else "") + rows


def _own_numbers(named: dict[str, Path]) -> str:
    """Every run's own rows in one table; a teacher's row that several share stands once.

    Raises:
        UserError: two of them were measured under different protocols.
    """
    rows: list[dict[str, Any]] = []
    first: tuple[str, dict[str, Any]] | None = None
    without = []
    for name, run in named.items():
        found = read_results(run / "evaluation.json")
        if found is None:
            without.append(name)
            continue
        protocol, own = found
        if first is None:
            first = (name, protocol)
        require_same(first[1], protocol, f"{name}, beside {first[0]}", REMEDY)
        seen = {row.get("fingerprint") for row in rows} - {None}
        rows += [{**row, "name": f"{name}: {row['name']}"} for row in own if row.get("fingerprint") not in seen]
    absent = missing(f"evaluation.json of {', '.join(without)}") if without else ""
    return absent if first is None else evaluation_table(first[1], rows) + absent


# -- curves --------------------------------------------------------------------------------------------------


def _passes_and_seconds(run: Path) -> tuple[list[float], list[float]]:
    """Network passes and seconds of training at every row of metrics, both ascending from 0."""
    rows = _timed_rows(run)
    return [0.0, *(float(row["passes"]) for row in rows)], [0.0, *(float(row["seconds"]) for row in rows)]


def _timed_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics that say their network passes and seconds."""
    rows = metric_rows(run / "metrics.jsonl")
    return [row for row in rows if is_number(row.get("passes")) and is_number(row.get("seconds"))]


Lines = dict[str, list[tuple[list[float], list[float]]]]
"""Lines (x, y) by what they are called together."""


def _grouped(lines: Iterable[tuple[str, list[float], list[float]]]) -> Lines:
    found: Lines = {}
    for title, xs, ys in lines:
        found.setdefault(title, []).append((xs, ys))
    return found


def _distances(named: dict[str, Path], titles: dict[str, str], together: Together | None) -> str:
    curves = {name: read_curve(run / CURVE) for name, run in named.items()}
    known = {name: tuple(map(list, zip(*curve, strict=True))) for name, curve in curves.items() if curve}
    if not known:
        return missing(f"{CURVE} (runs of stepdistill compare have it)")
    level, metric = (together.level, together.metric) if together else (None, "distance")
    times = {name: _passes_and_seconds(named[name]) for name in known}
    over_passes = _grouped((titles[name], passes, values) for name, (passes, values) in known.items())
    over_time = _grouped(
        (titles[name], (np.interp(passes, *times[name]) / 60).tolist(), values)
        for name, (passes, values) in known.items()
        if len(times[name][0]) > 1
    )
    drawn = [_lines(f"{metric} over network passes", over_passes, PASSES, level)]
    drawn += [_lines(f"{metric} over time", over_time, "minutes of training", level)] if over_time else []
    return f'<div class="curves">{"".join(drawn)}</div>'


def _losses(named: dict[str, Path], titles: dict[str, str]) -> str:
    """The losses that two runs or more have, over passes and over time."""
    series: dict[str, dict[str, tuple[list[float], list[float], list[float]]]] = {}
    for name, run in named.items():
        for row in _timed_rows(run):
            for key, value in row.items():
                if key.startswith("loss/") and is_number(value):
                    own = series.setdefault(key, {}).setdefault(name, ([], [], []))
                    for column, number in zip(own, (row["passes"], row["seconds"] / 60, value), strict=True):
                        column.append(float(number))
    shared = {key: own for key, own in sorted(series.items()) if len(own) > 1}
    if not shared:
        return missing("a loss in the metrics.jsonl of two runs")
    figures = []
    for key, own in shared.items():
        for axis, label in ((0, PASSES), (1, "minutes of training")):
            title = f"{key} over {'passes' if axis == 0 else 'time'}"
            figures.append(_lines(title, _grouped((titles[name], xs[axis], xs[2]) for name, xs in own.items()), label))
    note = "Losses of different methods are of different kinds; their heights do not compare."
    return f'<div class="curves">{"".join(figures)}</div><p class="note">{escape(note)}</p>'


def _lines(title: str, series: Lines, label: str, level: tuple[str, float] | None = None) -> str:
    """One figure, a colour for each name, as an inline SVG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 3.0), layout="constrained")
    axes = figure.subplots()
    values = [value for lines in series.values() for _, ys in lines for value in ys]
    for number, (name, lines) in enumerate(series.items()):
        for again, (xs, ys) in enumerate(lines):
            x, y = thin(xs, ys)
            marker, called = "." if len(x) < 30 else None, None if again else _text(name)
            axes.plot(x, y, linewidth=1.2, marker=marker, color=f"C{number}", label=called)
    if level is not None:
        axes.axhline(level[1], color="black", linestyle="--", linewidth=1, label=_text(level[0]))
    if min(values) > 0 and max(values) > 20 * min(values):
        logarithmic(axes)
    if label == PASSES:
        in_thousands(axes)
    axes.set_title(_text(title), fontsize=9)
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(labelsize=7, which="both")
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
    return f'<figure role="img" aria-label="{escape(title)}">{svg(figure)}</figure>'


def _text(text: str) -> str:
    """For matplotlib: no mathematics, and a leading underscore would hide a line from the legend."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


# -- pictures and configs ------------------------------------------------------------------------------------


def _pictures(named: dict[str, Path], together: Together | None) -> str:
    if together is not None and together.grid.is_file():
        return image(together.grid.read_bytes(), "all on the same noise")
    return "\n".join(_own_grid(name, run) for name, run in named.items())


def _own_grid(name: str, run: Path) -> str:
    path = run / "grid.png"
    if not path.is_file():
        return missing(f"grid.png of {name}")
    return f"<figure>{image(path.read_bytes(), name)}<figcaption>{escape(name)}</figcaption></figure>"


def _one_noise(named: dict[str, Path]) -> bool:
    """Whether the runs' own grids start from the same noise."""
    evaluations = [read_config(run).get("evaluation") for run in named.values()]
    return len({repr(own.get("seed")) if isinstance(own, dict) else None for own in evaluations}) == 1


def config_differences(configs: dict[str, dict[str, Any]]) -> str:
    """A table of the keys whose values differ between runs, the places of outputs aside; ``-``: not there."""
    flat = {name: _flat({k: v for k, v in config.items() if k != "output"}) for name, config in configs.items()}
    keys = sorted({key for own in flat.values() for key in own})
    rows: list[list[Any]] = [["key", *flat]]
    for key in keys:
        values = [repr(own[key]) if key in own else "-" for own in flat.values()]
        if len(set(values)) > 1:
            rows.append([key, *(value.strip("'") for value in values)])
    return html_table(rows) if len(rows) > 1 else '<p class="note">They do not.</p>'


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by ``a.b.c``."""
    if not isinstance(value, dict) or not value:
        return {path: value} if path else {}
    return {
        key: leaf for name, own in value.items() for key, leaf in _flat(own, f"{path}.{name}" if path else name).items()
    }
