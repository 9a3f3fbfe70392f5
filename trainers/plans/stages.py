"""Stages: a distillation as runs in turn, each of which takes the student of one before.

A config of stages is a run's config with a list of ``stages``.  A stage's keys are merged over the rest of the file;
``name`` names its folder, ``take`` says what it takes and ``of`` from which earlier stage (the last one by default):

    nothing   the teacher's weights, as any run
    student   the last student: its LoRA is trained further, or its weights are
    both      the same, and the fake score of its run's newest checkpoint
    under     a new LoRA on top of the last student, which stays frozen below

Every stage's folder is a run folder (``distill --resume`` goes on with the one that was stopped; finished ones, those
with an exported student, are passed over).  The last student is that of the whole, and is evaluated with the teacher.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from accelerate import Accelerator
from pydantic import Field

from stepdistill import files
from stepdistill.config import Section, dump_yaml
from stepdistill.data.router import Router
from stepdistill.run import CACHE, check_run_folder, fixed_part
from stepdistill.run_record import PartRecord
from stepdistill.stock.folders import check_replaceable
from stepdistill.trainers.loop.ranks import locked, on_main

from .build import make_accelerator
from .describe import data_lines, method_lines, notes, student_line
from .job import Job
from .plan import Plan
from .prepare import prepare
from .rehearsal import rehearse
from .single import Run

STAGES = "stages"


class StageSettings(Section):
    """What a stage says besides a run's keys."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="its folder is NN-name")
    take: Literal["nothing", "student", "both", "under"] = Field("student", description="from the stage named in of")
    of: str | None = Field(None, description="an earlier stage; the last one by default")
    shared: bool = Field(False, description="of several students (msd): run once, on every condition, before them")


@dataclass(frozen=True)
class Stage(Run):
    """A run that takes from an earlier stage, ``source``; None: from the teacher."""

    settings: StageSettings = field(kw_only=True)
    source: Stage | None = field(kw_only=True)

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def waits(self) -> bool:
        """Whether the stage that it takes from has not run yet."""
        return self.source is not None and not self.source.finished

    def rehearse(self, router: Router | None = None) -> None:
        rehearse(prepare(self.job), router, self.waits)

    def describe_in(self, stages: Stages, number: int) -> Iterator[str]:
        """What it would do as the stage of this number (from 1)."""
        job, train = self.job, self.job.config.train
        prepared = prepare(job)
        student = student_line(prepared)
        fit = rehearse(prepared, waits=self.waits)
        taken = "the teacher's weights"
        if self.source is not None:
            taken = f"{self.settings.take} of {self.source.name}"
        samples = train.updates * train.batch_size * train.gradient_accumulation
        data = "".join(f"\n    {line}" for line in data_lines(fit, prepared.family).splitlines())
        yield f"""
{number:2d}. {self.name}{"  (finished)" if self.finished else ""}
    method    {job.method.name}: {job.method.title}
    takes     {taken}; weights {job.config.roles.weights}
    student   {student}
    training  {train.updates} updates, {samples:,} samples a process
{method_lines(prepared, 14)}    cost      {self.cost:,} network passes ({self.cost / stages.cost:.0%}){data}"""
        if self is stages.last:
            yield f"\ncost of all  {stages.cost:,} network passes (one picture each; backward is two)\n"
            yield from notes(prepared)


@dataclass(frozen=True)
class Stages(Plan):
    """Checked stages in turn; ``raw`` is their config, overrides included.  The last one's job is that of the whole."""

    raw: dict[str, Any]
    stages: list[Stage]

    @property
    def last(self) -> Stage:
        return self.stages[-1]

    @property
    def jobs(self) -> list[Job]:
        return [stage.job for stage in self.stages]

    @property
    def config(self) -> dict[str, Any]:
        """The last stage's run under the folder of the whole, and the stages as written."""
        return {**self.last.config, "output": str(self.output), STAGES: self.raw[STAGES]}

    @property
    def unfinished(self) -> list[Stage]:
        return [stage for stage in self.stages if not stage.finished]

    def list_parts(self) -> list[PartRecord]:
        return [
            PartRecord(name=stage.name, folder=stage.output.name, method=stage.job.method.name) for stage in self.stages
        ]

    def check_folder(self, resume: bool) -> bool:
        started = [stage for stage in self.stages if (stage.output / "config.yaml").exists()]
        early = set()
        if not started:  # the teacher's pairs may have been made before, in the folder of their stage
            early = {CACHE, *(stage.output.name for stage in self.stages)}
        if not check_run_folder(self.output, self.config, resume, early, fixed_part_with_stages, "recipe"):
            return False
        for stage in started:
            stage.check_folder(resume=True)
        return True

    def rehearse(self, router: Router | None = None) -> None:
        for stage in self.unfinished:
            stage.rehearse(router)

    def describe(self) -> Iterator[str]:
        yield f"# the recipe: {len(self.stages)} stages in {self.output}"
        for number, stage in enumerate(self.stages, 1):
            yield from stage.describe_in(self, number)
        yield f"# the last stage's config, resolved\n{dump_yaml(self.job.config).rstrip()}"

    def train(self, resume: bool, siblings: Sequence[Job] = ()) -> bool:
        accelerator = make_accelerator()
        on_main(accelerator, lambda: self.check_folder(resume))
        with locked(accelerator, self.folder.lock()):
            exists = on_main(accelerator, lambda: self.check_folder(resume))  # again: nobody else writes now
            on_main(accelerator, self.folder.tidy)
            on_main(accelerator, lambda: check_replaceable(self.folder.student))
            for stage in self.unfinished[1:]:  # the first one is checked right before it starts
                stage.rehearse()
            for number, stage in enumerate(self.stages, 1):
                title = f"stage {number} of {len(self.stages)}, {stage.name}"
                self._train_stage(stage, title, accelerator, exists, siblings)
            on_main(accelerator, self._take_student)
        return accelerator.is_main_process

    def _train_stage(
        self, stage: Stage, title: str, accelerator: Accelerator, exists: bool, siblings: Sequence[Job]
    ) -> None:
        if on_main(accelerator, stage.tidy_if_finished):
            if accelerator.is_main_process:
                print(f"{title}: finished before, in {stage.output}")
            return
        if accelerator.is_main_process:
            print(f"{title}: {stage.job.method.title}")
        on_begin = None if exists else self.write_config
        stage.train(True, [*self.jobs, *siblings], on_begin)

    def _take_student(self) -> None:
        """Copy the last stage's student to that of the whole, complete or not at all.

        Raises:
            UserError: it cannot be written.
        """
        self.write_config()
        check_replaceable(self.folder.student)
        with files.replacing_folder(self.folder.student) as temporary:
            shutil.copytree(self.last.folder.student, temporary, dirs_exist_ok=True)


def fixed_part_with_stages(config: dict[str, Any]) -> dict[str, Any]:
    """A config with or without stages, without the keys that may change when it is resumed."""
    return {**fixed_part(config), STAGES: [fixed_part(stage) for stage in config.get(STAGES) or []]}
