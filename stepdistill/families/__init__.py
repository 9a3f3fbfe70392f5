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
    """The family that a folder's ``model_index.json`` belongs to.

    Raises:
        UserError: no family for it.
    """
    network = (model_index.get("unet") or [None, None])[1]
    extra = [k for k in ("text_encoder_2", "controlnet", "image_encoder") if (model_index.get(k) or [None])[0]]
    if network in NETWORKS and not extra:
        return NETWORKS[network]
    what = model_index.get("_class_name", "unknown")
    raise UserError(
        f"teacher {source}: a {what} is not supported; supported are pipelines around "
        f"{' or '.join(NETWORKS)} (families {', '.join(FAMILIES)})"
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
