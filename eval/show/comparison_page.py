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

from .curves import CURVE, read_curve
from .page import Block, Note, Picture, Plot, Plots, Section, Table, build_or_note, note_missing, write_page
from .plots import Line, label_small, make_axes, plain_text, plot_line, style_axes, to_svg, use_logarithm, use_thousands
from .run_files import cost_cells, is_number, read_config, read_rows
from .run_page import show_results

PASSES = "network passes"
REMEDY = "measure them under one: stepdistill evaluate A=RUN/student B=RUN/student --output both.json"


@dataclass(frozen=True)
class Together:
    """What was made of all runs together, in place of each run's files.

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
    """Write one page of several runs, from whatever of them exists; the missing is named.

    Args:
        runs: run folders, by name or called as they are.
        together: None: each run's ``evaluation.json``, which must agree in protocol, and ``grid.png``.

    Raises:
        UserError: a folder that is no run, or numbers of different protocols.
    """
    named = runs if isinstance(runs, dict) else _name_runs(runs)
    for run in named.values():
        if not (run / "config.yaml").is_file():
            raise UserError(f"run {run}: holds no config.yaml, so it is not a run; name a distillation's output folder")
    titles = {name: name for name in named} | (together.titles if together else {})
    shared_noise = together is not None or _have_one_noise(named)
    first = {titles[name]: name for name in reversed(named)}.values()  # of each title's training seeds
    sections = [
        Section("Runs", build_or_note("metrics.jsonl", lambda: _list_costs(named))),
        Section("Evaluation", build_or_note("evaluation.json", lambda: _show_numbers(named, together))),
        Section("Distance over training", build_or_note(CURVE, lambda: _draw_distances(named, titles, together))),
        Section("Losses over training", build_or_note("metrics.jsonl", lambda: _draw_losses(named, titles))),
        Section(
            f"Pictures, {'on the same noise' if shared_noise else 'each on another noise'}",
            _show_pictures(named, together),
        ),
        Section(
            "Where the configs differ",
            [compare_configs({name: read_config(run) for name, run in named.items() if name in first})],
        ),
    ]
    return write_page(page, "Comparison of " + ", ".join(dict.fromkeys(titles.values())), sections)


def _name_runs(runs: list[Path]) -> dict[str, Path]:
    """Runs by the shortest ends of their paths that tell them apart."""
    resolved = [run.resolve() for run in runs]
    if len(set(resolved)) < len(resolved):
        raise UserError(f"{', '.join(map(str, runs))}: a run is named twice; name each once")
    depth = next(n for n in range(1, 1000) if len({run.parts[-n:] for run in resolved}) == len(resolved))
    return {"/".join(path.parts[-depth:]): run for path, run in zip(resolved, runs, strict=True)}


# -- numbers -------------------------------------------------------------------------------------------------


def _list_costs(named: dict[str, Path]) -> list[Block]:
    rows: list[list[Any]] = [["run", "method", "student updates", "network passes", "minutes"]]
    rows += [[name, read_config(run).get("method", "-"), *cost_cells(run)] for name, run in named.items()]
    return [Table(rows)]


def _show_numbers(named: dict[str, Path], together: Together | None) -> list[Block]:
    if together is None:
        return _show_runs_numbers(named)
    blocks: list[Block] = [Table(together.summary)] if together.summary else []
    results = read_results(together.evaluation)
    if results is None:
        return [*blocks, note_missing(f"{together.evaluation.name}, or it cannot be read")]
    return [*blocks, *show_results(*results)]


def _show_runs_numbers(named: dict[str, Path]) -> list[Block]:
    """Every run's rows in one table; a teacher's row that several share stands once.

    Raises:
        UserError: two of them were measured under different protocols.
    """
    rows: list[dict[str, Any]] = []
    first: tuple[str, dict[str, Any]] | None = None
    without = []
    for name, run in named.items():
        results = read_results(run / "evaluation.json")
        if results is None:
            without.append(name)
            continue
        protocol, run_rows = results
        if first is None:
            first = (name, protocol)
        require_same(first[1], protocol, f"{name}, next to {first[0]}", REMEDY)
        shown = {row.get("fingerprint") for row in rows} - {None}
        rows += [{**row, "name": f"{name}: {row['name']}"} for row in run_rows if row.get("fingerprint") not in shown]
    blocks: list[Block] = [] if first is None else show_results(first[1], rows)
    if without:
        blocks.append(note_missing(f"evaluation.json of {', '.join(without)}"))
    return blocks


# -- curves --------------------------------------------------------------------------------------------------


def _read_passes_and_seconds(run: Path) -> Line:
    """Network passes and seconds of training at every row of metrics, both ascending from 0."""
    rows = _read_timed_rows(run)
    return [0.0, *(float(row["passes"]) for row in rows)], [0.0, *(float(row["seconds"]) for row in rows)]


def _read_timed_rows(run: Path) -> list[dict[str, Any]]:
    """The rows of metrics that say their network passes and seconds."""
    rows = read_rows(run / "metrics.jsonl")
    return [row for row in rows if is_number(row.get("passes")) and is_number(row.get("seconds"))]


Lines = dict[str, list[Line]]
"""Lines by what they are called together."""


def _group_lines(lines: Iterable[tuple[str, list[float], list[float]]]) -> Lines:
    groups: Lines = {}
    for title, xs, ys in lines:
        groups.setdefault(title, []).append((xs, ys))
    return groups


def _draw_distances(named: dict[str, Path], titles: dict[str, str], together: Together | None) -> list[Block]:
    curves = {name: read_curve(run / CURVE) for name, run in named.items()}
    known = {name: tuple(map(list, zip(*curve, strict=True))) for name, curve in curves.items() if curve}
    if not known:
        return [note_missing(f"{CURVE} (runs of stepdistill compare have it)")]
    level, metric = (together.level, together.metric) if together else (None, "distance")
    times = {name: _read_passes_and_seconds(named[name]) for name in known}
    over_passes = _group_lines((titles[name], passes, values) for name, (passes, values) in known.items())
    over_time = _group_lines(
        (titles[name], (np.interp(passes, *times[name]) / 60).tolist(), values)
        for name, (passes, values) in known.items()
        if len(times[name][0]) > 1
    )
    plots = [draw_lines(f"{metric} over network passes", over_passes, PASSES, level)]
    if over_time:
        plots.append(draw_lines(f"{metric} over time", over_time, "minutes of training", level))
    return [Plots(plots)]


def _draw_losses(named: dict[str, Path], titles: dict[str, str]) -> list[Block]:
    """The losses that two runs or more have, over passes and over time."""
    series: dict[str, dict[str, tuple[list[float], list[float], list[float]]]] = {}
    for name, run in named.items():
        for row in _read_timed_rows(run):
            for key, value in row.items():
                if key.startswith("loss/") and is_number(value):
                    columns = series.setdefault(key, {}).setdefault(name, ([], [], []))
                    for column, number in zip(columns, (row["passes"], row["seconds"] / 60, value), strict=True):
                        column.append(float(number))
    common = {key: runs for key, runs in sorted(series.items()) if len(runs) > 1}
    if not common:
        return [note_missing("a loss in the metrics.jsonl of two runs")]
    plots = []
    for key, runs in common.items():
        for axis, over, label in ((0, "passes", PASSES), (1, "time", "minutes of training")):
            lines = _group_lines((titles[name], columns[axis], columns[2]) for name, columns in runs.items())
            plots.append(draw_lines(f"{key} over {over}", lines, label))
    return [Plots(plots), Note("Losses of different methods are of different kinds; their heights do not compare.")]


def draw_lines(title: str, series: Lines, label: str, level: tuple[str, float] | None = None) -> Plot:
    """One figure, a colour for each name, and a dashed line at ``level``."""
    figure, axes = make_axes(4.6, 3.0)
    values = [value for lines in series.values() for _, ys in lines for value in ys]
    for number, (name, lines) in enumerate(series.items()):
        for again, (xs, ys) in enumerate(lines):
            plot_line(axes, xs, ys, f"C{number}", None if again else plain_text(name))
    if level is not None:
        axes.axhline(level[1], color="black", linestyle="--", linewidth=1, label=plain_text(level[0]))
    if min(values) > 0 and max(values) > 20 * min(values):
        use_logarithm(axes)
    if label == PASSES:
        use_thousands(axes)
    label_small(axes, title, label)
    style_axes(axes)
    axes.legend(frameon=False, fontsize=7)
    return Plot(title, to_svg(figure))


# -- pictures and configs ------------------------------------------------------------------------------------


def _show_pictures(named: dict[str, Path], together: Together | None) -> list[Block]:
    if together is not None and together.grid.is_file():
        return [Picture(together.grid.read_bytes(), "all on the same noise")]
    return [_show_run_grid(name, run) for name, run in named.items()]


def _show_run_grid(name: str, run: Path) -> Block:
    path = run / "grid.png"
    if not path.is_file():
        return note_missing(f"grid.png of {name}")
    return Picture(path.read_bytes(), name, name)


def _have_one_noise(named: dict[str, Path]) -> bool:
    """Whether the grids of all runs start from the same noise."""
    sections = [read_config(run).get("evaluation") for run in named.values()]
    return len({repr(section.get("seed")) if isinstance(section, dict) else None for section in sections}) == 1


def compare_configs(configs: dict[str, dict[str, Any]]) -> Block:
    """A table of the keys whose values differ between runs, the places of outputs aside; ``-``: not in that one."""
    flat = {name: _flatten({k: v for k, v in config.items() if k != "output"}) for name, config in configs.items()}
    keys = sorted({key for leaves in flat.values() for key in leaves})
    rows: list[list[Any]] = [["key", *flat]]
    for key in keys:
        values = [repr(leaves[key]) if key in leaves else "-" for leaves in flat.values()]
        if len(set(values)) > 1:
            rows.append([key, *(value.strip("'") for value in values)])
    return Table(rows) if len(rows) > 1 else Note("They do not.")


def _flatten(value: Any, path: str = "") -> dict[str, Any]:
    """Leaves of nested mappings by ``a.b.c``."""
    if not isinstance(value, dict) or not value:
        return {path: value} if path else {}
    leaves: dict[str, Any] = {}
    for name, inner in value.items():
        leaves |= _flatten(inner, f"{path}.{name}" if path else name)
    return leaves
