"""``report.html``: one page that shows a run, with everything in it; it opens offline, on a phone too."""

from __future__ import annotations

import contextlib
import math
import re
from pathlib import Path
from typing import Any

from stepdistill.errors import UserError
from stepdistill.eval.measure.protocols import protocol_line
from stepdistill.eval.measure.results import read_results
from stepdistill.readers import parse_json

from .grids import table_cells
from .html import escape, guarded, html_table, image, missing, read_config, read_json, read_text, svg, thin, write_page

MOST_SAMPLES = 12
"""Sample grids that a page shows, spread evenly over the run."""
MOST_STUDENTS = 1000
NOT_CURVES = {"iteration", "seconds", "passes"}


def write_report(run: str | Path) -> Path:
    """Write ``report.html`` into a run's folder, from whatever of the run is there; the missing is named.

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
    settings = read_config(run)
    sections = [
        ("What was run", guarded("What was run", lambda: _facts(run, settings))),
        ("Evaluation", guarded("evaluation.json", lambda: _evaluation(run))),
        ("Comparison, on the same noise", guarded("grid.png", lambda: _comparison(run))),
        *_training(run, settings),
        ("Config", _config(read_text(run / "config.yaml"))),
    ]
    return write_page(run / "report.html", run.resolve().name, sections)


# -- sections ----------------------------------------------------------------------------------------------


def _facts(run: Path, settings: dict[str, Any]) -> str:
    """Method, teacher, steps, seed, versions, command: from the config and the environment, as far as they say."""
    environment = read_json(run / "environment.json")
    environment = environment if isinstance(environment, dict) else {}
    rows = []
    for label, keys in (
        ("method", ["method"]),
        ("teacher", ["teacher.path", "teacher"]),
        ("teacher's steps", ["teacher.steps"]),
        ("student's steps", ["sampler.steps", "steps"]),
        ("students", ["msd.students"]),
        ("partition", ["msd.partition"]),
        ("seed", ["seed", "train.seed"]),
    ):
        value = next((v for v in (_at(settings, key) for key in keys) if v is not None), None)
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
    parts = [html_table(rows, header=False, kind="facts")] if rows else []
    parts += [missing("environment.json (versions, git state, seed)")] if not environment else []
    return "\n".join(parts)


def _at(settings: dict, key: str) -> Any:
    """The value at ``a.b.c``, None where the path ends early."""
    value: Any = settings
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _training(run: Path, settings: dict[str, Any]) -> list[tuple[str, str]]:
    """Curves and samples: of the run, or of every stage and student of it with what each cost."""
    parts = _parts(run, settings)
    if not parts:
        tuned = guarded("metrics.jsonl", lambda: _tuned(run))
        first = [("Reward and distance to the untuned model", tuned)] if tuned else []
        return [*first, ("Curves", _curves(run)), ("Samples over time", _samples(run))]
    rows = [["part", "method", "student updates", "network passes", "minutes"]]
    rows += [[name, method, *cost_cells(folder)] for name, folder, method in parts]
    return [
        ("Stages" if "msd" not in settings else "Students", html_table(rows)),
        *((f"Curves: {name}", _curves(folder)) for name, folder, _ in parts),
        *((f"Samples over time: {name}", _samples(folder, 4)) for name, folder, _ in parts),
    ]


def _parts(run: Path, settings: dict[str, Any]) -> list[tuple[str, Path, str]]:
    """(name, run folder, method) of a recipe's stages, of several students, of both; [] for one run."""
    listed_stages = settings.get("stages")
    stages = [stage for stage in listed_stages if _is_stage(stage)] if isinstance(listed_stages, list) else []
    method = str(settings.get("method", "-"))

    def listed(own: list[dict], folder: Path, before: str = "") -> list[tuple[str, Path, str]]:
        return [
            (f"{before}{stage.get('name')}", folder / f"{number:02d}-{stage.get('name')}", stage.get("method", method))
            for number, stage in enumerate(own, 1)
        ]

    msd = settings.get("msd")
    if not isinstance(msd, dict):
        return listed(stages, run)
    found = listed([stage for stage in stages if stage.get("shared")], run / "shared", "shared, ")
    own = [stage for stage in stages if not stage.get("shared")]
    students = msd.get("students")
    for k in range(students if isinstance(students, int) and students <= MOST_STUDENTS else 0):
        folder = run / f"student-{k}"
        found += listed(own, folder, f"student {k}, ") if own else [(f"student {k}", folder, method)]
    return found


def _is_stage(stage: Any) -> bool:
    """Whether it is a mapping with a name that a folder of the run can have."""
    return isinstance(stage, dict) and re.fullmatch(r"[\w.-]+", str(stage.get("name"))) is not None


def _tuned(run: Path) -> str:
    """What a tuning run measured on fixed noise over training, "" where there is none of it."""
    curves = {name: own for name, own in read_metrics(run / "metrics.jsonl").items() if name.startswith("probe/")}
    if not curves:
        return ""
    note = (
        "On fixed noise; @N: in N steps. distance: root mean square to the untuned model's samples of the same noise."
    )
    figures = "\n".join(_curve(name.removeprefix("probe/"), *curves[name]) for name in sorted(curves))
    return f'<div class="curves">{figures}</div><p class="note">{escape(note)}</p>'


def metric_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a ``metrics.jsonl``; lines that are cut short are passed over."""
    rows = []
    for line in (read_text(path) or "").splitlines():
        with contextlib.suppress(ValueError):
            row = parse_json(line)
            if isinstance(row, dict):
                rows.append(row)
    return rows


def cost_cells(run: Path) -> list[Any]:
    """Student updates, network passes and minutes so far, each ``-`` where the run does not say."""
    last = (metric_rows(run / "metrics.jsonl") or [{}])[-1]
    minutes = f"{last['seconds'] / 60:.1f}" if is_number(last.get("seconds")) else "-"
    passes = f"{last['passes']:,}" if is_number(last.get("passes")) else "-"
    return [last.get("updates/student", "-"), passes, minutes]


def is_number(value: Any) -> bool:
    """Whether a row's value can be drawn: finite, and of a size that a float has."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _evaluation(run: Path) -> str:
    found = read_results(run / "evaluation.json")
    if found is None or not found[1]:
        return missing("evaluation.json, or it cannot be read (make it with: stepdistill evaluate)")
    date = (read_json(run / "evaluation.json") or {}).get("date", "")
    return evaluation_table(*found, str(date))


def evaluation_table(protocol: dict[str, Any], rows: list[dict[str, Any]], date: str = "") -> str:
    """The rows as a table, the protocol's line below."""
    cells = table_cells(rows, str(protocol.get("metric", "frechet")))
    spread = ", ± over seeds" if any(row.get("std") for row in rows) else ""
    said = [protocol.get("line") or protocol_line(protocol), f"on {protocol.get('device', '?')}", date]
    note = f"Lower is better; ratio and speed are against the first row{spread}. " + "; ".join(filter(None, said)) + "."
    notes = "".join(f'<p class="note">Note: {escape(own)}.</p>' for own in protocol.get("notes") or [])
    return f'{html_table(cells)}<p class="note">{escape(note)}</p>{notes}'


def _comparison(run: Path) -> str:
    path = run / "grid.png"
    if not path.is_file():
        return missing("grid.png")
    return image(path.read_bytes(), "teacher and student on the same noise")


def _samples(run: Path, most: int = MOST_SAMPLES) -> str:
    files = sorted(path for path in (run / "samples").glob("*.png") if path.is_file())
    if not files:
        return missing("samples/*.png")
    if len(files) > most:
        last = len(files) - 1
        files = [files[round(i * last / (most - 1))] for i in range(most)]
    figures = []
    for file in files:
        caption = f"{int(file.stem)} student updates" if file.stem.isdecimal() else file.stem
        figures.append(
            f"<figure>{image(file.read_bytes(), caption)}<figcaption>{escape(caption)}</figcaption></figure>"
        )
    return "\n".join(figures)


def _config(config: str | None) -> str:
    if config is None:
        return missing("config.yaml")
    return f"<details><summary>config.yaml, as resolved</summary><pre>{escape(config)}</pre></details>"


# -- curves ------------------------------------------------------------------------------------------------


def read_metrics(path: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Every scalar of a ``metrics.jsonl`` as (iterations, values), null as NaN; lines cut short are passed over."""
    curves: dict[str, tuple[list[float], list[float]]] = {}
    for row in metric_rows(path):
        if not is_number(row.get("iteration")):
            continue
        for name, value in row.items():
            number = isinstance(value, float) or is_number(value)
            if number and name not in NOT_CURVES and not name.startswith("updates/"):
                xs, ys = curves.setdefault(name, ([], []))
                xs.append(float(row["iteration"]))
                ys.append(float(value))
    return curves


def _curves(run: Path) -> str:
    return guarded("metrics.jsonl", lambda: _all_curves(run))


def _all_curves(run: Path) -> str:
    found = read_metrics(run / "metrics.jsonl")
    curves = {name: own for name, own in found.items() if not name.startswith("probe/")}
    if not curves:
        return missing("metrics.jsonl, or it has no rows yet")
    first = {"loss": 0, "grad_norm": 1}
    names = sorted(curves, key=lambda name: (first.get(name.split("/")[0], 2), name))
    return '<div class="curves">' + "\n".join(_curve(name, *curves[name]) for name in names) + "</div>"


def _curve(name: str, xs: list[float], ys: list[float]) -> str:
    """One metric as an inline SVG; values that are not finite are left out and counted in the caption."""
    from matplotlib.figure import Figure

    points = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
    left_out = len(xs) - len(points)
    if not points:
        return f'<p class="note">{escape(name)}: none of its {len(xs)} values is finite.</p>'
    x, y = thin([p[0] for p in points], [p[1] for p in points])
    figure = Figure(figsize=(4.6, 2.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(x, y, linewidth=1.2, color="#1f6feb", marker="." if len(x) < 30 else None)
    if min(y) > 0 and max(y) > 100 * min(y):
        axes.set_yscale("log")
    axes.set_title(name.replace("$", r"\$"), fontsize=9)
    axes.set_xlabel("iteration", fontsize=8)
    axes.tick_params(labelsize=7)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    note = f"{left_out} values that are not finite are left out" if left_out else ""
    caption = f"<figcaption>{escape(note)}</figcaption>" if note else ""
    return f'<figure role="img" aria-label="{escape(name)}">{svg(figure)}{caption}</figure>'
