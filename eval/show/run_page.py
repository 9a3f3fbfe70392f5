"""``report.html``: one page that shows a run, with everything in it; it opens offline, on a phone too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError
from stepdistill.eval.measure.protocols import format_protocol
from stepdistill.eval.measure.results import read_results
from stepdistill.run_record import PartRecord, RunRecord

from .page import Block, Details, Note, Picture, Plot, Plots, Section, Table, build_or_note, note_missing, write_page
from .plots import label_small, make_axes, plot_line, style_axes, to_svg
from .run_files import cost_cells, read_config, read_json, read_metrics, read_text
from .tables import results_table

MOST_SAMPLES = 12
"""Sample grids that a page shows, spread evenly over the run."""
FACTS = (
    ("method", ["method"]),
    ("teacher", ["teacher.path", "teacher"]),
    ("teacher's steps", ["teacher.steps"]),
    ("student's steps", ["sampler.steps", "steps"]),
    ("students", ["msd.students"]),
    ("partition", ["msd.partition"]),
    ("seed", ["seed", "train.seed"]),
)
"""What the first table says, and the keys of the config where it is, the first that has a value."""


def write_report(run: str | Path) -> Path:
    """Write ``report.html`` into a run's folder, from whatever of the run exists; the missing is named.

    Raises:
        UserError: no such folder, or one without config.yaml, environment.json and metrics.jsonl.
    """
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"run {run}: no such folder; name the output folder of a distillation")
    if not any((run / name).is_file() for name in ("config.yaml", "environment.json", "metrics.jsonl")):
        raise UserError(
            f"run {run}: holds no config.yaml, environment.json or metrics.jsonl, so it is not a run; name the "
            "output folder of a distillation"
        )
    config = read_config(run)
    sections = [
        Section("What was run", build_or_note("What was run", lambda: _list_facts(run, config))),
        Section("Evaluation", build_or_note("evaluation.json", lambda: _show_evaluation(run))),
        Section("Comparison, on the same noise", build_or_note("grid.png", lambda: _show_grid(run))),
        *_show_training(run),
        Section("Config", _show_config(read_text(run / "config.yaml"))),
    ]
    return write_page(run / "report.html", run.resolve().name, sections)


# -- sections ----------------------------------------------------------------------------------------------


def _list_facts(run: Path, config: dict[str, Any]) -> list[Block]:
    """Method, teacher, steps, seed, versions, command: from the config and the environment, as far as they say."""
    environment = read_json(run / "environment.json")
    environment = environment if isinstance(environment, dict) else {}
    rows = []
    for label, keys in FACTS:
        values = [value for value in (_value_at(config, key) for key in keys) if value is not None]
        value = values[0] if values else None
        if label == "seed" and value is None:
            value = environment.get("seed")
        if value is not None and not isinstance(value, dict):
            rows.append([label, value])
    git, versions = environment.get("git"), environment.get("versions")
    if isinstance(git, dict) and git.get("commit"):
        rows.append(["git", f"{git['commit']}{', with changes' if git.get('dirty') else ''}"])
    rows += [[key, environment[key]] for key in ("command", "started", "platform") if environment.get(key)]
    if isinstance(versions, dict):
        rows.append(["versions", ", ".join(f"{name} {number}" for name, number in versions.items() if number)])
    blocks: list[Block] = [Table(rows, header=False, style="facts")] if rows else []
    if not environment:
        blocks.append(note_missing("environment.json (versions, git state, seed)"))
    return blocks


def _value_at(config: dict, key: str) -> Any:
    """The value at ``a.b.c``, None where the path ends early."""
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _show_training(run: Path) -> list[Section]:
    """Curves and samples: of the run, or of every stage and student of it with what each cost."""
    parts = _read_parts(run)
    if not parts:
        tuned = build_or_note("metrics.jsonl", lambda: _show_tuning(run))
        first = [Section("Reward and distance to the untuned model", tuned)] if tuned else []
        return [*first, Section("Curves", _show_curves(run)), Section("Samples over time", _show_samples(run))]
    rows = [["part", "method", "student updates", "network passes", "minutes"]]
    rows += [[part.name, part.method, *cost_cells(run / part.folder)] for part in parts]
    title = "Stages" if all(part.undivided for part in parts) else "Students"
    return [
        Section(title, [Table(rows)]),
        *(Section(f"Curves: {part.name}", _show_curves(run / part.folder)) for part in parts),
        *(Section(f"Samples over time: {part.name}", _show_samples(run / part.folder, 4)) for part in parts),
    ]


def _read_parts(run: Path) -> list[PartRecord]:
    """The runs that the run is made of, in the order of their training; [] for one run, or where it does not say."""
    try:
        return RunRecord.load(run).parts
    except UserError:
        return []


def _show_tuning(run: Path) -> list[Block]:
    """What a tuning run measured on fixed noise over training, nothing of other runs."""
    curves = {name: curve for name, curve in read_metrics(run / "metrics.jsonl").items() if name.startswith("probe/")}
    if not curves:
        return []
    note = (
        "On fixed noise; @N: in N steps. distance: root mean square to the untuned model's samples of the same noise."
    )
    return [Plots([_draw_curve(name.removeprefix("probe/"), *curves[name]) for name in sorted(curves)]), Note(note)]


def _show_evaluation(run: Path) -> list[Block]:
    results = read_results(run / "evaluation.json")
    if results is None or not results[1]:
        return [note_missing("evaluation.json, or it cannot be read (make it with: stepdistill evaluate)")]
    date = (read_json(run / "evaluation.json") or {}).get("date", "")
    return show_results(*results, str(date))


def show_results(protocol: dict[str, Any], rows: list[dict[str, Any]], date: str = "") -> list[Block]:
    """The rows as a table, the protocol's line and notes below."""
    table = Table(results_table(rows, str(protocol.get("metric", "frechet"))))
    spread = ", ± over seeds" if any(row.get("std") for row in rows) else ""
    facts = [protocol.get("line") or format_protocol(protocol), f"on {protocol.get('device', '?')}", date]
    text = f"Lower is better; ratio and speed are against the first row{spread}. {'; '.join(filter(None, facts))}."
    return [table, Note(text), *(Note(f"Note: {note}.") for note in protocol.get("notes") or [])]


def _show_grid(run: Path) -> list[Block]:
    path = run / "grid.png"
    if not path.is_file():
        return [note_missing("grid.png")]
    return [Picture(path.read_bytes(), "teacher and student on the same noise")]


def _show_samples(run: Path, most: int = MOST_SAMPLES) -> list[Block]:
    files = sorted(path for path in (run / "samples").glob("*.png") if path.is_file())
    if not files:
        return [note_missing("samples/*.png")]
    if len(files) > most:
        last = len(files) - 1
        files = [files[round(i * last / (most - 1))] for i in range(most)]
    pictures: list[Block] = []
    for file in files:
        caption = f"{int(file.stem)} student updates" if file.stem.isdecimal() else file.stem
        pictures.append(Picture(file.read_bytes(), caption, caption))
    return pictures


def _show_config(config: str | None) -> list[Block]:
    if config is None:
        return [note_missing("config.yaml")]
    return [Details("config.yaml, as resolved", config)]


# -- curves ------------------------------------------------------------------------------------------------


def _show_curves(run: Path) -> list[Block]:
    return build_or_note("metrics.jsonl", lambda: _draw_metrics(run))


def _draw_metrics(run: Path) -> list[Block]:
    metrics = read_metrics(run / "metrics.jsonl")
    curves = {name: curve for name, curve in metrics.items() if not name.startswith("probe/")}
    if not curves:
        return [note_missing("metrics.jsonl, or it has no rows yet")]
    first = {"loss": 0, "grad_norm": 1}
    names = sorted(curves, key=lambda name: (first.get(name.split("/")[0], 2), name))
    return [Plots([_draw_curve(name, *curves[name]) for name in names])]


def _draw_curve(name: str, xs: list[float], ys: list[float]) -> Plot:
    """One metric; values that are not finite are left out and counted in the caption."""
    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    left_out = len(xs) - len(points)
    if not points:
        return Plot(name, "", f"{name}: none of its {len(xs)} values is finite.")
    x, y = [point[0] for point in points], [point[1] for point in points]
    figure, axes = make_axes(4.6, 2.4)
    plot_line(axes, x, y, "#1f6feb")
    if min(y) > 0 and max(y) > 100 * min(y):
        axes.set_yscale("log")
    label_small(axes, name, "iteration")
    style_axes(axes)
    return Plot(name, to_svg(figure), f"{left_out} values that are not finite are left out" if left_out else "")
