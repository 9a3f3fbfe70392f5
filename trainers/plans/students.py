"""Several students of one teacher, each for a part of the conditions (MSD, 2410.23274).

A section ``msd`` beside any method, or recipe of stages, makes K runs of it.  Student k trains alone, with its own fake
score and discriminator, on the conditions that the router gives it:

    G_k = Distill(teacher, F(D, Y_k)),   k = 1..K

What is filtered: the conditions of student and fake score, and real images (a discriminator that sees all classes
tells them apart by class); not the teacher's noise-sample pairs of ``regression``, which every student sees in full
(filtered, coverage is lost), nor the images of ``tsm`` unless asked for.  Stages with ``shared: true`` come first and
run once, on everything.  Student 0 has the run's own seed, so K = 1 is its base method to the bit.

The paper released no code; rates, lengths and the handling of optimizer state between stages are not known.  Folders:

    OUTPUT/router.json  shared/  student-0/  ...  runs, one each;  student/  all of them, served by MSDPipeline
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.config import check, merge, output_folder, section_of
from stepdistill.data.partition import PartitionSettings, make_router
from stepdistill.data.router import FILE, Router
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.locks import Lock
from stepdistill.run import CACHE, PAIRS, RunFolder, holds_run
from stepdistill.seeds import LARGEST
from stepdistill.stock.folders import is_whole

from .build import condition_items
from .job import Job, make_job
from .stages import STAGES, Recipe, make_recipe, with_stages

MSD = "msd"
SHARED = "shared"
PATIENCE = 600.0
"""Seconds that a student's start waits for another's, which makes the router for all."""
SEED_STEP = 100
"""Between students' seeds: more than a run's own offsets."""


def jobs_of(work: Job | Recipe) -> list[Job]:
    """The one run, or those of a recipe's stages."""
    return [work] if isinstance(work, Job) else [stage.job for stage in work.stages]


@dataclass(frozen=True)
class MultiStudent:
    """K checked runs or recipes and what comes before them; ``base`` is the same for all conditions at once."""

    raw: dict[str, Any]
    settings: PartitionSettings
    output: Path
    base: Job | Recipe
    shared: Recipe | None
    students: list[Job | Recipe]

    @property
    def job(self) -> Job:
        """The last run of ``base``: its teacher, data and evaluation are the whole's."""
        return jobs_of(self.base)[-1]

    @property
    def jobs(self) -> list[Job]:
        """Every run of every student."""
        return [job for work in self.students for job in jobs_of(work)]

    @property
    def run(self) -> RunFolder:
        """The whole's folder: config, router, the students together, evaluation, report."""
        return RunFolder(self.output)

    def lock(self) -> Lock:
        """Held while the whole's own files are written, not while students are trained, each in its folder."""
        return Lock(self.output, PATIENCE, "or choose another folder with output=FOLDER")

    def folder(self, k: int) -> RunFolder:
        return RunFolder(self.output / f"student-{k}")

    def finished(self, k: int) -> bool:
        return is_whole(self.folder(k).student)

    @property
    def router_file(self) -> Path:
        return self.output / FILE

    @property
    def config(self) -> dict[str, Any]:
        """What ``config.yaml`` says: the base's last run under the whole's folder, and ``msd`` and stages as given."""
        said = {**self.job.config.model_dump(mode="json"), "output": str(self.output), MSD: self.settings.model_dump()}
        return {**said, STAGES: self.raw[STAGES]} if STAGES in self.raw else said

    def make_router(self, family: Family) -> Router:
        """The router of the run's conditions; the one that lies in the folder where there is one.

        Raises:
            UserError: a partition that does not fit the teacher, or the folder's router is of another one.
        """
        if self.router_file.exists():
            router = Router.load(self.router_file)
            if router.students != self.settings.students:
                raise UserError(f"{self.router_file}: of {router.students} students; choose another output folder")
            return router
        encoder = family.prompt_encoder if family.condition_kind == "prompt" else None
        return make_router(self.settings, condition_items(self.job.config, family), family.condition_kind, encoder)

    def check_folder(self, resume: bool) -> bool:
        """Whether the folder holds this multi-student run already; nothing is written.

        Raises:
            UserError: it holds something else, another run, or one that ``--resume`` was not said for.
        """
        return holds_run(self.output, self.config, resume, {FILE, CACHE, PAIRS}, with_stages)


def is_multi_student(raw: dict[str, Any]) -> bool:
    return MSD in raw


def make_multi_student(raw: dict[str, Any], where: str = "config") -> MultiStudent:
    """Check everything, every student's run, before anything is loaded.

    Raises:
        UserError: one line that names the key, and the stage where there are stages.
    """
    section = raw[MSD]
    settings = check(PartitionSettings, section if isinstance(section, dict) else {}, f"{where}: {MSD}")
    common = {k: v for k, v in raw.items() if k != MSD}
    output = output_folder(common, where, "all students")
    methods = [common.get("method"), *(stage.get("method") for stage in _stages(common))]
    if "regression" in methods:  # the same pairs for all
        pairs = {"pairs": str(output / PAIRS), "seed": common.get("seed", 0)}
        common["regression"] = {**pairs, **section_of(common, "regression", where)}
    shared, own = _split_shared(_stages(common), where)
    base = make_recipe(common, where) if STAGES in common else make_job(common, where)
    before = None
    if shared:
        part = {STAGES: shared, "output": str(output / SHARED), "evaluation": {"enabled": False}}
        before = make_recipe(merge(common, part), where)
    students: list[Job | Recipe] = []
    for k in range(settings.students):
        student = _of_student(common, k, output)
        if STAGES in common:
            student[STAGES] = [{**stage, "seed": seed_of(stage, k)} if "seed" in stage else stage for stage in own]
            students.append(make_recipe(student, where, before.stages if before else None))
        else:
            students.append(make_job(student, where))
    return MultiStudent(raw, settings, output, base, before, students)


def _stages(common: dict[str, Any]) -> list[dict[str, Any]]:
    listed = common.get(STAGES)
    return [stage for stage in listed if isinstance(stage, dict)] if isinstance(listed, list) else []


def _split_shared(listed: list[dict[str, Any]], where: str) -> tuple[list, list]:
    """The shared stages and the others."""
    shared = [stage for stage in listed if stage.get("shared")]
    if listed[: len(shared)] != shared:
        raise UserError(f"{where}: stages: those with shared = true come before the students' own")
    if listed and len(shared) == len(listed):
        raise UserError(f"{where}: stages: all are shared; at least the last one must be each student's own")
    return shared, listed[len(shared) :]


def seed_of(raw: dict[str, Any], k: int) -> Any:
    """Student k's seed in a raw config or stage; what is no integer stays, and is refused with its key later.

    Raises:
        UserError: it is above the seeds that there are.
    """
    seed = raw.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or seed > LARGEST:
        return seed
    if seed + SEED_STEP * k > LARGEST:
        raise UserError(
            f"seed = {seed}: student {k}'s would be {seed + SEED_STEP * k:,}, above {LARGEST:,}; take a lower seed"
        )
    return seed + SEED_STEP * k


def _of_student(common: dict[str, Any], k: int, output: Path) -> dict[str, Any]:
    """The raw config of student k's run or recipe."""
    changed = {
        "output": str(output / f"student-{k}"),
        "seed": seed_of(common, k),
        "data": {"part": {"router": str(output / FILE), "student": k}},
        "evaluation": {"enabled": False},
    }
    return merge(common, changed)
