"""The runs of a comparison: single runs, stages, several students, and tunings of another run's student.

All get the same number of network passes.  A single run ends when they are spent; several students share them; stages
are planned, and their plan must come to them; what tunes another's student spends passes on top, and the table says so.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field

from stepdistill import checkpoint, files
from stepdistill.config import Section, UserPath
from stepdistill.errors import UserError, reading
from stepdistill.plain_files import read_json
from stepdistill.run import RunFolder, check_run_folder, fixed_part
from stepdistill.settings import Steps
from stepdistill.trainers.loop.snapshot import passes_of

from .job import Job
from .plan import Plan

COST = "cost.json"
PROMPTS = ("prompts", "prompt_column", "prompt_dataset", "prompts_from_images")


class ComparedRunSettings(Section):
    """What a comparison's config says of one run."""

    config: UserPath = Field(
        description="a run's, stages' or several students' config, relative to the comparison's file"
    )
    overrides: list[str] = Field([], description="key=value for it alone")
    tunes: str | None = Field(None, description="another run, whose student this one starts from; its passes are extra")
    steps: list[Steps] = Field(
        [], description="numbers of steps to measure the student at; that of its folder by default"
    )


@dataclass(frozen=True)
class ComparedRun:
    """A checked plan at one training seed.

    Attributes:
        title: the name in the comparison's config; ``name`` has the seed too, where there are several.
        seed: None: that of the run's config.
        tuned: the run whose student this one tunes.
    """

    name: str
    title: str
    seed: int | None
    settings: ComparedRunSettings
    plan: Plan
    tuned: ComparedRun | None = None

    @property
    def job(self) -> Job:
        return self.plan.job

    @property
    def folder(self) -> RunFolder:
        return self.plan.folder

    @property
    def steps(self) -> list[int | None]:
        """The numbers of steps that its student is measured at; None: that of its folder."""
        return [*self.settings.steps] or [None]

    @property
    def finished(self) -> bool:
        return self.plan.finished

    @property
    def measurable(self) -> bool:
        """Whether its distance over training is measured: single runs from the common teacher."""
        return self.plan.measurable and self.tuned is None

    def check_finished(self) -> None:
        """Refuse a finished run that is not what the config describes, at its budget.

        Raises:
            UserError: it was made by another config, or with another number of passes or updates.
        """
        self.plan.check_folder(resume=True)
        for job in self.plan.jobs:
            check_run_folder(Path(job.config.output), job.config.model_dump(mode="json"), True, set(), _with_budget)

    def common_settings(self) -> dict[str, Any]:
        """What all runs of a comparison must have in common; the seed, where the comparison does not set it."""
        config = self.job.config
        keys = ("extractor", "reference", "seed", "batch_size", "teacher_guidance_scale")
        data = {f"data.{key}": getattr(config.data, key) for key in ("labels", *PROMPTS)}
        if config.data.prompts_from_images:
            data["data.images"] = config.data.images
        return {
            "teacher": config.teacher,
            "seed": config.seed if self.seed is None else None,
            **data,
            **{f"evaluation.{key}": getattr(config.evaluation, key) for key in keys},
        }


def _with_budget(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a finished run's config that must be that of its comparison: its end too."""
    train = config.get("train") or {}
    budget = "updates" if train.get("max_passes") is None else "max_passes"  # whose updates are enough
    compared = fixed_part(config)
    return {**compared, "train": {**compared.get("train", {}), budget: train.get(budget)}}


def check_common(runs: dict[str, ComparedRun]) -> None:
    """Refuse runs that cannot be compared with the first one.

    Raises:
        UserError: it names the run and the key.
    """
    first_name, first = next(iter(runs.items()))
    expected = first.common_settings()
    for name, run in runs.items():
        settings = run.common_settings()
        for key, value in settings.items():
            tunes_a_student = key == "teacher" and run.tuned is not None
            if value != expected[key] and not tunes_a_student:
                raise UserError(f"runs.{name}: its {key} is not that of {first_name}; give both the same")
        if settings["evaluation.extractor"] is None:
            raise UserError(f"runs.{name}: set evaluation.extractor and evaluation.reference; the distance needs them")


# -- what it cost --------------------------------------------------------------------------------------------


def write_cost(plan: Plan, peak_gib: float | None) -> None:
    """``cost.json`` in the folder of a finished plan: passes, minutes and trained parameters of all its runs.

    Args:
        peak_gib: the peak memory; None: unknown.

    Raises:
        UserError: a checkpoint is damaged, or the file cannot be written.
    """
    passes, seconds, parameters = 0, 0.0, 0
    for job in plan.jobs:
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
        "students": plan.num_students,
        "peak_gib": peak_gib,
    }
    files.write_json(plan.folder.path / COST, cost)


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


def read_cost(folder: RunFolder) -> dict[str, Any]:
    """What :func:`write_cost` wrote; {} where it did not, or it cannot be read."""
    try:
        cost = read_json(folder.path / COST)
        numbers = [cost[key] for key in ("passes", "minutes", "parameters", "students")]
    except (OSError, ValueError, KeyError):
        return {}
    if cost.get("peak_gib") is not None:
        numbers.append(cost["peak_gib"])
    if not all(type(number) in (int, float) for number in numbers):
        return {}
    return {"peak_gib": None, **cost}
