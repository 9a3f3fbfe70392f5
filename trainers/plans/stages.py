"""Recipes: a distillation in stages, each a run of its own that takes the student of the one before.

A recipe's file is a run's config with a list of ``stages``.  A stage's own keys are merged over the rest of the file;
``name`` names its folder, ``take`` says what it takes and ``of`` from which earlier stage (the last one by default):

    nothing   the teacher's weights, as any run
    student   the last student: its LoRA is gone on with, or its weights are
    both      the same, and the fake score of its run's newest checkpoint
    under     a new LoRA on top of the last student, which stays frozen below

Every stage's folder is a run folder (``distill --resume`` goes on with the one that was stopped; finished ones, those
with an exported student, are passed over).  The last student is the recipe's, and is evaluated with the teacher.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from stepdistill import files
from stepdistill.config import Section, check, merge, output_folder, section_of
from stepdistill.errors import UserError
from stepdistill.run import CACHE, RunFolder, comparable, holds_run
from stepdistill.stock.folders import check_replaceable, is_whole
from stepdistill.trainers.loop.trainer import Trainer

from .job import Job, make_job

STAGES = "stages"
OWN = ("name", "take", "of", "shared")


class StageSettings(Section):
    """What a stage says besides a run's own keys."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100, description="its folder is NN-name")
    take: Literal["nothing", "student", "both", "under"] = Field("student", description="from the stage named in of")
    of: str | None = Field(None, description="an earlier stage; the last one by default")
    shared: bool = Field(False, description="of several students (msd): run once, on every condition, before them")


@dataclass(frozen=True)
class Stage:
    """A checked stage: its run, and the earlier one that it takes from."""

    settings: StageSettings
    job: Job
    source: Stage | None

    @property
    def name(self) -> str:
        return self.settings.name

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.job.config.output)

    @property
    def finished(self) -> bool:
        return is_whole(self.run.student)

    @property
    def passes(self) -> int:
        """Network passes on one process, as planned."""
        return self.job.method.planned_passes(self.job.config)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe; ``raw`` is its file, overrides included."""

    raw: dict[str, Any]
    output: Path
    stages: list[Stage]

    @property
    def run(self) -> RunFolder:
        """The recipe's folder, as a run's: config, student, evaluation, report."""
        return RunFolder(self.output)

    @property
    def last(self) -> Stage:
        return self.stages[-1]

    @property
    def config(self) -> dict[str, Any]:
        """What ``config.yaml`` says: the last stage's run under the recipe's folder, and the stages as written."""
        said = self.last.job.config.model_dump(mode="json")
        return {**said, "output": str(self.output), STAGES: self.raw[STAGES]}

    def check_folder(self, resume: bool) -> bool:
        """Whether there is a recipe to go on with; nothing is written.

        Raises:
            UserError: the folder holds something else, another recipe, or one that ``--resume`` was not said for.
        """
        started = any((stage.run.path / "config.yaml").exists() for stage in self.stages)
        own = {CACHE, *(stage.run.path.name for stage in self.stages)}  # pairs made before lie in a stage's
        own = set() if started else own
        if not holds_run(self.output, self.config, resume, own, with_stages, "recipe"):
            return False
        for stage in self.stages:
            if (stage.run.path / "config.yaml").exists():
                stage.run.check(stage.job.config, resume=True)
        return True

    def finish(self) -> None:
        """Copy the last stage's student to the recipe's, whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        check_replaceable(self.run.student)
        with files.replacing_folder(self.run.student) as temporary:
            shutil.copytree(self.last.run.student, temporary, dirs_exist_ok=True)


def with_stages(config: dict[str, Any]) -> dict[str, Any]:
    """A config of stages without what may change on the way."""
    return {**comparable(config), STAGES: [comparable(stage) for stage in config.get(STAGES) or []]}


def is_recipe(raw: dict[str, Any]) -> bool:
    return STAGES in raw


def make_recipe(raw: dict[str, Any], where: str = "config", before: list[Stage] | None = None) -> Recipe:
    """Check a recipe, every stage of it, before anything is loaded; ``before``: stages of another that it goes on from.

    Raises:
        UserError: one line that names the stage and the key.
    """
    listed = raw[STAGES]
    if not isinstance(listed, list) or not listed or not all(isinstance(own, dict) for own in listed):
        raise UserError(f"{where}: stages must be a list of stages, each a mapping with a name and a method")
    output = output_folder(raw, where, "the recipe")
    common = {k: v for k, v in raw.items() if k != STAGES}
    stages: list[Stage] = []
    for number, own in enumerate(listed, 1):
        label = f"{where}: stages[{number}]"
        settings = check(StageSettings, {k: own[k] for k in OWN if k in own}, label)
        earlier = [*(before or []), *stages]
        if any(stage.name == settings.name for stage in earlier):
            raise UserError(f"{label}: a second stage named {settings.name}; give it another name")
        source = _source(settings, earlier, label)
        stage = merge(common, {k: v for k, v in own.items() if k not in OWN})
        stage["output"] = str(output / f"{number:02d}-{settings.name}")
        stage["evaluation"] = section_of(common, "evaluation", where) | section_of(own, "evaluation", label)
        if source is not None:
            stage["roles"] = _taken(settings, section_of(stage, "roles", label), stage.get("method"), source, label)
        job = replace(make_job(stage, f"{label} ({settings.name})"), cache=output / CACHE, unused=())
        stages.append(Stage(settings, job, source))
    return Recipe(raw, output, stages)


def _source(settings: StageSettings, stages: list[Stage], label: str) -> Stage | None:
    if settings.take == "nothing":
        if settings.of is not None:
            raise UserError(f"{label}: take = nothing with of = {settings.of}; remove one")
        return None
    if settings.of is not None:
        found = [stage for stage in stages if stage.name == settings.of]
        if not found:
            raise UserError(f"{label}: of = {settings.of}: no earlier stage has that name")
        return found[0]
    if not stages and "take" in settings.model_fields_set:
        raise UserError(f"{label}: take = {settings.take}: there is no stage before the first; remove it")
    return stages[-1] if stages else None


def _taken(settings: StageSettings, roles: dict, method: Any, source: Stage, label: str) -> dict[str, Any]:
    """The roles section that starts from the source's student."""
    student, is_lora = str(source.run.student), source.job.config.roles.weights == "shared"
    weights = roles.get("weights") or _default_weights(method)
    for key in ("student_from", "lora_from", "lora_under", "fake_score_from"):
        if key in roles:
            raise UserError(f"{label}: roles.{key} is what take = {settings.take} sets; remove one of them")
    if settings.take == "both":
        for name, job_method in (("this stage", _method(method)), (source.name, source.job.method)):
            if job_method is not None and not job_method.has_fake_score:
                raise UserError(f"{label}: take = both: {name}'s method has no fake score; use take = student")
        roles = {**roles, "fake_score_from": str(source.run.path)}
    if settings.take == "under" and weights != "shared":
        raise UserError(f"{label}: take = under needs a LoRA on top; set roles.weights=shared")
    if is_lora and weights == "shared":
        return {**roles, "lora_under" if settings.take == "under" else "lora_from": student}
    return {**roles, "student_from": student}


def _method(name: Any) -> type[Trainer] | None:
    from stepdistill.trainers import METHODS

    return METHODS.get(name) if isinstance(name, str) else None


def _default_weights(method: Any) -> str:
    found = _method(method)
    return "full" if found is None else found.defaults.get("roles", {}).get("weights", "full")


def write_config(output: Path, config: dict[str, Any]) -> None:
    """``config.yaml`` in the folder of a recipe, or of several students.

    Raises:
        UserError: it cannot be written.
    """
    files.write_text(output / "config.yaml", yaml.safe_dump(config, sort_keys=False, allow_unicode=True))
