"""From a raw list of stages to checked ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stepdistill.config import check, merge, section_of
from stepdistill.errors import UserError
from stepdistill.run import CACHE
from stepdistill.trainers.methods.base import Method
from stepdistill.trainers.methods.registry import METHODS

from .job import make_job
from .stages import Stage, StageSettings

STAGE_KEYS = ("name", "take", "of", "shared")
TAKEN_ROLES = ("student_from", "lora_from", "lora_under", "fake_score_from")


def read_stages(
    listed: Any, common: dict[str, Any], output: Path, where: str, before: Sequence[Stage] = ()
) -> list[Stage]:
    """The checked stages of a list of raw ones.

    Args:
        common: the rest of the config, which all stages share.
        before: stages of another list that may be taken from.

    Raises:
        UserError: one line that names the stage and the key.
    """
    if not isinstance(listed, list) or not listed or not all(isinstance(raw, dict) for raw in listed):
        raise UserError(f"{where}: stages must be a list of stages, each a mapping with a name and a method")
    stages: list[Stage] = []
    for number, raw in enumerate(listed, 1):
        label = f"{where}: stages[{number}]"
        settings = check(StageSettings, {key: raw[key] for key in STAGE_KEYS if key in raw}, label)
        earlier = [*before, *stages]
        if any(stage.name == settings.name for stage in earlier):
            raise UserError(f"{label}: a second stage named {settings.name}; give it another name")
        source = _source(settings, earlier, label)
        config = merge(common, {key: value for key, value in raw.items() if key not in STAGE_KEYS})
        config["output"] = str(output / f"{number:02d}-{settings.name}")
        config["evaluation"] = section_of(common, "evaluation", where) | section_of(raw, "evaluation", label)
        if source is not None:
            roles = section_of(config, "roles", label)
            config["roles"] = _roles_from(source, settings, roles, config.get("method"), label)
        job = replace(make_job(config, f"{label} ({settings.name})"), cache=output / CACHE, unused=())
        stages.append(Stage.of(job, settings=settings, source=source))
    return stages


def _source(settings: StageSettings, earlier: list[Stage], label: str) -> Stage | None:
    """The earlier stage that a stage takes from."""
    if settings.take == "nothing":
        if settings.of is not None:
            raise UserError(f"{label}: take = nothing with of = {settings.of}; remove one")
        return None
    if settings.of is not None:
        for stage in earlier:
            if stage.name == settings.of:
                return stage
        raise UserError(f"{label}: of = {settings.of}: no earlier stage has that name")
    if not earlier and "take" in settings.model_fields_set:
        raise UserError(f"{label}: take = {settings.take}: there is no stage before the first; remove it")
    return earlier[-1] if earlier else None


def _roles_from(source: Stage, settings: StageSettings, roles: dict, method: Any, label: str) -> dict[str, Any]:
    """The raw ``roles`` of a stage that starts from the student of ``source``."""
    student = str(source.folder.student)
    weights = roles.get("weights") or _default_weights(method)
    for key in TAKEN_ROLES:
        if key in roles:
            raise UserError(f"{label}: roles.{key} is what take = {settings.take} sets; remove one of them")
    if settings.take == "both":
        for name, stage_method in (("this stage", _method(method)), (source.name, source.job.method)):
            if stage_method is not None and not stage_method.has_fake_score:
                raise UserError(f"{label}: take = both: {name}'s method has no fake score; use take = student")
        roles = {**roles, "fake_score_from": str(source.output)}
    if settings.take == "under" and weights != "shared":
        raise UserError(f"{label}: take = under needs a LoRA on top; set roles.weights=shared")
    if source.job.config.roles.weights == "shared" and weights == "shared":
        return {**roles, "lora_under" if settings.take == "under" else "lora_from": student}
    return {**roles, "student_from": student}


def _method(name: Any) -> type[Method] | None:
    return METHODS.get(name) if isinstance(name, str) else None


def _default_weights(name: Any) -> str:
    method = _method(name)
    return "full" if method is None else method.defaults.get("roles", {}).get("weights", "full")
