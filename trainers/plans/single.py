"""One run: a teacher, a method, a student."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from stepdistill.attention.choice import require_backend
from stepdistill.attention.kernels import AUTO
from stepdistill.config import dump_yaml
from stepdistill.data.router import Router
from stepdistill.digests import check_same
from stepdistill.errors import UserError, writing
from stepdistill.run import RunFolder
from stepdistill.stock.folders import check_replaceable
from stepdistill.trainers.loop.ranks import locked, on_main
from stepdistill.trainers.loop.stopping import Interrupted
from stepdistill.trainers.loop.trainer import Trainer

from .build import build_trainer, make_accelerator
from .build import resume as resume_trainer
from .describe import data_lines, method_lines, notes, student_line
from .finish import export
from .job import Job
from .plan import Plan, Watch
from .prepare import Prepared, prepare
from .processes import end_processes
from .rehearsal import check_student, count_parameters, rehearse


@dataclass(frozen=True)
class Run(Plan):
    """One job in its run folder."""

    measurable = True
    watch: Watch = contextlib.nullcontext

    @classmethod
    def of(cls, job: Job, **fields: Any) -> Self:
        """The run of a job; ``fields``: those of a subclass."""
        return cls(Path(job.config.output), job, **fields)

    def watched_by(self, watch: Watch) -> Run:
        return replace(self, watch=watch)

    @property
    def jobs(self) -> list[Job]:
        return [self.job]

    @property
    def config(self) -> dict[str, Any]:
        return self.job.config.model_dump(mode="json")

    def check_folder(self, resume: bool) -> bool:
        return self.folder.check(self.job.config, resume)

    def rehearse(self, router: Router | None = None) -> None:
        rehearse(prepare(self.job), router)

    def describe(self) -> Iterator[str]:
        job, config = self.job, self.job.config
        train = config.train
        yield dump_yaml(config).rstrip()
        prepared = prepare(job)
        family = prepared.family
        parameters, student = count_parameters(family), student_line(prepared)
        fit = rehearse(prepared)
        conditions = f"{len(fit.items)} {family.condition_kind}s"
        if family.condition_kind == "none":
            conditions = "no conditions"
        yield f"""
# the plan
teacher   {config.teacher.path}: family {family.name}, {parameters / 1e6:.2f}M parameters, predicts {family.kind},
          samples {"x".join(map(str, family.sample_shape))}, {conditions}
student   {student}
method    {job.method.name}: {job.method.title}
training  {train.updates} student updates of {train.batch_size * train.gradient_accumulation} samples a process,
          {self.cost:,} network passes on one (one picture each; backward is two)
{method_lines(prepared, 10)}{data_lines(fit, family)}writes    {config.output}"""
        yield from notes(prepared)

    def train(
        self,
        resume: bool,
        siblings: Sequence[Job] = (),
        on_begin: Callable[[], None] | None = None,
    ) -> bool:
        """As :meth:`Plan.train`.

        Args:
            on_begin: called by the main process before the run's first file is written.
        """
        run, config = self.folder, self.job.config
        accelerator = make_accelerator(log_with=list(config.train.trackers) or None, project_dir=str(run.path / "logs"))
        on_main(accelerator, lambda: self.check_folder(resume))
        with locked(accelerator, run.lock()):
            exists = on_main(accelerator, lambda: self.check_folder(resume))  # again: nobody else writes now
            on_main(accelerator, run.tidy)
            on_main(accelerator, lambda: check_replaceable(run.student))
            dtype = config.train.autocast_dtype or torch.float32
            require_backend(config.train.attention, "train.attention", accelerator.device, dtype, gradients=True)
            prepared = prepare(self.job)
            trainer = self._make_trainer(prepared, accelerator, siblings, exists)
            self._begin(prepared, trainer, exists, on_begin)
            if exists:
                self._resume(trainer)
            self._fit(trainer)
        return accelerator.is_main_process

    def _make_trainer(
        self, prepared: Prepared, accelerator: Accelerator, siblings: Sequence[Job], exists: bool
    ) -> Trainer:
        """The trainer, of the teacher that the run and its siblings were started with; a new run's export is tried."""
        trainer = build_trainer(self.job, self.folder, accelerator, prepared.family, sampler=prepared.sampler)
        check_teacher(self.job, trainer, siblings)
        trainer.use_attention()
        if not exists:
            on_main(accelerator, lambda: check_student(self.job, trainer))
        return trainer

    def _begin(self, prepared: Prepared, trainer: Trainer, exists: bool, on_begin: Callable[[], None] | None) -> None:
        """Write the run's first files, and print what it trains on."""
        run, config, accelerator = self.folder, self.job.config, trainer.accelerator

        def begin() -> None:
            if on_begin is not None:
                on_begin()
            if not exists:
                run.create(config, config.seed, trainer.teacher_digests)
                self.make_record().save(run.path)

        on_main(accelerator, begin)
        if accelerator.is_main_process:
            self._print_start(prepared, trainer)
            with writing(run.path / "logs"):
                accelerator.init_trackers("stepdistill")
        accelerator.wait_for_everyone()

    def _print_start(self, prepared: Prepared, trainer: Trainer) -> None:
        job, config = self.job, self.job.config
        for section in job.unused:
            print(f"note: the section '{section}' is not used by method {job.method.name}")
        for note in notes(prepared):
            print(note)
        is_stage = job.cache is not None  # whose sections and images may be for other stages
        has_images = config.data.images is not None and not config.data.prompts_from_images
        if has_images and not is_stage and not job.needs.images:
            print(f"note: data.images is not used: these settings of {job.method.name} train without real images")
        for line in trainer.parts.describe_data():
            print(line)
        choice = ", the fastest here" if config.train.attention == AUTO else ""
        print(f"attention {trainer.attention}{choice}")

    def _resume(self, trainer: Trainer) -> None:
        run, config, accelerator = self.folder, self.job.config, trainer.accelerator
        resumed = resume_trainer(trainer, run)
        on_main(accelerator, self.write_config)  # what may change (train.updates) counts from now on
        on_main(accelerator, lambda: run.write_environment(config.seed, trainer.teacher_digests))
        if resumed and accelerator.is_main_process:
            print(f"resumed at student update {trainer.counters['student']}")

    def _fit(self, trainer: Trainer) -> None:
        """Train to the end and export."""
        accelerator = trainer.accelerator
        try:
            with self.watch(trainer):
                trainer.fit()
        except Interrupted as stop:
            if accelerator.is_main_process:
                print(f"{stop}: saved at student update {trainer.counters['student']}; go on with --resume")
            accelerator.end_training()
            end_processes()
            raise
        if accelerator.is_main_process:
            for line in trainer.skipped_lines():
                print(line)
        trainer.check_trained()
        on_main(accelerator, lambda: export(self.job, trainer, self.folder))
        accelerator.end_training()


def check_teacher(job: Job, trainer: Trainer, siblings: Sequence[Job] = ()) -> None:
    """Refuse another teacher than the one that this run, or another of the same whole, was started with.

    Raises:
        UserError: it names the network and both digests; or the processes have teachers that differ.
    """
    teacher = job.config.teacher
    everywhere = gather_object([trainer.teacher_digests])
    if any(digests != everywhere[0] for digests in everywhere):
        raise UserError(f"teacher {teacher.path}: not the same weights in every process; copy them to every machine")

    def check() -> None:
        for other in (job, *(sibling for sibling in siblings if sibling.config.teacher == teacher)):
            check_same(RunFolder(other.config.output).teacher, trainer.teacher_digests, teacher.path)

    on_main(trainer.accelerator, check)
