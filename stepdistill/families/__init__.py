"""Teacher families: one file each, the only place that names a model class."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.families.stable_diffusion import StableDiffusionFamily
from stepdistill.families.unet2d import UNet2DFamily
from stepdistill.precision import norms_in_float32

FAMILIES: dict[str, type[Family]] = {
    "unet2d": UNet2DFamily,
    "stable_diffusion": StableDiffusionFamily,
}
NETWORKS = {"UNet2DModel": "unet2d", "UNet2DConditionModel": "stable_diffusion"}
"""The class of a folder's ``unet`` to its family."""


def family_of(model_index: dict, source: str) -> str:
    """The family that a folder's ``model_index.json`` belongs to, by its pipeline's class and all of its parts.

    Raises:
        UserError: no family for it, a part that is missing or not understood, or another pipeline around the parts.
    """
    name = model_index.get("_class_name") if isinstance(model_index, dict) else None
    if not isinstance(name, str):
        raise UserError(
            f"teacher {source}: model_index.json names no pipeline class of diffusers; save the teacher with "
            "save_pretrained"
        )
    entries = {k: v for k, v in model_index.items() if isinstance(v, list) and not k.startswith("_")}
    if odd := [k for k, v in entries.items() if len(v) != 2 or not (v == [None, None] or _are_names(v))]:
        raise UserError(
            f"teacher {source}: model_index.json: {odd[0]} = {entries[odd[0]]} is not a library and a class; save the "
            "teacher with save_pretrained"
        )
    parts = {part: kind for part, (library, kind) in entries.items() if library is not None}
    family = NETWORKS.get(parts.get("unet", ""))
    if family is None:
        raise UserError(
            f"teacher {source}: a {name} is not supported; supported are pipelines around "
            f"{' or '.join(NETWORKS)} (families {', '.join(FAMILIES)})"
        )
    _check_parts(name, parts, FAMILIES[family], source)
    return family


def _are_names(pair: list) -> bool:
    return all(isinstance(entry, str) for entry in pair)


def _check_parts(name: str, parts: dict[str, str], family: type[Family], source: str) -> None:
    """Refuse a pipeline class ``name`` with ``parts`` (classes by name) that is not a teacher of ``family``."""
    expected = ", ".join(family.parts)
    known = {*family.parts, *family.left_out}
    if more := [f"{part} ({kind})" for part, kind in parts.items() if part not in known]:
        raise UserError(
            f"teacher {source}: a {name} with {', '.join(more)} is not supported: its network does not work on what "
            f"one with {expected} alone works on"
        )
    for part, kind in family.parts.items():
        if part not in parts:
            raise UserError(f"teacher {source}: its {part} is missing; save the whole pipeline")
        if kind is not None and parts[part] != kind:
            raise UserError(f"teacher {source}: its {part} is of class {parts[part]}; only {kind} is supported")
    if name not in family.pipelines:
        raise UserError(
            f"teacher {source}: a {name} is not supported; if {family.pipelines[0]} draws as well with its parts "
            f"({expected}), save them as one"
        )


def _model_index(path: str, revision: str | None) -> dict:
    folder = Path(path)
    if folder.is_dir():
        file = folder / "model_index.json"
        if not file.exists():
            raise UserError(f"teacher {path}: not a diffusers folder (no model_index.json in it)")
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"teacher {path}: model_index.json is not valid JSON ({error})") from None
    if folder.exists() or path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError(f"teacher {path}: no such folder; give a diffusers folder or a hub id (owner/name)")
    from diffusers import DiffusionPipeline

    try:
        return dict(DiffusionPipeline.load_config(path, revision=revision))
    except Exception as error:  # many kinds; the user needs the name and the reason
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"teacher {path}: no such folder here, and the hub did not give it: {reason}") from None


def load_family(
    path: str,
    family: str = "auto",
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Family:
    """Load a teacher from a diffusers folder or a hub id.

    Args:
        family: a family's name, or ``auto`` to read it off the folder.
        dtype: of the teacher's frozen weights.

    Raises:
        UserError: not there, not a diffusers folder, of an unsupported class, or broken.
    """
    index = _model_index(path, revision)
    found = family_of(index, path)
    if family not in ("auto", found):
        raise UserError(f"teacher.family = {family}: the teacher {path} is of family {found}")
    from diffusers import DiffusionPipeline

    optional = {k: None for k in ("safety_checker", "feature_extractor") if k in index}
    try:
        pipeline = DiffusionPipeline.from_pretrained(path, revision=revision, variant=variant, dtype=dtype, **optional)
    except Exception as error:  # diffusers and transformers raise many kinds
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise UserError(f"teacher {path}: cannot be loaded: {reason}") from None
    norms_in_float32(pipeline.unet)
    return FAMILIES[found].from_components(pipeline.components, path)


__all__ = ["FAMILIES", "Family", "StableDiffusionFamily", "UNet2DFamily", "load_family"]
