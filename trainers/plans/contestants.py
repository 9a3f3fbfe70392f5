"""What takes part in a comparison: runs, recipes of stages, several students, and tunings of another's student.

All get the same number of network passes.  A single run ends when they are spent; several students share them; a
recipe's stages are planned, and their plan must come to them; what tunes another's student spends its own on top, and
the table says so.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from stepdistill import checkpoint, files
from stepdistill.config import Section, UserPath, apply_overrides, read_yaml
from stepdistill.errors import UserError, reading
from stepdistill.readers import read_json
from stepdistill.run import RunFolder, comparable, holds_run
from stepdistill.settings import Steps
from stepdistill.stock.folders import is_whole
from stepdistill.trainers.loop.trainer import passes_of

from .job import Job, make_job
from .stages import Recipe, is_recipe, make_recipe
from .students import MSD, MultiStudent, is_multi_student, jobs_of, make_multi_student

COST = "cost.json"
PROMPTS = ("prompts", "prompt_column", "prompt_dataset", "prompts_from_images")
SLACK = 0.03
"""How far a recipe's planned passes may be from the budget."""


class RunEntry(Section):
    """One line of a comparison."""

    config: UserPath = Field(
        description="a run's, recipe's or several students' config, relative to the comparison's file"
    )
    overrides: list[str] = Field([], description="key=value for it alone")
    tunes: str | None = Field(None, description="another run, whose student this one starts from; its passes are extra")
    steps: list[Steps] = Field([], description="numbers of steps that the student is measured at; its own by default")


@dataclass(frozen=True)
class Contestant:
    """A checked entry at one training seed.

    Attributes:
        title: the entry's name; ``name`` has the seed too, where there are several; None: the config's own seed.
        base: of a tuning, the contestant whose student it starts from.
    """

    name: str
    title: str
    seed: int | None
    entry: RunEntry
    work: Job | Recipe | MultiStudent
    base: Contestant | None = None

    @property
    def jobs(self) -> list[Job]:
        """Every run that it is made of."""
        if not isinstance(self.work, MultiStudent):
            return jobs_of(self.work)
        shared = [] if self.work.shared is None else jobs_of(self.work.shared)
        return [*shared, *self.work.jobs]

    @property
    def job(self) -> Job:
        """The one whose teacher, seed and evaluation are the whole's."""
        return self.work.job if isinstance(self.work, MultiStudent) else self.jobs[-1]

    @property
    def run(self) -> RunFolder:
        return RunFolder(self.work.config.output) if isinstance(self.work, Job) else self.work.run

    @property
    def finished(self) -> bool:
        return is_whole(self.run.student)

    def check_finished(self) -> None:
        """That what is finished is what the config says, at its budget.

        Raises:
            UserError: it was made by another config, or in another number of passes or updates.
        """
        if not isinstance(self.work, Job):
            self.work.check_folder(resume=True)
        for job in self.jobs:
            holds_run(Path(job.config.output), job.config.model_dump(mode="json"), True, set(), _with_budget)

    @property
    def measured(self) -> bool:
        """Whether its distance over training is measured: single runs from the common teacher."""
        return isinstance(self.work, Job) and self.base is None


def _with_budget(config: dict[str, Any]) -> dict[str, Any]:
    """What of a finished run's config must be that of its comparison: its end too."""
    train = config.get("train") or {}
    budget = "updates" if train.get("max_passes") is None else "max_passes"  # whose updates are enough
    kept = comparable(config)
    return {**kept, "train": {**kept.get("train", {}), budget: train.get(budget)}}


def read_entries(
    runs: dict[str, str | RunEntry], seeds: list[int], overrides: list[str], passes: int, output: Path, folder: Path
) -> dict[str, Contestant]:
    """The checked contestants by name, in the order that they can be made.

    Raises:
        UserError: a config that is wrong, a plan that is not the budget, or one that is not comparable with the first.
    """
    found: dict[str, Contestant] = {}
    entries = {title: RunEntry(config=given) if isinstance(given, str) else given for title, given in runs.items()}
    for title, entry in sorted(entries.items(), key=lambda item: item[1].tunes is not None):
        for seed in seeds or [None]:
            name = title if len(seeds) < 2 else f"{title}, seed {seed}"
            base = None
            if entry.tunes is not None:
                base = found.get(entry.tunes if len(seeds) < 2 else f"{entry.tunes}, seed {seed}")
                if base is None:
                    raise UserError(f"runs.{title}: tunes = {entry.tunes}: no run that tunes none has that name")
            found[name] = _read(name, title, seed, entry, overrides, passes, output / name, folder, base)
    _check_comparable(found)
    return found


def _read(name, title, seed, entry: RunEntry, overrides, passes: int, output: Path, folder: Path, base) -> Contestant:
    path = folder / entry.config
    own = [*overrides, *entry.overrides, f"output={_as_yaml(output)}"]
    own += [] if seed is None else [f"seed={seed}"]
    if base is not None:  # a student's folder says for itself what its teacher's config had to say
        own += [f"teacher.path={_as_yaml(base.run.student)}"]
        own += [f"teacher.{key}=null" for key in ("revision", "variant", "null_label")]
    raw = apply_overrides(read_yaml(path), own)
    recipe = is_recipe(raw)
    if base is None and not recipe:
        students = (raw.get(MSD) or {}).get("students", 1) if is_multi_student(raw) else 1
        raw = apply_overrides(raw, [f"train.max_passes={passes // students}"])
    if is_multi_student(raw):
        work = make_multi_student(apply_overrides(raw, ["evaluation.enabled=false"]), str(path))
    else:
        work = make_recipe(raw, str(path)) if recipe else make_job(raw, str(path))
    made = Contestant(name, title, seed, entry, work, base)
    if recipe and base is None:
        planned = sum(job.method.planned_passes(job.config) for job in made.jobs)
        if abs(planned / passes - 1) > SLACK:
            raise UserError(
                f"runs.{title}: its stages plan {planned:,} network passes, the budget is {passes:,}; change their "
                "train.updates"
            )
    return made


def _as_yaml(path: Path) -> str:
    """A path as a value of an override, whatever characters are in it."""
    return json.dumps(str(path), ensure_ascii=False)


def _check_comparable(found: dict[str, Contestant]) -> None:
    first_name, first = next(iter(found.items()))
    for name, made in found.items():
        own, theirs = _shared(made), _shared(first)
        for key, value in own.items():
            if value != theirs[key] and not (key == "teacher" and made.base is not None):
                raise UserError(f"runs.{name}: its {key} is not that of {first_name}; give both the same")
        if own["evaluation.extractor"] is None:
            raise UserError(f"runs.{name}: set evaluation.extractor and evaluation.reference; the distance needs them")


def _shared(made: Contestant) -> dict[str, Any]:
    """What all must have in common; the seed, where the comparison does not set it."""
    config = made.job.config
    keys = ("extractor", "reference", "seed", "batch_size", "teacher_guidance_scale")
    seed = None if made.seed is not None else config.seed
    asked = {f"data.{k}": getattr(config.data, k) for k in ("labels", *PROMPTS)}
    if config.data.prompts_from_images:
        asked["data.images"] = config.data.images
    return {
        "teacher": config.teacher,
        "seed": seed,
        **asked,
        **{f"evaluation.{k}": getattr(config.evaluation, k) for k in keys},
    }


# -- what it cost --------------------------------------------------------------------------------------------


def write_cost(made: Contestant, peak: float | None) -> dict[str, Any]:
    """``cost.json``: passes, seconds and trained parameters of all its runs, and the peak memory in GiB; None: unknown.

    Raises:
        UserError: a checkpoint is damaged, or the file cannot be written.
    """
    passes, seconds, parameters = 0, 0.0, 0
    for job in made.jobs:
        last = checkpoint.latest(RunFolder(job.config.output).checkpoints)
        if last is None:
            raise UserError(f"{job.config.output}: no whole checkpoint of the run that is finished; make it again")
        tensors, meta = checkpoint.load(last)
        with reading(f"checkpoint {last}", "make the run again", "is damaged"):
            passes += passes_of(meta)
            seconds += meta["seconds"]
            parameters = sum(tensor.numel() for tensor in tensors["student"].values())
    cost = {
        "passes": passes,
        "minutes": seconds / 60,
        "parameters": parameters,
        "students": made.work.settings.students if isinstance(made.work, MultiStudent) else 1,
        "peak_gib": peak,
    }
    files.write_json(made.run.path / COST, cost)
    return cost


def peak_memory() -> float | None:
    """GiB that this process has held at most: of the GPU where there is one, else of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    try:  # Linux; what getrusage says there is at least the peak of the process that started this one
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(status.partition("VmHWM:")[2].split()[0]) / 2**20
    except (OSError, IndexError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 2**30


def read_cost(made: Contestant) -> dict[str, Any]:
    """What :func:`write_cost` wrote; {} where it did not, or it cannot be read."""
    try:
        found = read_json(made.run.path / COST)
        numbers = [found[key] for key in ("passes", "minutes", "parameters", "students")]
    except (OSError, ValueError, KeyError):
        return {}
    numbers += [] if found.get("peak_gib") is None else [found["peak_gib"]]
    return {"peak_gib": None, **found} if all(type(number) in (int, float) for number in numbers) else {}
