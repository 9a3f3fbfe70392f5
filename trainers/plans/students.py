"""Several students of one teacher, each for a part of the conditions (MSD, 2410.23274).

A section ``msd`` in the config of any method, or of stages, makes K runs of it.  Student k trains alone, with a fake
score and a discriminator for itself, on the conditions that the router gives it:

    G_k = Distill(teacher, F(D, Y_k)),   k = 1..K

What is filtered: the conditions of student and fake score, and real images (a discriminator that sees all classes
tells them apart by class); not the teacher's noise-sample pairs of ``regression``, which every student sees in full
(filtered, coverage is lost), nor the images of ``tsm`` unless the config says so.  Stages with ``shared: true`` come
first and run once, on everything.  Student 0 has the seed of the config, so K = 1 is its method to the bit.

The paper released no code; rates, lengths and the handling of optimizer state between stages are not known.  Folders:

    OUTPUT/router.json  shared/  student-0/  ...  runs, one each;  student/  all of them, served by MSDPipeline
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from stepdistill.config import dump_yaml
from stepdistill.data.partition import PartitionSettings, make_router
from stepdistill.data.router import FILE, Router
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.locks import Lock
from stepdistill.pipelines import export_students
from stepdistill.run import CACHE, PAIRS, check_run_folder
from stepdistill.run_record import PartRecord
from stepdistill.stock.folders import check_replaceable
from stepdistill.trainers.loop.ranks import locked, on_main

from .build import check_fit, condition_items, make_accelerator
from .describe import data_lines, notes, student_line
from .job import Job
from .plan import Plan
from .prepare import Prepared, prepare
from .stages import STAGES, Stages, fixed_part_with_stages

MSD = "msd"
SHARED = "shared"
PATIENCE = 600.0
"""Seconds that a student's start waits for another's, which makes the router for all."""


@dataclass(frozen=True)
class Students(Plan):
    """K checked runs or stages, and what comes before them.

    Attributes:
        raw: the config, overrides included.
        undivided: the same for all conditions at once.
        shared: the stages that run once, before the students.
        students: the plan of each.
        command: config and overrides as typed, for the commands that are printed.
    """

    raw: dict[str, Any]
    settings: PartitionSettings
    undivided: Plan
    shared: Stages | None
    students: list[Plan]
    command: tuple[str, ...] = ()

    @property
    def jobs(self) -> list[Job]:
        shared = [] if self.shared is None else self.shared.jobs
        return [*shared, *self.student_jobs]

    @property
    def student_jobs(self) -> list[Job]:
        """Every run of every student, without the shared stages'."""
        return [job for student in self.students for job in student.jobs]

    @property
    def undivided_jobs(self) -> list[Job]:
        return self.undivided.jobs

    @property
    def num_students(self) -> int:
        return self.settings.students

    @property
    def cost(self) -> int:
        """As :meth:`Plan.cost`; the teacher's pairs are made once for all students."""
        pairs = sum(job.method.passes(job.config).before for job in self.students[0].jobs if job.needs.teacher_pairs)
        return super().cost - (self.num_students - 1) * pairs

    @property
    def config(self) -> dict[str, Any]:
        """The last undivided run under the folder of the whole, with ``msd``, and with the stages as written."""
        config = self.job.config.model_dump(mode="json")
        config |= {"output": str(self.output), MSD: self.settings.model_dump()}
        if STAGES in self.raw:
            config[STAGES] = self.raw[STAGES]
        return config

    def list_parts(self) -> list[PartRecord]:
        """Every stage and student under its names in this folder; none draws every condition but what is shared."""
        plans: dict[str, Plan] = {} if self.shared is None else {SHARED: self.shared}
        plans |= {f"student {number}": student for number, student in enumerate(self.students)}
        parts = []
        for name, plan in plans.items():
            folder = plan.output.relative_to(self.output)
            inner = plan.list_parts() or [PartRecord(name="", folder=".", method=plan.job.method.name)]
            for part in inner:
                title = f"{name}, {part.name}" if part.name else name
                inside = (folder / part.folder).as_posix()
                parts.append(PartRecord(name=title, folder=inside, method=part.method, undivided=False))
        return parts

    @property
    def router_file(self) -> Path:
        return self.output / FILE

    def lock(self) -> Lock:
        """Held while the files of the whole are written, not while students are trained, each in its folder."""
        return Lock(self.output, PATIENCE, "or choose another folder with output=FOLDER")

    def make_router(self, family: Family) -> Router:
        """The router of the run's conditions; the one in the folder, if the folder has one.

        Raises:
            UserError: a partition that does not fit the teacher, or the folder's router is of another one.
        """
        if self.router_file.exists():
            router = Router.load(self.router_file)
            if router.students != self.num_students:
                raise UserError(f"{self.router_file}: of {router.students} students; choose another output folder")
            return router
        encoder = family.prompt_encoder if family.condition_kind == "prompt" else None
        return make_router(self.settings, condition_items(self.job.config, family), family.condition_kind, encoder)

    def check_folder(self, resume: bool) -> bool:
        return check_run_folder(self.output, self.config, resume, {FILE, CACHE, PAIRS}, fixed_part_with_stages)

    def part(self, name: str) -> OneStudent:
        if name == SHARED:
            if self.shared is None:
                raise UserError(f"--student {SHARED}: no stage has shared = true")
            return OneStudent(self.shared.output, self.shared.job, self, name, self.shared)
        if not name.isdigit() or int(name) >= self.num_students:
            raise UserError(f"--student {name}: students are 0..{self.num_students - 1}, or {SHARED}")
        student = self.students[int(name)]
        return OneStudent(student.output, student.job, self, name, student)

    def rehearse(self, router: Router | None = None) -> None:
        family = prepare(self.job).family
        self._rehearse(family, router or self.make_router(family))

    def _rehearse(self, family: Family, router: Router) -> None:
        """Every student's conditions, and what comes before the first update of the shared stages and of student 0."""
        for job in self.student_jobs:
            check_fit(job, family, router)
        if self.shared is not None:
            self.shared.rehearse(router)
        self.students[0].rehearse(router)

    # -- training ------------------------------------------------------------------------------------------

    def train(self, resume: bool, siblings: Sequence[Job] = ()) -> bool:
        self.check_folder(resume)
        accelerator = make_accelerator()
        router = self.begin(accelerator, resume)
        if self.shared is not None:
            self.train_part(SHARED, self.shared, accelerator, True, siblings)
        for number, student in enumerate(self.students):
            self.train_part(str(number), student, accelerator, True, siblings)
        if accelerator.is_main_process:
            self._gather(router)
        return accelerator.is_main_process

    def begin(self, accelerator: Accelerator, resume: bool) -> Router:
        """The router; it and the config of the whole are written, unless they are already."""
        family = prepare(self.job).family
        with locked(accelerator, self.lock()):
            exists = on_main(accelerator, lambda: self.check_folder(resume))
            on_main(accelerator, lambda: check_replaceable(self.folder.student))
            router = self.make_router(family)
            if not exists:
                self._rehearse(family, router)

                def write() -> None:
                    router.save(self.router_file)
                    self.write_config()

                on_main(accelerator, write)
        return router

    def train_part(
        self, name: str, plan: Plan, accelerator: Accelerator, resume: bool, siblings: Sequence[Job] = ()
    ) -> None:
        """Train one student, or the shared stages, unless that is finished."""
        title = "what all share" if name == SHARED else f"student {name} of 0..{self.num_students - 1}"
        if on_main(accelerator, plan.tidy_if_finished):
            if accelerator.is_main_process:
                print(f"{title}: finished before, in {plan.output}")
            return
        if accelerator.is_main_process:
            print(f"{title}, in {plan.output}")
        plan.train(resume, [*self.jobs, *siblings])

    def _gather(self, router: Router) -> None:
        """Copy the finished students to the folder of the whole."""
        with self.lock():
            self.folder.tidy()
            self.write_config()
            export_students([student.folder.student for student in self.students], router, self.folder.student)

    # -- the dry run ---------------------------------------------------------------------------------------

    def describe(self) -> Iterator[str]:
        prepared = prepare(self.job)
        family = prepared.family
        student, fit = student_line(prepared), check_fit(self.job, family)
        router = self.make_router(family)
        self._rehearse(family, router)
        shared = "" if self.shared is None else f", {self.shared.cost:,} shared"
        yield f"""# {self.num_students} students of {self.job.config.teacher.path}, in {self.output}
partition {self.settings.partition}, router {router.hash[:12]}
student   {student}
{data_lines(fit, family)}cost      {self.cost:,} network passes in all, {self.students[-1].cost:,} a student{shared}"""
        yield from notes(prepared)
        for number, part in enumerate(self._parts(router, prepared)):
            finished = "  (finished)" if self.students[number].finished else ""
            yield f"  student {number}: {part}{finished}"
        yield from self._commands()
        yield f"\n# the last student's config, resolved\n{dump_yaml(self.student_jobs[-1].config).rstrip()}"

    def _parts(self, router: Router, prepared: Prepared) -> list[str]:
        """The conditions that each student draws, in words."""
        if router.kind == "labels":
            return [f"labels {', '.join(map(str, part))}" for part in router.parameters["labels"]]
        encoder, items = prepared.family.prompt_encoder, condition_items(self.job.config, prepared.family)
        routes = router.route(items, lambda prompts: encoder(prompts)[1])
        counts = [routes.count(number) for number in range(router.students)]
        return [f"{count:,} prompts ({count / len(routes):.1%})" for count in counts]

    def _commands(self) -> Iterator[str]:
        def command(*options: str) -> str:
            return shlex.join(["stepdistill", "distill", *self.command, *options])

        order = "" if self.shared is None else ", the shared stages first"
        yield f"\n# one after the other\n{command()}"
        yield f"# or one job each{order}"
        if self.shared is not None:
            yield command("--student", SHARED)
        for number in range(self.num_students):
            yield command("--student", str(number))
        yield f"# then, to gather and measure them\n{command('--resume')}"


@dataclass(frozen=True)
class OneStudent(Plan):
    """One of several students, or the stages that all share, trained alone: others may be trained elsewhere."""

    whole: Students
    name: str
    plan: Plan

    @property
    def jobs(self) -> list[Job]:
        return self.plan.jobs

    @property
    def config(self) -> dict[str, Any]:
        return self.plan.config

    def check_folder(self, resume: bool) -> bool:
        """As :meth:`Plan.check_folder`, of the folder of the whole, which another student may have begun."""
        return self.whole.check_folder(resume=True)

    def rehearse(self, router: Router | None = None) -> None:
        self.whole.rehearse(router)

    def describe(self) -> Iterator[str]:
        return self.whole.describe()

    def train(self, resume: bool, siblings: Sequence[Job] = ()) -> bool:
        self.check_folder(resume)
        shared = self.whole.shared
        if self.name != SHARED and shared is not None and not shared.last.finished:
            raise UserError(f"--student {self.name}: the shared stages come first; run them with --student {SHARED}")
        accelerator = make_accelerator()
        self.whole.begin(accelerator, resume=True)
        self.whole.train_part(self.name, self.plan, accelerator, resume or self.name == SHARED, siblings)
        return accelerator.is_main_process

    def finish(self) -> None:
        """Say how many students are finished, and how to go on."""
        if self.name == SHARED:
            return
        done, count = sum(student.finished for student in self.whole.students), self.whole.num_students
        remedy = "; gather them without --student, with --resume" if done == count else ""
        print(f"{done} of {count} students are finished{remedy}")
