"""Evaluating a finished run: its teacher at several step counts, its student, a table and a grid on equal noise."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from stepdistill import assets
from stepdistill.config import check, read_mapping
from stepdistill.data.sources import load_prompts
from stepdistill.errors import UserError
from stepdistill.eval.measure.evaluate import evaluate
from stepdistill.eval.measure.processes import Processes
from stepdistill.eval.measure.settings import Protocol
from stepdistill.eval.measure.targets import Target
from stepdistill.eval.show.grid import draw_grid
from stepdistill.eval.show.tables import Row, results_table, text_table
from stepdistill.families import claiming_family
from stepdistill.pipelines.msd import is_msd_folder
from stepdistill.plain_files import read_json
from stepdistill.run_record import RunRecord
from stepdistill.settings import DataSettings, JudgeSettings, RunSettings, SamplerSettings, TeacherSettings
from stepdistill.stock.folders import hub_folder, is_whole
from stepdistill.stock.loading import read_index


@dataclass(frozen=True)
class MeasuredRun:
    """The sections of a run's config that its evaluation reads, and its record."""

    teacher: TeacherSettings
    data: DataSettings
    sampler: SamplerSettings
    evaluation: JudgeSettings
    record: RunRecord

    @classmethod
    def from_config(cls, config: RunSettings, record: RunRecord) -> MeasuredRun:
        """Of a config that is checked already."""
        return cls(config.teacher, config.data, config.sampler, config.evaluation, record)

    @classmethod
    def read(cls, run: Path) -> MeasuredRun:
        """From a run's folder.

        Raises:
            UserError: not a run folder, or a config or record that is none of a run.
        """
        file = run / "config.yaml"
        try:
            raw = read_mapping(file)
        except FileNotFoundError:
            raise UserError(f"{run}: not a run folder (no config.yaml in it)") from None
        return cls(
            check(TeacherSettings, raw.get("teacher", {}), f"{file}: teacher"),
            check(DataSettings, raw.get("data", {}), f"{file}: data"),
            check(SamplerSettings, raw.get("sampler", {}), f"{file}: sampler"),
            check(JudgeSettings, raw.get("evaluation", {}), f"{file}: evaluation"),
            RunRecord.load(run),
        )

    @property
    def labels(self) -> Literal["uniform"] | list[int]:
        """The labels that are drawn, as a protocol says them."""
        return "uniform" if self.data.labels == "all" else self.data.labels

    def teacher_target(self, steps: int | None = None) -> Target:
        """The teacher, by default at its full steps, with ``evaluation.teacher_guidance_scale``, by default that of the
        distillation."""
        scale = self.evaluation.teacher_guidance_scale
        if scale is None:
            scale = self.record.guidance_scale
        return self._target("teacher", self.teacher.steps if steps is None else steps, scale)

    def _target(self, name: str, steps: int, guidance_scale: float | None) -> Target:
        """The teacher's folder, called so."""
        path = hub_folder(assets.resolve(self.teacher.path), self.teacher.revision)
        return Target(name, path, steps, guidance_scale, self.teacher.null_label, self.teacher.variant)

    def list_targets(self, run: Path) -> list[Target]:
        """What is measured: the teacher at its full steps and at fewer, and the student in the run's folder.

        A model that was tuned stands in the teacher's place, at the student's numbers of steps and with the guidance
        scale of its pipeline.
        """
        also = sorted(self.sampler.also_steps, reverse=True)
        students = [Target("student", run / "student", steps) for steps in [None, *also]]
        if self.record.baseline == "untuned":
            return [*(self._target("untuned", steps, None) for steps in [self.sampler.steps, *also]), *students]
        fewer = sorted(set(self.evaluation.teacher_steps) - {self.teacher.steps}, reverse=True)
        teachers = [self.teacher_target(steps) for steps in [None, *fewer]]
        stages = [part for part in self.record.parts if part.undivided] if self.evaluation.stages else []
        return [
            *teachers,
            *students,
            *(Target(f"stage {part.name}", run / part.folder / "student") for part in stages),
        ]

    def make_protocol(self, samples: int, latency: bool = False) -> Protocol:
        """How pipelines are measured as the run's config says, with ``samples`` of each.

        Raises:
            UserError: a setting that does not fit.
        """
        evaluation, data = self.evaluation, self.data
        settings = {
            "samples": samples,
            "batch_size": evaluation.batch_size,
            "seed": evaluation.seed,
            "extractor": evaluation.extractor,
            "reference": evaluation.reference,
            "labels": self.labels,
            "prompts": data.prompts,
            "prompt_column": data.prompt_column,
            "prompt_dataset": data.prompt_dataset and data.prompt_dataset.model_dump(mode="json"),
            "prompt_images": None,
            "rewards": [reward.model_dump(mode="json") for reward in self.record.rewards],
            "latency": latency,
        }
        if data.prompts_from_images and data.images is not None:
            settings["prompt_images"] = data.images.model_dump(mode="json")
        return check(Protocol, settings, "evaluation")


def evaluate_run(
    run: Path, device: torch.device | str, samples: int | None = None, processes: Processes | None = None
) -> str:
    """Measure a run's teacher and student, write ``evaluation.json`` and ``grid.png``; returns the table as text.

    With several ``processes`` each draws its share, and the first one measures, writes and returns text.

    Raises:
        UserError: not a run folder, no student in it yet, or an evaluation setting that does not fit.
    """
    measured = MeasuredRun.read(run)
    evaluation = measured.evaluation
    if not is_whole(run / "student"):
        again = shlex.join(["stepdistill", "export", str(run)])
        raise UserError(f"{run}: there is no whole student in it; finish the run, or: {again}")
    targets = measured.list_targets(run)
    text = "no distance was measured: evaluation.extractor and evaluation.reference are not set"
    main = processes is None or processes.main
    if evaluation.extractor is not None:
        protocol = measured.make_protocol(samples or evaluation.samples, evaluation.latency)
        rows = evaluate(targets, protocol, run, device, processes)
        if main:
            text = describe_results(run / "evaluation.json", rows)
    if not main:
        return ""
    first_steps = targets[0].steps
    draw_grid(
        [target for target in targets if target.name in ("student", "untuned") or target.steps in (first_steps, 1)],
        run / "grid.png",
        seed=evaluation.seed,
        device=device,
        prompts=choose_prompts(measured.data),
        label_names=read_label_names(run / "student"),
        labels=measured.labels,
    )
    return text


def choose_prompts(data: DataSettings) -> list[str] | None:
    """The prompts of a run's pictures: those that its config shows, or its first ones; None: it has none."""
    if data.shown:
        return data.shown
    prompts = load_prompts(data)
    return prompts and prompts[:10]


def describe_results(file: Path, rows: list[Row]) -> str:
    """The table of an evaluation's rows, and the protocol's line and notes from its file."""
    protocol = read_json(file)["protocol"]
    notes = "".join(f"\nnote: {note}" for note in protocol["notes"])
    return f"{text_table(results_table(rows, protocol['metric']))}\n{protocol['line']}{notes}"


def read_label_names(pipeline: Path) -> list[str] | None:
    """The names of a folder's labels, where its network's config says them."""
    if is_msd_folder(pipeline):
        pipeline = pipeline / "student-0"
    try:
        family = claiming_family(read_index(pipeline, f"pipeline {pipeline}"))
        if family is None:
            return None
        names = read_json(pipeline / family.component / "config.json")["_stepdistill"]["label_names"]
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
