"""What a config describes, whatever its shape: one run, stages in turn, several students, or a comparison of these.

:mod:`.resolve` makes plans.  The command line asks a plan: ``check_folder``, then ``describe`` (a dry run) or ``run``.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from stepdistill.data.router import Router
from stepdistill.errors import UserError
from stepdistill.run import RunFolder
from stepdistill.run_record import PartRecord, RunRecord
from stepdistill.stock.folders import is_whole
from stepdistill.trainers.loop.trainer import Trainer

from .finish import evaluate_and_report
from .job import Job
from .processes import end_processes

Watch = Callable[[Trainer], contextlib.AbstractContextManager]
"""Entered with a trainer that is ready, left when it has trained."""


@dataclass(frozen=True)
class Plan(ABC):
    """Something to train, whole or in parts.  Nothing has been loaded or written to make one.

    Attributes:
        output: its folder.
        job: the run whose teacher, data and evaluation are those of the whole.
    """

    output: Path
    job: Job

    measurable: ClassVar[bool] = False
    """Whether one trainer trains its student from beginning to end, so that the student can be measured on the way."""

    @property
    @abstractmethod
    def jobs(self) -> list[Job]:
        """Every training run that it is made of, in order."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """What ``config.yaml`` in its folder says."""

    def list_parts(self) -> list[PartRecord]:
        """The runs that it is made of, for its record; [] for one run."""
        return []

    def make_record(self) -> RunRecord:
        """What an evaluation and a report need to know of it."""
        record = self.job.method.make_record(self.job.config)
        return record.model_copy(update={"parts": self.list_parts()})

    def write_config(self) -> None:
        """Write ``config.yaml`` and ``record.json`` of its folder.

        Raises:
            UserError: they cannot be written.
        """
        self.folder.write_config(self.config)
        self.make_record().save(self.output)

    @property
    def undivided_jobs(self) -> list[Job]:
        """Its runs as they would be if one student had all conditions."""
        return self.jobs

    @property
    def num_students(self) -> int:
        return 1

    @property
    def folder(self) -> RunFolder:
        """Its folder as a run's: config, student, evaluation, report."""
        return RunFolder(self.output)

    @property
    def finished(self) -> bool:
        """Whether its student is exported."""
        return is_whole(self.folder.student)

    @property
    def cost(self) -> int:
        """Network passes on one process, as planned."""
        return sum(job.planned_passes for job in self.jobs)

    @abstractmethod
    def check_folder(self, resume: bool) -> bool:
        """Whether its folder holds this plan's work already; nothing is written.

        Raises:
            UserError: the folder holds something else, the work of another config, or work that ``resume`` does not
                allow to go on with.
        """

    @abstractmethod
    def rehearse(self, router: Router | None = None) -> None:
        """Load what its unfinished runs load, and try their first update and their export.

        Args:
            router: of several students, in place of the one in the file.

        Raises:
            UserError: a run would not get to its end.
        """

    @abstractmethod
    def describe(self) -> Iterator[str]:
        """What it would do and what that costs, as texts to print; each run is rehearsed, nothing is written."""

    @abstractmethod
    def train(self, resume: bool, siblings: Sequence[Job] = ()) -> bool:
        """Everything up to its exported student.  Returns whether this is the main process.

        Args:
            resume: go on with what its folder holds.
            siblings: other runs of the same whole, which have the same teacher.

        Raises:
            UserError: anything that stops it, another process that writes in its folder among them.
            Interrupted: stopped; what was done is saved.
        """

    def run(self, resume: bool = False) -> None:
        """Train, then what follows training: evaluation and report.

        Raises:
            UserError: as :meth:`train`, or the evaluation failed.
            Interrupted: stopped; what was done is saved.
        """
        main_process = self.train(resume)
        end_processes()
        if main_process:
            self.finish()

    def finish(self) -> None:
        """What the main process does after training."""
        evaluate_and_report(self.job.config, self.folder)

    def watched_by(self, watch: Watch) -> Plan:
        """The same plan with its trainer watched; itself where it is not :attr:`measurable`."""
        return self

    def part(self, name: str) -> Plan:
        """The plan of one of several students.

        Raises:
            UserError: there are not several, or none of this name.
        """
        raise UserError(f"--student {name}: the config has one student; add a section msd for several")

    def tidy_if_finished(self) -> bool:
        """Whether it is finished; then what a kill at its end left is removed."""
        if not self.finished:
            return False
        with contextlib.suppress(UserError), self.folder.lock():
            self.folder.tidy()
        return True
