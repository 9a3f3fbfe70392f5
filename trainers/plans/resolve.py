"""From a raw config to its plan: the one place that looks which kind of plan a config describes.

``runs`` makes it a comparison, ``msd`` several students, ``stages`` runs in turn; else it is one run.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stepdistill.config import apply_overrides, check, merge, output_folder, read_config, section_of
from stepdistill.data.partition import PartitionSettings
from stepdistill.errors import UserError
from stepdistill.run import PAIRS, RunFolder

from .compared import ComparedRun, ComparedRunSettings, check_common
from .comparison import Comparison
from .comparison_settings import ComparisonSettings
from .job import Job, make_job
from .plan import Plan
from .single import Run
from .stage_configs import read_stages
from .stages import STAGES, Stage, Stages
from .student_configs import raw_student, seed_of, split_shared
from .students import MSD, SHARED, Students

RUNS = "runs"
SLACK = 0.03
"""How far the planned passes of compared stages may be from the budget."""


def read_plan(path: str | Path, overrides: list[str] | None = None) -> Plan:
    """Read, merge, override and check a config file.  Nothing is loaded.

    Raises:
        UserError: one line that names the file, the key and what is allowed.
    """
    return resolve(read_config(path, overrides), str(path), (str(path), *(overrides or [])))


def read_job(path: str | Path, overrides: list[str] | None = None) -> Job:
    """:func:`read_plan` of a config of one run.

    Raises:
        UserError: anything wrong with it, or it is a comparison, stages or several students.
    """
    raw = read_config(path, overrides)
    if RUNS in raw:
        raise UserError(f"{path}: a comparison of runs; name the config, or the run folder, of one run")
    if MSD in raw:
        raise UserError(f"{path}: several students (msd); name the config, or the run folder, of one student")
    if STAGES in raw:
        raise UserError(f"{path}: a recipe of stages; name the config, or the run folder, of one stage")
    return make_job(raw, str(path))


def read_run(folder: Path) -> tuple[Job, RunFolder]:
    """The job and the folder of a run that was begun.

    Raises:
        UserError: the folder is not a run's, or its config is damaged.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder}: not a run folder (no config.yaml in it)")
    return read_job(folder / "config.yaml"), RunFolder(folder)


def read_comparison(path: str | Path, overrides: list[str] | None = None) -> Comparison:
    """:func:`read_plan` of a config of several runs.

    Raises:
        UserError: anything wrong with it.
    """
    return resolve_comparison(read_config(path, overrides), str(path), (str(path), *(overrides or [])))


def resolve(raw: dict[str, Any], where: str = "config", command: tuple[str, ...] = ()) -> Plan:
    """The checked plan of a raw config.  Nothing is loaded.

    Args:
        where: the config's file, for errors and for the files that it names.
        command: config and overrides as typed, for the commands that a plan prints or starts.

    Raises:
        UserError: one line that names the key and what is allowed.
    """
    if RUNS in raw:
        return resolve_comparison(raw, where, command)
    if MSD in raw:
        return _resolve_students(raw, where, command)
    return _resolve_student(raw, where)


def _resolve_student(raw: dict[str, Any], where: str, before: Sequence[Stage] = ()) -> Plan:
    """One run or stages; ``before``: stages of another plan that these take from."""
    if STAGES in raw:
        return _resolve_stages(raw, where, before)
    return Run.of(make_job(raw, where))


def _resolve_stages(raw: dict[str, Any], where: str, before: Sequence[Stage] = ()) -> Stages:
    output = output_folder(raw, where, "the recipe")
    common = {key: value for key, value in raw.items() if key != STAGES}
    stages = read_stages(raw[STAGES], common, output, where, before)
    return Stages(output, stages[-1].job, raw, stages)


# -- several students ----------------------------------------------------------------------------------------


def _resolve_students(raw: dict[str, Any], where: str, command: tuple[str, ...]) -> Students:
    section = raw[MSD]
    settings = check(PartitionSettings, section if isinstance(section, dict) else {}, f"{where}: {MSD}")
    common = {key: value for key, value in raw.items() if key != MSD}
    output = output_folder(common, where, "all students")
    listed = common.get(STAGES)
    stages = [stage for stage in listed if isinstance(stage, dict)] if isinstance(listed, list) else []
    if "regression" in [common.get("method"), *(stage.get("method") for stage in stages)]:  # the same pairs for all
        pairs = {"pairs": str(output / PAIRS), "seed": common.get("seed", 0)}
        common["regression"] = {**pairs, **section_of(common, "regression", where)}
    shared_stages, student_stages = split_shared(stages, where)
    undivided = _resolve_student(common, where)
    shared = None
    if shared_stages:
        changes = {STAGES: shared_stages, "output": str(output / SHARED), "evaluation": {"enabled": False}}
        shared = _resolve_stages(merge(common, changes), where)
    students = []
    for number in range(settings.students):
        student = raw_student(common, number, output)
        if STAGES in common:
            student[STAGES] = [
                {**stage, "seed": seed_of(stage, number)} if "seed" in stage else stage for stage in student_stages
            ]
        students.append(_resolve_student(student, where, shared.stages if shared else ()))
    return Students(output, undivided.job, raw, settings, undivided, shared, students, command)


# -- comparisons ---------------------------------------------------------------------------------------------


def resolve_comparison(raw: dict[str, Any], where: str = "config", command: tuple[str, ...] = ()) -> Comparison:
    """The checked plan of a raw config of several runs.

    Raises:
        UserError: a config that is wrong, a plan that is not the budget, or one that is not comparable with the first.
    """
    settings = check(ComparisonSettings, raw, where)
    runs: dict[str, ComparedRun] = {}
    sections = {
        title: ComparedRunSettings(config=run) if isinstance(run, str) else run for title, run in settings.runs.items()
    }
    for title, section in sorted(sections.items(), key=lambda item: item[1].tunes is not None):
        seeds: list[int | None] = [*settings.seeds] or [None]
        for seed in seeds:
            tuned = None
            if section.tunes is not None:
                tuned = runs.get(_name(section.tunes, seed, settings))
                if tuned is None:
                    raise UserError(f"runs.{title}: tunes = {section.tunes}: no run that tunes none has that name")
            name = _name(title, seed, settings)
            plan = _resolve_compared(name, title, seed, section, settings, Path(where).parent, tuned)
            runs[name] = ComparedRun(name, title, seed, section, plan, tuned)
    check_common(runs)
    first = next(run for run in runs.values() if run.tuned is None)
    return Comparison(Path(settings.output), first.job, settings, runs, command)


def _name(title: str, seed: int | None, settings: ComparisonSettings) -> str:
    return title if len(settings.seeds) < 2 else f"{title}, seed {seed}"


def _resolve_compared(
    name: str,
    title: str,
    seed: int | None,
    section: ComparedRunSettings,
    settings: ComparisonSettings,
    folder: Path,
    tuned: ComparedRun | None,
) -> Plan:
    """The plan of one run of a comparison, with the comparison's folder, seed and budget."""
    path = folder / section.config
    overrides = [*settings.overrides, *section.overrides, f"output={_as_yaml(Path(settings.output) / name)}"]
    if seed is not None:
        overrides.append(f"seed={seed}")
    if tuned is not None:  # the folder of a student says itself what the config of its teacher had to say
        overrides.append(f"teacher.path={_as_yaml(tuned.folder.student)}")
        overrides += [f"teacher.{key}=null" for key in ("revision", "variant", "null_label")]
    raw = read_config(path, overrides)
    if RUNS in raw:
        raise UserError(f"runs.{title}: {path} is a comparison itself; name a run's config")
    if MSD in raw:
        raw = apply_overrides(raw, ["evaluation.enabled=false"])
    has_budget = tuned is None and STAGES not in raw
    if has_budget:
        raw = apply_overrides(raw, [f"train.max_passes={settings.passes // _number_of_students(raw)}"])
    plan = resolve(raw, str(path))
    if tuned is None and not has_budget and abs(plan.cost / settings.passes - 1) > SLACK:
        raise UserError(
            f"runs.{title}: its stages plan {plan.cost:,} network passes, the budget is {settings.passes:,}; change "
            "their train.updates"
        )
    return plan


def _number_of_students(raw: dict[str, Any]) -> int:
    """1 where there are not several; what is no number is refused later, with its key."""
    section = raw.get(MSD)
    students = section.get("students") if isinstance(section, dict) else None
    return students if isinstance(students, int) and students > 0 else 1


def _as_yaml(path: Path) -> str:
    """A path as a value of an override, whatever characters are in it."""
    return json.dumps(str(path), ensure_ascii=False)
