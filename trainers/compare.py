"""Several methods from one teacher at an equal number of network passes: runs, curves, table, pictures.

Every run is a run folder of its own under ``output``; a finished one is not run again, so the comparison can be stopped
and gone on with, and its runs can be made by several processes (``--only``).  The distance over training is measured as
``stepdistill evaluate`` measures it: the same noise, labels and number of samples, the averaged student.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from stepdistill.eval.comparison import write_comparison
from stepdistill.eval.curves import CURVE, curve_text, curves_table, draw_curves, read_curve
from stepdistill.eval.distances import ReferenceStatistics, unit_uint8
from stepdistill.eval.evaluate import Target, evaluate, step_generator, unit_noise
from stepdistill.eval.features import load_extractor
from stepdistill.eval.of_run import label_names, protocol
from stepdistill.eval.pictures import grid, table
from stepdistill.pipelines import export_student
from stepdistill.trainers.base import Trainer
from stepdistill.trainers.job import Job, build_trainer, load_teacher, provenance, read_job, resume

from stepdistill import assets
from stepdistill.config import Section
from stepdistill.errors import UserError
from stepdistill.run import RunFolder, write_atomically
from stepdistill.settings import EvaluationSettings


class CompareSettings(Section):
    """What is compared, and at which cost."""

    output: str = Field(description="the folder of the runs, the picture and the table")
    runs: dict[str, str] = Field(min_length=1, description="name to config, relative to this file")
    overrides: list[str] = Field([], description="key=value for every run")
    passes: int = Field(ge=1, description="network passes of every run")
    points: int = Field(12, ge=1, description="measurements over training, at equal steps of passes")
    samples: int = Field(5000, ge=2, description="of each measurement")
    final_samples: int = Field(10000, ge=2, description="of the finished students and the teacher")


def read_runs(settings: CompareSettings, folder: Path) -> dict[str, Job]:
    """The checked jobs by name; all on one teacher, evaluation and seed.

    Raises:
        UserError: a config that is wrong, or not comparable with the first.
    """
    output = Path(settings.output)
    jobs = {
        name: read_job(
            folder / path,
            [*settings.overrides, f"output={output / name}", f"train.max_passes={settings.passes}"],
        )
        for name, path in settings.runs.items()
    }
    first_name, first = next(iter(jobs.items()))
    for name, job in jobs.items():
        for key in ("teacher", "evaluation", "seed", "sampler"):
            if getattr(job.config, key) != getattr(first.config, key):
                raise UserError(f"runs.{name}: its {key} is not that of {first_name}; give both the same")
        if job.config.evaluation.extractor is None:
            raise UserError(f"runs.{name}: set evaluation.extractor and evaluation.reference; the distance needs them")
    return jobs


def curve_protocol(own: EvaluationSettings, samples: int, extractor: str, reference: str) -> dict[str, Any]:
    """What the points of two curves must share to be drawn together; extractor and reference by their hashes."""
    shared = {"samples": samples, "batch_size": own.batch_size, "seed": own.seed}
    return {**shared, "extractor": extractor[:12], "reference": reference[:12]}


class DistanceCurve:
    """Measures a trainer's student each time that one more step of passes is done; the curve is a file of the run."""

    def __init__(self, trainer: Trainer, every: float, samples: int, run: RunFolder):
        self.every, self.samples, self.file = every, samples, run.path / CURVE
        evaluation = trainer.config.evaluation
        self.batch, self.seed = evaluation.batch_size, evaluation.seed
        self.extractor = load_extractor(evaluation.extractor, trainer.family.device)
        self.reference = ReferenceStatistics.load(assets.resolve(evaluation.reference))
        self.reference.check(self.extractor, trainer.family.image_shape)
        self.protocol = curve_protocol(evaluation, samples, self.extractor.fingerprint, self.reference.fingerprint)
        self.points = [p for p in read_curve(self.file, self.protocol) if p[0] <= trainer.passes]
        trainer.watchers.append(self)

    def __call__(self, trainer: Trainer) -> None:
        last = self.points[-1][0] if self.points else -1
        if trainer.passes // self.every > last // self.every or (trainer.spent() and trainer.passes > last):
            self.points.append((trainer.passes, self.measure(trainer)))
            write_atomically(self.file, curve_text(self.points, self.protocol))

    @torch.no_grad()
    def measure(self, trainer: Trainer) -> float:
        """The Fréchet distance of the averaged student's samples."""
        family, items, features = trainer.family, trainer.conditions.items, []
        meter = trainer.roles.meter
        kept = meter.forward, meter.backward
        with trainer.averaged():
            for batch, start in enumerate(range(0, self.samples, self.batch)):
                count = min(self.batch, self.samples - start)
                noise = unit_noise(self.seed, batch, count, family.sample_shape).to(family.device)
                generator = step_generator(self.seed, batch)
                condition = (
                    family.encode_conditions([items[i % len(items)] for i in range(start, start + count)])
                    if items
                    else {}
                )
                x0 = trainer.sampler.sample(trainer.roles.student, noise, condition, _drawn_by(generator))
                features.append(self.extractor(unit_uint8((family.decode(x0) + 1) / 2)))
        meter.forward, meter.backward = kept
        return self.reference.frechet(torch.cat(features))


def _drawn_by(generator: torch.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def train_one(name: str, job: Job, settings: CompareSettings) -> None:
    """Train, measure and export one run, going on with what there is of it.

    Raises:
        UserError: as a distillation.
        Interrupted: stopped; the run is saved.
    """
    run = RunFolder(job.config.output)
    if (run.student / "model_index.json").is_file():
        print(f"{name}: finished before, in {run.path}")
        return
    exists = run.check(job.config, resume=run.path.exists())
    trainer = build_trainer(job, run, family=load_teacher(job.config))
    trainer.use_attention()
    if exists:
        resume(trainer, run)
    else:
        run.create(job.config, job.config.seed)
    curve = DistanceCurve(trainer, settings.passes / settings.points, settings.samples, run)
    if not curve.points:
        curve(trainer)
    trainer.fit()
    curve(trainer)
    if not trainer.spent():
        raise UserError(
            f"runs.{name}: its train.updates = {job.config.train.updates} end after {trainer.passes} network passes, "
            f"short of {settings.passes}; raise train.updates or lower passes"
        )
    with trainer.averaged():
        export_student(trainer.family, trainer.roles.student, trainer.sampler, run.student, provenance(job, trainer))


def compare(settings: CompareSettings, folder: Path, only: str | None = None, device: str = "cpu") -> str:
    """Make all runs (or one), then the picture, grid and table of all; returns the table as text.

    Raises:
        UserError: a config that is wrong, or a name that is not one of ``runs``.
    """
    jobs = read_runs(settings, folder)
    if only is not None:
        if only not in jobs:
            raise UserError(f"--only {only}: the runs are {', '.join(jobs)}")
        train_one(only, jobs[only], settings)
        return f"{only}: done"
    for name, job in jobs.items():
        train_one(name, job, settings)
    return report(settings, jobs, device)


def report(settings: CompareSettings, jobs: dict[str, Job], device: str) -> str:
    """``compare.json``, ``compare.png``, ``grid.png`` and ``report.html`` from finished runs; the tables as text."""
    output = Path(settings.output)
    config = next(iter(jobs.values())).config
    own = config.evaluation
    teacher = Target("teacher", assets.resolve(config.teacher.path), config.teacher.steps, own.teacher_guidance_scale)
    students = [Target(name, RunFolder(job.config.output).student) for name, job in jobs.items()]

    def measured(targets: list[Target], samples: int, file: str) -> list[dict]:
        return evaluate(targets, protocol(config.model_dump(mode="json"), samples), output / file, device)

    (level,) = measured([teacher], settings.samples, "teacher.json")
    said = json.loads((output / "teacher.json").read_text(encoding="utf-8"))["protocol"]
    metric = said["metric"]
    under = curve_protocol(own, settings.samples, said["extractor_fingerprint"], said["reference"]["fingerprint"])
    rows = measured([teacher, *students], settings.final_samples, "evaluation.json")
    curves = {name: read_curve(RunFolder(job.config.output).path / CURVE, under) for name, job in jobs.items()}
    columns = [settings.passes * share for share in (0.125, 0.25, 0.5, 0.75, 1.0)]
    title = f"teacher, {teacher.steps} steps"
    draw_curves(curves, level["frechet"], title, metric, columns, output / "compare.png")
    grid(
        [teacher, *students],
        output / "grid.png",
        2,
        seed=own.seed,
        device=device,
        label_names=label_names(Path(teacher.path)),
    )
    content = {
        "passes": settings.passes,
        "teacher": level["frechet"],
        "metric": metric,
        "curves": curves,
        "final": rows,
    }
    write_atomically(output / "compare.json", json.dumps(content, indent=1))
    page = write_comparison(
        {name: RunFolder(job.config.output).path for name, job in jobs.items()},
        output / "report.html",
        output / "evaluation.json",
        output / "grid.png",
        (title, level["frechet"]),
        metric,
    )
    cells = curves_table(curves, columns, level["frechet"])
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    text = "\n".join("  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)) for row in cells)
    return (
        f"{metric}, {settings.samples} samples, over network passes (teacher {level['frechet']:.3f})\n{text}\n\n"
        f"finished, {settings.final_samples} samples\n{table(rows, metric)}\n"
        f"pictures {output / 'compare.png'}, {output / 'grid.png'}\nreport {page}"
    )
