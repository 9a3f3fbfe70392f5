"""A student as a folder that anyone's diffusers loads: a stock class, a stock scheduler, a model card.

What a call must say (steps, no guidance) stands in the model card and, with the student's provenance, under
``_stepdistill`` in the configs of the scheduler and the network: keys that stock diffusers keeps and ignores.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from stepdistill import __version__, files
from stepdistill.digests import write_record
from stepdistill.families.base import Family
from stepdistill.roles.role import Role
from stepdistill.sampler import FewStepSampler
from stepdistill.stock.folders import check_replaceable, without_places

from .card import model_card
from .saving import save_in_one_dtype


def export_student(
    family: Family,
    role: Role,
    sampler: FewStepSampler,
    path: str | Path,
    provenance: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    also_steps: Sequence[int] = (),
    inputs: Sequence[str | None] = (),
) -> Path:
    """Write the student as a stock pipeline folder at ``path``, replacing what is there only when whole.

    Args:
        role: the student; an adapter is merged into its base, and written beside as a LoRA file.
        provenance: JSON-able facts (method, teacher, updates, ...); ``steps`` and ``call`` are added.
        dtype: of all the folder's weights (:mod:`.saving`); a merged adapter is rounded to it once.
        also_steps: fewer steps that the student is meant for too.
        inputs: folders that the student is made from, which are not written over.

    Raises:
        UserError: the sampler cannot be expressed, or the folder cannot be written.
    """
    facts = {"version": __version__, "steps": sampler.steps, "times": list(sampler.times)}
    facts |= {"call": family.call(sampler), **without_places(provenance)}
    if also_steps:
        facts["also_steps"] = list(also_steps)
    network = family.fresh_network(role.network)
    network.load_state_dict(role.plain_state_dict())
    scheduler = family.student_scheduler(sampler)
    pipeline = family.pipeline(stamped(network.eval(), facts), stamped(scheduler, facts))
    lora = None if role.adapter is None else partial(save_lora, role, family)
    # a router of prompts knows its text encoder by the hash of its weights
    in_float32 = family.calls.encoder_parts if "msd" in provenance else ()
    return write_pipeline(pipeline, path, facts, lora, dtype, in_float32, inputs)


def stamped(part: Any, facts: dict[str, Any]) -> Any:
    """A network or scheduler with ``facts`` under ``_stepdistill`` in its config; a network keeps its labels' names."""
    before = part.config.get("_stepdistill") or {}
    about_labels = {key: before[key] for key in ("null_label", "label_names") if key in before}
    part.register_to_config(_stepdistill={**about_labels, **facts})
    return part


def write_pipeline(
    pipeline: DiffusionPipeline,
    path: str | Path,
    facts: dict[str, Any],
    lora: Callable[[Path], object] | None = None,
    dtype: torch.dtype = torch.float32,
    in_float32: Collection[str] = (),
    inputs: Sequence[str | None] = (),
) -> Path:
    """Save a stock pipeline with its model card at ``path``, replacing what is there only when whole.

    Args:
        facts: what the model card says; must hold ``call``, ``steps`` and ``version``.
        lora: writes a LoRA file into the folder that it is given.
        dtype: of all weights; in_float32: names of parts that are float32 all the same.
        inputs: folders that it is made from, which are not written over.

    Raises:
        UserError: the folder holds something that stepdistill did not export, is one of ``inputs``, or cannot be
            written; weights that are not finite, or not in ``dtype``.
    """
    path = Path(path)
    check_replaceable(path, inputs)
    with files.replacing_folder(path) as temporary:
        save_in_one_dtype(pipeline, temporary, dtype, in_float32)
        (temporary / "README.md").write_text(model_card(path.name, pipeline, facts, dtype), encoding="utf-8")
        if lora is not None:
            lora(temporary / "lora")
        write_record(temporary)
    return path


def save_lora(role: Role, family: Family, folder: Path) -> None:
    """Write the student's adapter, and what is below it, in diffusers' keys, and in kohya's where the family's pipeline
    loads those.  A network whose pipeline loads no LoRA (UNet2DModel) gets the first file alone, for peft's own loader.
    """
    if role.switch is None or role.adapter is None:
        raise ValueError(f"{role.name} is no LoRA")
    lora = role.switch.lora(role.adapter)
    lora.save(folder, family.component)
    if family.kohya_prefix is not None:
        lora.save_kohya(folder, family.kohya_prefix)
