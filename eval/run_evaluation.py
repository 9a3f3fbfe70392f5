"""Evaluating a finished run: its teacher at several step counts, its student, a table and a grid on equal noise."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import torch

from stepdistill import assets
from stepdistill.config import check, read_mapping
from stepdistill.data.sources import load_prompts
from stepdistill.errors import UserError, reading, shown
from stepdistill.eval.measure.evaluate import evaluate
from stepdistill.eval.measure.processes import Processes
from stepdistill.eval.measure.settings import Protocol
from stepdistill.eval.measure.targets import Target
from stepdistill.eval.show.grid import draw_grid
from stepdistill.eval.show.tables import results_table, text_table
from stepdistill.families import claiming_family
from stepdistill.pipelines.msd import is_msd_folder
from stepdistill.readers import read_json
from stepdistill.settings import DataSettings, JudgeSettings, SamplerSettings, TeacherSettings
from stepdistill.stock.folders import hub_folder, is_whole
from stepdistill.stock.loading import read_index

SECTIONS = {
    "teacher": TeacherSettings,
    "data": DataSettings,
    "sampler": SamplerSettings,
    "evaluation": JudgeSettings,
}
"""The sections of a run's config that its evaluation reads."""


def read_run(run: Path) -> dict[str, Any]:
    """A run's config, the sections that an evaluation reads checked and with their defaults.

    Raises:
        UserError: not a run folder, or a config that is none of a run.
    """
    file = run / "config.yaml"
    try:
        raw = read_mapping(file)
    except FileNotFoundError:
        raise UserError(f"{run}: not a run folder (no config.yaml in it)") from None
    checked = {name: check(model, raw.get(name, {}), f"{file}: {name}") for name, model in SECTIONS.items()}
    with reading(file, "take it from the run's config again", "damaged; it is not a run's config"):
        method, stages = raw["method"], [{"name": stage["name"]} for stage in raw.get("stages") or []]
        own = raw.get(method) or {}
        section = raw.get(own.get("base")) or own
        if not all(isinstance(part, dict) for part in (own, section, raw.get("dmd2") or {})):
            raise ValueError(f"the section of method {shown(method)} is no mapping")
    named = {"stages": stages} if stages else {}
    return {**raw, **{name: part.model_dump(mode="json") for name, part in checked.items()}, **named}


def run_targets(run: Path, config: dict[str, Any]) -> list[Target]:
    """The teacher at its full steps, the teacher at fewer, and the student.

    A guided teacher is evaluated with ``evaluation.teacher_guidance_scale``, by default that of its distillation.
    """
    own, teacher = config["evaluation"], config["teacher"]
    path, variant = hub_folder(assets.resolve(teacher["path"]), teacher.get("revision")), teacher.get("variant")
    scale = teacher_scale(config)
    also = sorted(config["sampler"].get("also_steps") or [], reverse=True)
    students = [Target("student", run / "student", n) for n in [None, *also]]
    null = teacher.get("null_label")
    if config["method"] == "pso":  # its teacher is a few-step model already, the one that was tuned
        counts = [config["sampler"]["steps"], *also]
        return [*(Target("untuned", path, n, None, null, variant) for n in counts), *students]
    fewer = sorted(set(own["teacher_steps"]) - {teacher["steps"]}, reverse=True)
    teachers = [Target("teacher", path, n, scale, null, variant) for n in [teacher["steps"], *fewer]]
    stages = config.get("stages") if own.get("stages") and "msd" not in config else None  # those are each student's
    for number, stage in enumerate(stages or [], 1):
        name = stage["name"]
        students.append(Target(f"stage {name}", run / f"{number:02d}-{name}" / "student"))
    return [*teachers, *students]


def teacher_scale(config: dict[str, Any]) -> float:
    """``evaluation.teacher_guidance_scale``, by default that of the distillation."""
    scale = config["evaluation"]["teacher_guidance_scale"]
    return own_scale(config) if scale is None else scale


def own_scale(config: dict[str, Any]) -> float:
    """The guidance scale that the student was distilled with; 1 where there is none.

    A method on another (``base``) is asked for that one's.  Where teacher and fake score share a scale the student's
    fixed point is the unguided teacher, whatever the scale.
    """
    section = config.get(config["method"]) or {}
    section = config.get(section.get("base")) or section
    if "guidance_scale" not in section:  # a method that reads another's section
        section = config.get("dmd2") or section
    if section.get("fake_score_guidance") == "shared":
        return 1.0
    scale = section.get("guidance_scale") or 1.0
    if isinstance(scale, bool) or not isinstance(scale, int | float):
        raise UserError(f"{config['method']}.guidance_scale = {shown(scale)}: a number is needed")
    return float(scale)


def protocol(config: dict[str, Any], samples: int, latency: bool = False) -> Protocol:
    """How a run's config wants pipelines measured, with ``samples`` of each."""
    own, labels = config["evaluation"], config["data"]["labels"]
    asked = {
        "samples": samples,
        "batch_size": own["batch_size"],
        "seed": own["seed"],
        "extractor": own["extractor"],
        "reference": own["reference"],
        "labels": "uniform" if labels == "all" else labels,
        "prompts": config["data"].get("prompts"),
        "prompt_column": config["data"].get("prompt_column"),
        "prompt_dataset": config["data"].get("prompt_dataset"),
        "prompt_images": config["data"]["images"] if config["data"].get("prompts_from_images") else None,
        "rewards": (config["pso"].get("rewards") or []) if config["method"] == "pso" else [],
        "latency": latency,
    }
    return check(Protocol, asked, "evaluation")


def evaluate_run(
    run: Path, device: torch.device | str, samples: int | None = None, processes: Processes | None = None
) -> str:
    """Measure a run's teacher and student, write ``evaluation.json`` and ``grid.png``; returns the table as text.

    With several ``processes`` each draws its share, and the first one measures, writes and returns text.

    Raises:
        UserError: not a run folder, no student in it yet, or an evaluation setting that does not fit.
    """
    config = read_run(run)
    own = config["evaluation"]
    if not is_whole(run / "student"):
        again = shlex.join(["stepdistill", "export", str(run)])
        raise UserError(f"{run}: there is no whole student in it; finish the run, or: {again}")
    targets = run_targets(run, config)
    lines = []
    if own["extractor"] is not None:
        settings = protocol(config, samples or own["samples"], own["latency"])
        rows = evaluate(targets, settings, run, device, processes)
        if processes is None or processes.main:
            lines = [measured_text(run / "evaluation.json", rows)]
    else:
        lines = ["no distance was measured: evaluation.extractor and evaluation.reference are not set"]
    if processes is not None and not processes.main:
        return ""
    shown = [t for t in targets if t.name in ("student", "untuned") or t.steps in (targets[0].steps, 1)]
    draw_grid(
        shown,
        run / "grid.png",
        seed=own["seed"],
        device=device,
        prompts=shown_prompts(config["data"]),
        label_names=label_names(run / "student"),
        labels="uniform" if config["data"]["labels"] == "all" else config["data"]["labels"],
    )
    return "\n".join(lines)


def shown_prompts(data: dict[str, Any]) -> list[str] | None:
    """The prompts of a run's pictures, by the ``data`` of its config: as said there, or its first ones; None: none."""
    if data.get("shown"):
        return data["shown"]
    prompts = load_prompts(check(DataSettings, data, "data"))
    return prompts and prompts[:10]


def measured_text(file: Path, rows: list[dict[str, Any]]) -> str:
    """The table of an evaluation's rows, and the protocol's line and notes from its file."""
    protocol = read_json(file)["protocol"]
    notes = "".join(f"\nnote: {note}" for note in protocol["notes"])
    return f"{text_table(results_table(rows, protocol['metric']))}\n{protocol['line']}{notes}"


def label_names(pipeline: Path) -> list[str] | None:
    """The names of a folder's labels, where its network's config says them."""
    if is_msd_folder(pipeline):
        pipeline = pipeline / "student-0"
    try:
        family = claiming_family(read_index(pipeline, f"pipeline {pipeline}"))
        if family is None:
            return None
        names = read_json(pipeline / family.component / "config.json")["_stepdistill"]["label_names"]
    except (UserError, OSError, ValueError, KeyError, TypeError):
        return None
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else None
