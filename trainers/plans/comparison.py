"""Several methods from one teacher at an equal number of network passes: runs, curves, table, pictures.

Every run is a run folder of its own under ``output``; a finished one is not run again, so the comparison can be stopped
and gone on with, and its runs can be made by several processes (``--only``).  The distance over training is measured as
``stepdistill evaluate`` measures it: the same noise, labels and number of samples, the averaged student.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator

from stepdistill import assets, files
from stepdistill.config import Section, UserPath
from stepdistill.errors import UserError, shown
from stepdistill.eval.extractors.load import load_extractor
from stepdistill.eval.measure.draws import step_generator, unit_noise
from stepdistill.eval.measure.evaluate import evaluate
from stepdistill.eval.measure.pixels import unit_to_bytes
from stepdistill.eval.measure.reference_statistics import ReferenceStatistics
from stepdistill.eval.measure.results import read_results
from stepdistill.eval.measure.targets import Target
from stepdistill.eval.run_evaluation import label_names, protocol, shown_prompts, teacher_scale
from stepdistill.eval.show.comparison_page import Together, write_comparison
from stepdistill.eval.show.curves import CURVE, Curve, curves_table, draw_curves, read_curve, write_curve
from stepdistill.eval.show.grids import grid, table
from stepdistill.finiteness import is_finite
from stepdistill.judges.clip import ClipSettings
from stepdistill.locks import Lock
from stepdistill.run import RunFolder, check_place
from stepdistill.seeds import RunSeed
from stepdistill.settings import JudgeSettings, RunSettings
from stepdistill.stock.folders import hub_folder, is_free
from stepdistill.trainers.loop.trainer import Trainer

from .contestants import Contestant, RunEntry, peak_memory, read_cost, read_entries, write_cost
from .single import run_students, train, train_recipe
from .stages import Recipe
from .students import MultiStudent
from .tables import aligned, markdown, summary

FILES = {"compare.json", "compare.png", "evaluation.json", "grid.png", "report.html", "table.md", "teacher.json"}
"""What a comparison writes beside its runs' folders."""


class CompareSettings(Section):
    """What is compared, and at which cost."""

    output: UserPath = Field(description="the folder of the runs, the picture and the table")
    runs: dict[str, UserPath | RunEntry] = Field(
        min_length=1,
        description="name to config, relative to this file, or to what stepdistill.trainers.plans.contestants says",
    )
    overrides: list[str] = Field([], description="key=value for every run")
    seeds: list[RunSeed] = Field(
        [], max_length=1000, description="each run at each of these; the configs' own seed by default"
    )
    passes: int = Field(ge=1, description="network passes of every run")
    points: int = Field(12, ge=1, le=100_000, description="measurements over training, at equal steps of passes")
    samples: int = Field(5000, ge=2, le=10**7, description="of each measurement")
    final_samples: int = Field(10000, ge=2, le=10**7, description="of the finished students and the teacher")
    precision_recall: bool = Field(False, description="of the finished students too")
    diversity: bool = Field(False, description="of the finished students too")
    clip: ClipSettings | None = Field(None, description="how well their pictures fit their prompts too")

    @field_validator("runs")
    @classmethod
    def _names(cls, runs):
        for name in runs:
            if not name.isprintable() or set(name) & set("/\\") or name != name.strip(" .") or not 0 < len(name) <= 100:
                raise ValueError(
                    f"{shown(name)} cannot be the name of a run's folder; use 1 to 100 characters without slashes that "
                    "neither start nor end with a dot or a space"
                )
            if name.lower() in FILES:
                raise ValueError(f"{name!r} is a file of the comparison; give the run another name")
        return runs

    @model_validator(mode="after")
    def _seeds(self):
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is named twice")
        return self

    def columns(self) -> list[float]:
        """The passes, of those where curves are measured, that a table of them shows."""
        points = {max(1, round(self.points * share)) for share in (0.125, 0.25, 0.5, 0.75, 1.0)}
        return [self.passes * point / self.points for point in sorted(points)]

    def entries(self, folder: Path) -> dict[str, Contestant]:
        return read_entries(self.runs, self.seeds, self.overrides, self.passes, Path(self.output), folder)


def curve_protocol(own: JudgeSettings, samples: int, extractor: str, reference: str) -> dict[str, Any]:
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
            write_curve(self.file, self.points, self.protocol)

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
                pixels = family.decode(x0)
                if not is_finite(pixels):
                    raise UserError(f"the student's pictures are not finite after {trainer.passes:,} network passes")
                features.append(self.extractor(unit_to_bytes((pixels + 1) / 2)))
        meter.forward, meter.backward = kept
        return self.reference.frechet(torch.cat(features))


def _drawn_by(generator: torch.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)


def train_one(made: Contestant, settings: CompareSettings) -> None:
    """Make one contestant, going on with what there is of it.

    Raises:
        UserError: as a distillation.
        Interrupted: stopped; what there is is saved.
    """
    if made.finished:
        print(f"{made.name}: finished before, in {made.run.path}")
        if not read_cost(made):  # a kill came between
            write_cost(made, None)
        return
    if made.measured:
        train(made.work, made.run, made.run.path.exists(), around=partial(_measured, made, settings))
    elif isinstance(made.work, MultiStudent):
        run_students(made.work, made.run.path.exists(), None, closing=False)
    elif isinstance(made.work, Recipe):
        train_recipe(made.work, made.run.path.exists())
    else:
        train(made.work, made.run, made.run.path.exists())
    write_cost(made, peak_memory())


@contextlib.contextmanager
def _measured(made: Contestant, settings: CompareSettings, trainer: Trainer) -> Iterator[None]:
    """The distance of a single run before, during and after its training.

    Raises:
        UserError: it ends before its passes are spent.
    """
    curve = DistanceCurve(trainer, settings.passes / settings.points, settings.samples, made.run)
    if not curve.points:
        curve(trainer)
    yield
    curve(trainer)
    if not trainer.spent():
        raise UserError(
            f"runs.{made.name}: train.updates = {made.work.config.train.updates} end after {trainer.passes} network "
            f"passes, short of {settings.passes}; raise train.updates or lower passes"
        )


def compare(
    settings: CompareSettings,
    folder: Path,
    only: str | None = None,
    device: str = "cpu",
    apart: Callable[[str], None] | None = None,
    finished: bool = False,
) -> str:
    """Make all runs (or some), then the picture, grid and table of all; returns the table as text.

    Args:
        only: a run's name, or an entry's for all its training seeds; nothing is drawn then.
        finished: make none, and show what is finished.
        apart: makes the run of that name in a process of its own, so that its peak memory is its own; by default this
            one makes all.

    Raises:
        UserError: a config that is wrong, a name that is not one of ``runs``, what is finished was made by another
            config, nothing to show, or a folder that holds something else or that another process writes.
    """
    entries = settings.entries(folder)
    _check_output(Path(settings.output), entries)
    lock = Lock(settings.output, remedy="or choose another folder with output=FOLDER")
    with contextlib.nullcontext() if only is not None else lock:  # one run alone has its own folder's
        return _compare(settings, entries, only, device, apart, finished)


def _check_output(output: Path, entries: dict[str, Contestant]) -> None:
    """Refuse a folder of something else.

    Raises:
        UserError: neither an evaluation nor a run of the comparison is in it.
    """
    check_place(output)
    begun = any((made.run.path / "config.yaml").exists() for made in entries.values())
    names = {"evaluation.work", "teacher.work", *(made.run.path.name for made in entries.values())}
    early = is_free(output, names | {path.name for path in output.glob("reference-*.safetensors")})
    if not begun and not early and read_results(output / "evaluation.json") is None:
        raise UserError(
            f"output = {output}: the folder is not empty and holds no comparison; choose another with output=FOLDER"
        )


def _compare(
    settings: CompareSettings,
    entries: dict[str, Contestant],
    only: str | None,
    device: str,
    apart: Callable[[str], None] | None,
    finished: bool,
) -> str:
    for made in entries.values():
        if made.finished:
            made.check_finished()
    if finished:
        entries = {name: made for name, made in entries.items() if made.finished}
        if not any(made.base is None for made in entries.values()):
            raise UserError(f"--finished: no run is finished in {settings.output}; leave it out to make them")
        return report(settings, entries, device)
    wanted = {name: made for name, made in entries.items() if only in (None, name, made.title)}
    if not wanted:
        names = dict.fromkeys(name for made in entries.values() for name in (made.title, made.name))
        raise UserError(f"--only {only}: the runs are {'; '.join(names)}")
    if only is None:
        measure(settings, entries, device)  # a protocol that does not work is answered before anything is trained
    for name, made in wanted.items():
        if apart is None or made.finished or name == only:
            train_one(made, settings)
        else:
            apart(name)
    if only is not None:
        return f"{only}: done"
    return report(settings, entries, device)


@dataclass(frozen=True)
class Measured:
    """What a comparison's table and pictures are made of.

    Attributes:
        config: whose teacher, data and evaluation are those of all; its guidance scale is the teacher's where
            ``evaluation.teacher_guidance_scale`` is not set.
        asked: the finished contestants, once for each number of steps that they are measured at.
        targets, rows: the teacher, then those ``asked``; as measured when finished.
        level: the teacher's row as a point of a curve is measured; ``said`` is that protocol.
    """

    config: RunSettings
    asked: list[tuple[Contestant, int | None]]
    targets: list[Target]
    rows: list[dict]
    level: dict
    said: dict[str, Any]


def measure(settings: CompareSettings, entries: dict[str, Contestant], device: str) -> Measured:
    """The teacher and what is finished, into ``evaluation.json``, unless it stands there; and the teacher into
    ``teacher.json``, where the points of a curve are of another number of pictures."""
    output = Path(settings.output)
    config = next(made for made in entries.values() if made.base is None).job.config
    asked = [(made, steps) for made in entries.values() if made.finished for steps in made.entry.steps or [None]]
    raw = config.model_dump(mode="json")
    own = config.teacher
    path = hub_folder(assets.resolve(own.path), own.revision)
    teacher = Target("teacher", path, own.steps, teacher_scale(raw), own.null_label, own.variant)
    targets = [teacher, *(Target(made.name, made.run.student, steps) for made, steps in asked)]
    more = {key: getattr(settings, key) for key in ("precision_recall", "diversity", "clip")}
    final = protocol(raw, settings.final_samples).model_copy(update=more)
    rows = evaluate(targets, final, output / "evaluation.json", device)
    level, file = rows[0], output / "evaluation.json"
    if settings.samples != settings.final_samples:
        file = output / "teacher.json"
        (level,) = evaluate([teacher], protocol(raw, settings.samples), file, device)
    said = json.loads(file.read_text(encoding="utf-8"))["protocol"]
    return Measured(config, asked, targets, rows, level, said)


def report(settings: CompareSettings, entries: dict[str, Contestant], device: str) -> str:
    """``compare.json``, ``table.md``, ``compare.png``, ``grid.png`` and ``report.html`` from finished runs; the tables
    as text."""
    output, found = Path(settings.output), measure(settings, entries, device)
    config, rows, level, said = found.config, found.rows, found.level, found.said
    metric, title = said["metric"], f"teacher, {found.targets[0].steps} steps"
    fingerprints = said["extractor_fingerprint"], said["reference"]["fingerprint"]
    under = curve_protocol(config.evaluation, settings.samples, *fingerprints)
    curves = {name: read_curve(made.run.path / CURVE, under) for name, made in entries.items() if made.measured}
    seeds: dict[str, list[Curve]] = {}
    for name, curve in curves.items():
        seeds.setdefault(entries[name].title, []).append(curve)
    columns = settings.columns()
    pictures = [_grid(found, output / "grid.png", device)]
    if curves:
        pictures.append(draw_curves(seeds, level["frechet"], title, metric, columns, output / "compare.png"))
    cells = summary(rows[0], [(made, steps, row) for (made, steps), row in zip(found.asked, rows[1:], strict=True)])
    files.write_text(output / "table.md", markdown(cells))
    content = {
        "passes": settings.passes,
        "teacher": level["frechet"],
        "metric": metric,
        "curves": curves,
        "final": rows,
        "costs": {name: read_cost(made) for name, made in entries.items()},
    }
    files.write_json(output / "compare.json", content)
    together = Together(
        output / "evaluation.json",
        output / "grid.png",
        (title, level["frechet"]),
        metric,
        cells,
        {name: made.title for name, made in entries.items()},
    )
    page = write_comparison({name: made.run.path for name, made in entries.items()}, output / "report.html", together)
    over = aligned(curves_table(seeds, columns, level["frechet"])) + "".join(f"\nnote: {own}" for own in said["notes"])
    return (
        f"{metric}, {settings.samples} samples, over network passes (teacher {level['frechet']:.3f})\n{over}\n\n"
        f"finished, {settings.final_samples} samples\n{table(rows, metric)}\n\n{aligned(cells)}\n"
        f"pictures {', '.join(map(str, pictures))}\ntable {output / 'table.md'}\nreport {page}"
    )


def _grid(found: Measured, path: Path, device: str) -> Path:
    """The teacher and every entry at its first training seed."""
    teacher, *targets = found.targets
    first: dict[tuple[str, int | None], Target] = {}
    for (made, steps), target in zip(found.asked, targets, strict=True):
        first.setdefault((made.title, steps), replace(target, name=made.title))
    prompts, seed = shown_prompts(found.config.data.model_dump()), found.config.evaluation.seed
    names = label_names(Path(teacher.path))
    return grid([teacher, *first.values()], path, 2, seed=seed, device=device, label_names=names, prompts=prompts)
