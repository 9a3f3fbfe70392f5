"""Teacher families: one file each, the only place that names a model class."""

from __future__ import annotations

from pathlib import Path

import torch

from stepdistill.errors import UserError, reading
from stepdistill.precision import norms_in_float32
from stepdistill.stock.loading import check_index, load_pipeline, parts_of, read_index

from .base import Family, Source
from .stable_diffusion import StableDiffusionFamily
from .unet2d import UNet2DFamily

FAMILIES: dict[str, type[Family]] = {
    "unet2d": UNet2DFamily,
    "stable_diffusion": StableDiffusionFamily,
}
NETWORKS = {"UNet2DModel": "unet2d", "UNet2DConditionModel": "stable_diffusion"}
"""The class of a folder's ``unet`` to its family."""
TRIED = 100_000_000
"""Parameters of a network up to which a teacher is called once when it is loaded."""


def family_of(model_index: dict, source: str) -> str:
    """The family that a folder's ``model_index.json`` belongs to, by its pipeline's class and all of its parts.

    Raises:
        UserError: no family for it, a part that is missing or not understood, or another pipeline around the parts.
    """
    check_index(model_index, f"teacher {source}")
    name, parts = model_index["_class_name"], {part: kind for part, (_, kind) in parts_of(model_index).items()}
    family = NETWORKS.get(parts.get("unet", ""))
    if family is None:
        raise UserError(
            f"teacher {source}: a {name} is not supported; supported are pipelines around "
            f"{' or '.join(NETWORKS)} (families {', '.join(FAMILIES)})"
        )
    _check_parts(name, parts, FAMILIES[family], source)
    return family


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


def _folder(path: str, revision: str | None, variant: str | None) -> Path:
    """The teacher's folder on this machine; a hub id's is in the hub's cache.

    Raises:
        UserError: no such folder, and the hub does not give it.
    """
    folder = Path(path)
    if folder.is_dir():
        return folder
    if folder.exists() or path.count("/") != 1 or path.startswith((".", "/", "~")):
        raise UserError(f"teacher {path}: no such folder; give a diffusers folder or a hub id (owner/name)")
    from diffusers import DiffusionPipeline

    remedy = "look at its name, or name a folder"
    with reading(f"teacher {path}", remedy, "no such folder here, and the hub did not give it"):
        check_index(dict(DiffusionPipeline.load_config(path, revision=revision)), f"teacher {path}")
        return Path(DiffusionPipeline.download(path, revision=revision, variant=variant))


def _try(family: Family, source: str) -> None:
    """Call a teacher of moderate size once, on zeros.

    Raises:
        UserError: that fails, or gives something of another shape.
    """
    if sum(p.numel() for p in family.network.parameters()) > TRIED:
        return
    remedy = "look at the configs of its parts"
    with torch.no_grad(), reading(f"teacher {source}", remedy, "cannot be called"):
        samples = torch.zeros(1, *family.sample_shape)
        time = family.schedule.level(torch.tensor([family.schedule.num_levels // 2]))
        items = {"none": [], "label": list(family.labels[:1]), "prompt": ["a"]}[family.condition_kind]
        condition = family.encode_conditions(items) if items else {}
        shapes = [
            (family.denoiser()(samples, time, condition).x0.shape, samples.shape),
            (family.decode(samples).shape, (1, *family.image_shape)),
        ]
        for shape, expected in shapes:
            if tuple(shape) != tuple(expected):
                raise ValueError(f"it gives {tuple(shape)}, not {tuple(expected)}")


def load_family(
    path: str,
    family: str = "auto",
    revision: str | None = None,
    variant: str | None = None,
    dtype: torch.dtype = torch.float32,
    null_label: int | None = None,
) -> Family:
    """Load a teacher from a diffusers folder or a hub id.

    Args:
        family: a family's name, or ``auto`` to read it off the folder.
        variant: of the weights; the plain ones by default.
        dtype: of the teacher's frozen weights.
        null_label: of a class-conditional teacher whose folder does not say it.

    Raises:
        UserError: not there, not a diffusers folder, of an unsupported class, or broken (weights that are not finite);
            a null label that it has not.
    """
    folder = _folder(path, revision, variant)
    what = f"teacher {path}"
    index = read_index(folder, what)
    found = family_of(index, path)
    if family not in ("auto", found):
        raise UserError(f"teacher.family = {family}: the teacher {path} is of family {found}")
    optional = {k: None for k in ("safety_checker", "feature_extractor") if k in index}
    remedy, key = "save it again with save_pretrained", "teacher.variant"
    pipeline = load_pipeline(folder, what, remedy, dtype, variant, key, **optional)
    norms_in_float32(pipeline.unet)
    with reading(what, "look at the configs of its parts", "is not understood"):
        teacher = FAMILIES[found].from_components(pipeline.components, path)
    teacher.source = Source(path, folder, variant)
    if null_label is not None:
        teacher.state_null_label(null_label, path)
    _try(teacher, path)
    return teacher


__all__ = ["FAMILIES", "Family", "StableDiffusionFamily", "UNet2DFamily", "load_family"]
