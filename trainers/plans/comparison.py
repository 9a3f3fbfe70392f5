"""Several methods from one teacher at an equal number of network passes: runs, curves, table, pictures.

Every run has a folder under ``output``; a finished one is not run again, so a comparison can be stopped and resumed,
and its runs can be made by several processes (``--only``).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from stepdistill.data.router import Router
from stepdistill.devices import best_device
from stepdistill.errors import UserError
from stepdistill.eval.measure.results import read_results
from stepdistill.eval.show.tables import text_table
from stepdistill.locks import Lock
from stepdistill.run import check_writable
from stepdistill.stock.folders import is_free
from stepdistill.trainers.loop.trainer import Trainer

from .compared import ComparedRun, peak_memory, read_cost, write_cost
from .comparison_report import measure, write_report
from .comparison_settings import ComparisonSettings
from .distance_curve import DistanceCurve
from .job import Job
from .plan import Plan
from .processes import run_command


@dataclass(frozen=True)
class Comparison(Plan):
    """Checked runs by name, in the order that they can be made.

    Attributes:
        command: config and overrides as typed: each run is made by this command with ``--only``, in a new process, so
            that its peak memory can be measured; without a command all are made in this process.
        only: make this run alone, or those of this title at all training seeds; nothing is shown then.
    """

    settings: ComparisonSettings
    runs: dict[str, ComparedRun]
    command: tuple[str, ...] = ()
    only: str | None = None

    @property
    def jobs(self) -> list[Job]:
        return [job for run in self.runs.values() for job in run.plan.jobs]

    @property
    def config(self) -> dict[str, Any]:
        return self.settings.model_dump(mode="json")

    @property
    def finished(self) -> bool:
        return all(run.finished for run in self.runs.values())

    @property
    def selected(self) -> dict[str, ComparedRun]:
        """The runs to make."""
        return {name: run for name, run in self.runs.items() if self.only in (None, name, run.title)}

    def part(self, name: str) -> Comparison:
        part = replace(self, only=name)
        if not part.selected:
            names = dict.fromkeys(known for run in self.runs.values() for known in (run.title, run.name))
            raise UserError(f"--only {name}: the runs are {'; '.join(names)}")
        return part

    def check_folder(self, resume: bool) -> bool:
        """As :meth:`Plan.check_folder`; a comparison always goes on."""
        check_writable(self.output)
        begun = any((run.folder.path / "config.yaml").exists() for run in self.runs.values())
        names = {"evaluation.work", "teacher.work", *(run.folder.path.name for run in self.runs.values())}
        early = is_free(self.output, names | {path.name for path in self.output.glob("reference-*.safetensors")})
        measured = read_results(self.output / "evaluation.json") is not None
        if not begun and not early and not measured:
            raise UserError(
                f"output = {self.output}: the folder is not empty and holds no comparison; choose another with "
                "output=FOLDER"
            )
        return begun

    def rehearse(self, router: Router | None = None) -> None:
        for run in self.selected.values():
            if run.tuned is None and not run.finished:  # a tuning's teacher is trained first
                run.plan.rehearse(router)

    def describe(self) -> Iterator[str]:
        count = "1 run" if len(self.selected) == 1 else f"{len(self.selected)} runs"
        yield f"# {count} at a budget of {self.settings.passes:,} network passes, in {self.output}"
        cells = [["run", "method", "planned passes", ""]]
        for name, run in self.selected.items():
            methods = dict.fromkeys(job.method.name for job in run.plan.jobs)
            cells.append([name, ", ".join(methods), f"{run.plan.cost:,}", "finished" if run.finished else ""])
        yield text_table(cells)
        self.rehearse()

    # -- making the runs -----------------------------------------------------------------------------------

    def run(self, resume: bool = True) -> None:
        self.check_folder(resume)
        with self._lock():
            super().run(resume)

    def _lock(self) -> contextlib.AbstractContextManager:
        if self.only is not None:  # one run alone holds the lock of its folder
            return contextlib.nullcontext()
        return Lock(self.output, remedy="or choose another folder with output=FOLDER")

    def train(self, resume: bool, siblings: Sequence[Job] = ()) -> bool:
        for run in self.runs.values():
            if run.finished:
                run.check_finished()
        if self.only is None:  # a protocol that does not work is answered before anything is trained
            measure(self.settings, self.runs, best_device())
        for name, run in self.selected.items():
            if not self.command or run.finished or name == self.only:
                self._train_run(run)
            else:
                run_command("compare", *self.command, "--only", name)
        return True

    def _train_run(self, run: ComparedRun) -> None:
        """Make one run, going on with what its folder holds.

        Raises:
            UserError: as a distillation.
            Interrupted: stopped; what was done is saved.
        """
        if run.finished:
            print(f"{run.name}: finished before, in {run.folder.path}")
            if not read_cost(run.folder):  # a kill came between
                write_cost(run.plan, None)
            return
        resume = run.folder.path.exists()
        plan = run.plan
        if run.measurable:
            plan = plan.watched_by(lambda trainer: self._measured(run, trainer))
        plan.train(resume)
        write_cost(run.plan, peak_memory())

    @contextlib.contextmanager
    def _measured(self, run: ComparedRun, trainer: Trainer) -> Iterator[None]:
        """Measure the distance of a single run before, during and after its training.

        Raises:
            UserError: it ends before its passes are spent.
        """
        settings = self.settings
        curve = DistanceCurve(trainer, settings.passes / settings.points, settings.samples, run.folder)
        if not curve.points:
            curve(trainer)
        yield
        curve(trainer)
        if not trainer.spent():
            raise UserError(
                f"runs.{run.name}: train.updates = {run.job.config.train.updates} end after {trainer.passes} network "
                f"passes, short of {settings.passes}; raise train.updates or lower passes"
            )

    # -- what it shows -------------------------------------------------------------------------------------

    def finish(self) -> None:
        if self.only is not None:
            print(f"{self.only}: done")
            return
        print(write_report(self.settings, self.runs, best_device()))

    def show_finished(self) -> None:
        """Make no run; measure and show what is finished.

        Raises:
            UserError: nothing is finished, or it was made by another config.
        """
        self.check_folder(resume=True)
        with self._lock():
            runs = {name: run for name, run in self.runs.items() if run.finished}
            for run in runs.values():
                run.check_finished()
            if not any(run.tuned is None for run in runs.values()):
                raise UserError(f"--finished: no run is finished in {self.output}; leave it out to make them")
            print(write_report(self.settings, runs, best_device()))
