"""After training: the exported student, its evaluation in a fresh process, the report, the last screen."""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from stepdistill.errors import UserError
from stepdistill.eval.measure.processes import environment_without_launcher
from stepdistill.eval.show.run_page import write_report
from stepdistill.locks import Lock
from stepdistill.pipelines import export_student
from stepdistill.pipelines.msd import is_msd_folder
from stepdistill.run import RunFolder
from stepdistill.settings import DataSettings, RunSettings
from stepdistill.stock.folders import check_replaceable
from stepdistill.trainers.loop.trainer import Trainer

from .build import build_stored, provenance
from .job import Job


def export(job: Job, trainer: Trainer, run: RunFolder) -> None:
    """Write the trained student of a run to its folder."""
    with trainer.exported():
        facts, also = provenance(job, trainer), job.config.sampler.also_steps
        export_student(trainer.family, trainer.roles.student, trainer.sampler, run.student, facts, also_steps=also)


def export_again(job: Job, run: RunFolder, output: Path | None, dtype: torch.dtype, average: bool) -> Path:
    """Write the student of a run's newest checkpoint to ``output``, or to the run's folder by default.

    The run is read only, and may be in training, unless the student goes to its folder.

    Args:
        job: that of the run's ``config.yaml``.
        average: write the averaged weights, if the run has them.

    Raises:
        UserError: no whole checkpoint, a run that another process writes, or a folder that is not written over.
    """
    target = run.student if output is None else output
    inside = target.absolute() == run.student.absolute()
    with Lock(run.path, remedy="or name another folder by --output") if inside else contextlib.nullcontext():
        if inside:
            run.tidy()
        roles = job.config.roles
        inputs = (job.config.teacher.path, roles.student_from, roles.lora_from, roles.lora_under)
        check_replaceable(target, inputs)
        trainer = build_stored(job, run)
        trainer.check_trained()
        with trainer.exported(average):
            facts, also = provenance(job, trainer), job.config.sampler.also_steps
            return export_student(
                trainer.family, trainer.roles.student, trainer.sampler, target, facts, dtype, also, inputs
            )


def evaluate_and_report(config: RunSettings, run: RunFolder) -> None:
    """Evaluate in a fresh process that loads the student as anyone would, then write the report.

    Args:
        config: of the run, or of the last one of several.

    Raises:
        UserError: the evaluation failed; the student is finished.
    """
    if config.evaluation.enabled:
        command = [sys.executable, "-P", "-m", "stepdistill", "evaluate", str(run.path)]
        done = subprocess.run(command, check=False, env=environment_without_launcher())
        if done.returncode:
            again = shlex.join(["stepdistill", "evaluate", str(run.path)])
            raise UserError(f"the evaluation ended with exit code {done.returncode}; try: {again}")
    write_report(run.path)
    print_last_screen(config, run)


def print_last_screen(config: RunSettings, run: RunFolder) -> None:
    """Where everything is, and what to do next."""
    kind, pipeline = "a stock diffusers folder", "DiffusionPipeline"
    if is_msd_folder(run.student):
        kind, pipeline = "several students, each a stock diffusers folder", "MSDPipeline"
    call = f"{pipeline}.from_pretrained({json.dumps(str(run.student), ensure_ascii=False)})"
    prompt = _example_prompt(config.data)
    option = "" if prompt is None else f" --prompt {shlex.quote(prompt)}"
    grid = f"\n  pictures   {run.path / 'grid.png'}" if (run.path / "grid.png").exists() else ""
    print(f"""
Done.
  student    {run.student}  ({kind}: {call})
  report     {run.path / "report.html"}{grid}
Next:
  stepdistill sample {shlex.quote(str(run.student))} --count 40{option}         more pictures
  stepdistill distill CONFIG method=... output=...   the same with another method (stepdistill methods)
  stepdistill distill CONFIG teacher.path=... output=...   your own teacher""")


def _example_prompt(data: DataSettings) -> str | None:
    """A prompt for the student of a run; None: it takes none."""
    if data.shown:
        return data.shown[0]
    takes_prompts = data.prompts or data.prompt_dataset or data.prompts_from_images
    return "PROMPT" if takes_prompts else None
