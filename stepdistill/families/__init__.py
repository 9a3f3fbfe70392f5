"""Teacher families: one file each, the only place that names a model class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from stepdistill.conditions import ConditionKind
from stepdistill.errors import UserError, reading
from stepdistill.precision import keep_norms_in_float32
from stepdistill.stock.loading import check_index, load_pipeline, read_index

from .base import Family, Source
from .calls import StockCalls
from .stable_diffusion import StableDiffusionFamily
from .unet2d import UNet2DFamily

FAMILIES: tuple[type[Family], ...] = (
    UNet2DFamily,
    StableDiffusionFamily,
)
"""Every family that can be loaded from a folder, one a line."""
TRIED = 100_000_000
"""Parameters of a network up to which a teacher is called once when it is loaded."""


def claiming_family(index: dict[str, Any]) -> type[Family] | None:
    """The family that says that a checked ``model_index.json`` is one of its pipelines; None where none does."""
    return next((family for family in FAMILIES if family.claims(index)), None)


def family_of(index: dict[str, Any], source: str) -> type[Family]:
    """The family of a teacher, by its ``model_index.json``.

    Raises:
        UserError: no family claims it, or the one that does cannot use it.
    """
    check_index(index, f"teacher {source}")
    family = claiming_family(index)
    if family is None:
        networks = " or ".join(dict.fromkeys(str(known.parts[known.component]) for known in FAMILIES))
        raise UserError(
            f"teacher {source}: a {index['_class_name']} is not supported; supported are pipelines around "
            f"{networks} (families {', '.join(known.name for known in FAMILIES)})"
        )
    family.check_parts(index, source)
    return family


def calls_of(pipeline: DiffusionPipeline) -> StockCalls:
    """How a loaded stock pipeline of any class is called: as its family says, or as its signature does."""
    name = type(pipeline).__name__
    family = next((family for family in FAMILIES if name in family.pipelines), None)
    return (StockCalls if family is None else family.calls)(pipeline)


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
        examples: dict[ConditionKind, list] = {"none": [], "label": list(family.labels[:1]), "prompt": ["a"]}
        items = examples[family.condition_kind]
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
    kind = family_of(index, path)
    if family not in ("auto", kind.name):
        raise UserError(f"teacher.family = {family}: the teacher {path} is of family {kind.name}")
    optional = {k: None for k in ("safety_checker", "feature_extractor") if k in index}
    remedy, key = "save it again with save_pretrained", "teacher.variant"
    pipeline = load_pipeline(folder, what, remedy, dtype, variant, key, **optional)
    keep_norms_in_float32(getattr(pipeline, kind.component))
    with reading(what, "look at the configs of its parts", "is not understood"):
        teacher = kind.from_pipeline(pipeline, path)
    teacher.source = Source(path, folder, variant)
    if null_label is not None:
        teacher.state_null_label(null_label, path)
    _try(teacher, path)
    return teacher


__all__ = [
    "FAMILIES",
    "Family",
    "StableDiffusionFamily",
    "StockCalls",
    "UNet2DFamily",
    "calls_of",
    "claiming_family",
    "load_family",
]
