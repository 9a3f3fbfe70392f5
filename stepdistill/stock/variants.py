"""Variants of a pipeline folder's weights, as ``save_pretrained(..., variant="fp16")`` writes them.

A part's weights are plain (``diffusion_pytorch_model.safetensors``), of a variant
(``diffusion_pytorch_model.fp16.safetensors``), or both.  As in diffusers, plain weights serve a part that has none of
the variant that is named.
"""

from __future__ import annotations

import re
from pathlib import Path

from stepdistill.errors import UserError

SHARD = r"(?:-\d+-of-\d+)?"
WEIGHTS = re.compile(
    rf"(?:diffusion_pytorch_model|pytorch_model|model){SHARD}(?:\.([^.]+?))?{SHARD}\.(?:safetensors|bin)"
)
"""A weight file's name; the group is its variant."""

Variants = set[str | None]
"""Of one network's weights; None stands for plain ones."""


def find_variants(folder: Path) -> Variants:
    """The variants of a network's folder."""
    names = [WEIGHTS.fullmatch(file.name) for file in folder.glob("*")]
    return {name[1] for name in names if name is not None}


def choose_variant(parts: dict[str, Variants], variant: str | None, what: str, key: str | None) -> str | None:
    """The variant to load a pipeline with, None for plain weights: ``variant``, once it is known to be there.

    Args:
        parts: the variants of each network's weights, by the part's name.
        what: the folder's name in errors.
        key: what names the variant; with None nothing does, and weights that are the only ones are taken.

    Raises:
        UserError: no network has such weights, or one has neither them nor plain ones.
    """
    known = sorted({name for variants in parts.values() for name in variants if name is not None})
    if variant is None and key is None and len(known) == 1:
        variant = known[0] if any(variants == set(known) for variants in parts.values()) else None
    key = key or "variant"
    if variant is not None and variant not in known and any(parts.values()):
        remedy = f"those there are: {', '.join(known)}; change {key}" if known else f"they are plain; remove {key}"
        raise UserError(f"{key} = {variant}: {what} has no weights of that variant, {remedy}")
    for part, variants in parts.items():
        if variants and not variants & {variant, None}:
            names = ", ".join(sorted(map(str, variants)))
            raise UserError(f"{what}: its {part} has weights of variant {names} alone; set {key} to such a variant")
    return variant
