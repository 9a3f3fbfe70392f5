"""What a comparison writes when runs are finished: measurements, tables, pictures, one page."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stepdistill import files
from stepdistill.eval.measure.evaluate import evaluate
from stepdistill.eval.measure.targets import Target
from stepdistill.eval.run_evaluation import MeasuredRun, choose_prompts, read_label_names
from stepdistill.eval.show.comparison_page import Together, write_comparison
from stepdistill.eval.show.curves import CURVE, Curve, curves_table, draw_curves, read_curve
from stepdistill.eval.show.grid import draw_grid
from stepdistill.eval.show.tables import markdown_table, results_table, text_table
from stepdistill.settings import RunSettings

from .compared import ComparedRun, read_cost
from .comparison_settings import ComparisonSettings
from .comparison_table import summary_table
from .distance_curve import curve_protocol


@dataclass(frozen=True)
class Measured:
    """The measurements that a comparison's tables and pictures show.

    Attributes:
        config: whose teacher, data and evaluation are those of all; its guidance scale is the teacher's where
            ``evaluation.teacher_guidance_scale`` is not set.
        students: the finished runs, once for each number of steps to measure them at (None: that of their folder).
        targets, rows: the teacher, then the ``students``; as measured when finished.
        level: the teacher's row, measured like a point of a curve.
        protocol: that of ``level``, as it was written.
    """

    config: RunSettings
    students: list[tuple[ComparedRun, int | None]]
    targets: list[Target]
    rows: list[dict]
    level: dict
    protocol: dict[str, Any]


def measure(settings: ComparisonSettings, runs: dict[str, ComparedRun], device: str) -> Measured:
    """The teacher and what is finished, into ``evaluation.json``, unless the file has it; and the teacher into
    ``teacher.json``, where the points of a curve are of another number of pictures.

    Raises:
        UserError: the protocol does not fit the teacher or its pictures.
    """
    file = Path(settings.output) / "evaluation.json"
    first = next(run for run in runs.values() if run.tuned is None)
    config = first.job.config
    measured = MeasuredRun.from_config(config, first.job.method.make_record(config))
    students = [(run, steps) for run in runs.values() if run.finished for steps in run.steps]
    teacher = measured.teacher_target()
    targets = [teacher, *(Target(run.name, run.folder.student, steps) for run, steps in students)]
    more = {key: getattr(settings, key) for key in ("precision_recall", "diversity", "clip")}
    final = measured.make_protocol(settings.final_samples).model_copy(update=more)
    rows = evaluate(targets, final, file, device)
    level = rows[0]
    if settings.samples != settings.final_samples:
        file = file.with_name("teacher.json")
        (level,) = evaluate([teacher], measured.make_protocol(settings.samples), file, device)
    written = json.loads(file.read_text(encoding="utf-8"))["protocol"]
    return Measured(config, students, targets, rows, level, written)


def write_report(settings: ComparisonSettings, runs: dict[str, ComparedRun], device: str) -> str:
    """Measure what is finished; write ``compare.json``, ``table.md``, ``compare.png``, ``grid.png``, ``report.html``.

    Returns:
        The tables as text.
    """
    output, measured = Path(settings.output), measure(settings, runs, device)
    metric, distance = measured.protocol["metric"], measured.level["frechet"]
    curves = _curves(settings, runs, measured)
    by_title: dict[str, list[Curve]] = {}
    for name, curve in curves.items():
        by_title.setdefault(runs[name].title, []).append(curve)
    columns, title = settings.columns(), f"teacher, {measured.targets[0].steps} steps"
    pictures = [_grid(measured, output / "grid.png", device)]
    if curves:
        pictures.append(draw_curves(by_title, distance, title, metric, columns, output / "compare.png"))
    student_rows = zip(measured.students, measured.rows[1:], strict=True)
    cells = summary_table(measured.rows[0], [(run, row) for (run, _), row in student_rows])
    files.write_text(output / "table.md", markdown_table(cells))
    content = {
        "passes": settings.passes,
        "teacher": distance,
        "metric": metric,
        "curves": curves,
        "final": measured.rows,
        "costs": {name: read_cost(run.folder) for name, run in runs.items()},
    }
    files.write_json(output / "compare.json", content)
    together = Together(
        output / "evaluation.json",
        output / "grid.png",
        (title, distance),
        metric,
        cells,
        {name: run.title for name, run in runs.items()},
    )
    page = write_comparison({name: run.folder.path for name, run in runs.items()}, output / "report.html", together)
    over_training = text_table(curves_table(by_title, columns, distance))
    finished = text_table(results_table(measured.rows, metric))
    notes = "".join(f"\nnote: {note}" for note in measured.protocol["notes"])
    return (
        f"{metric}, {settings.samples} samples, over network passes (teacher {distance:.3f})\n"
        f"{over_training}{notes}\n\n"
        f"finished, {settings.final_samples} samples\n{finished}\n\n{text_table(cells)}\n"
        f"pictures {', '.join(map(str, pictures))}\ntable {output / 'table.md'}\nreport {page}"
    )


def _curves(settings: ComparisonSettings, runs: dict[str, ComparedRun], measured: Measured) -> dict[str, Curve]:
    """The curve of each run that has one, as far as it was measured under this protocol."""
    fingerprints = (
        measured.protocol["extractor_fingerprint"],
        measured.protocol["reference"]["fingerprint"],
    )
    under = curve_protocol(measured.config.evaluation, settings.samples, *fingerprints)
    return {name: read_curve(run.folder.path / CURVE, under) for name, run in runs.items() if run.measurable}


def _grid(measured: Measured, path: Path, device: str) -> Path:
    """The pictures of the teacher and of every run at its first training seed."""
    teacher, *targets = measured.targets
    first: dict[tuple[str, int | None], Target] = {}
    for (run, steps), target in zip(measured.students, targets, strict=True):
        first.setdefault((run.title, steps), replace(target, name=run.title))
    prompts, seed = choose_prompts(measured.config.data), measured.config.evaluation.seed
    names = read_label_names(Path(teacher.path))
    return draw_grid([teacher, *first.values()], path, 2, seed=seed, device=device, label_names=names, prompts=prompts)
