"""Real images as latents, encoded once and stored in a file; those that cannot be read are 0, counted and named."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.files import write_tensors
from stepdistill.finiteness import is_finite
from stepdistill.readers import read_tensors

from .images import ImageSet

Posterior = Literal["mean", "sample"]
"""Which latent of a picture its VAE's posterior ``N(mean, std^2)`` gives: the mean, or a new sample at every use."""


def check_posterior(posterior: Posterior, key: str, family: Family) -> None:
    """Refuse samples of the posterior of a teacher without one.

    Raises:
        UserError: the teacher has no VAE.
    """
    if posterior == "sample" and family.vae is None:
        raise UserError(f"{key} = sample: this teacher has no VAE, its samples are the pictures; remove the key")


def load_latents(
    family: Family, images: ImageSet, folder: Path, posterior: Posterior
) -> tuple[Tensor | None, Tensor | None]:
    """:func:`encode_latents_cached`, and the standard deviations that samples are drawn by: None with ``mean``."""
    if posterior == "mean":
        return encode_latents_cached(family, images, folder), None
    return encode_posterior_cached(family, images, folder)


def encode_latents_cached(family: Family, images: ImageSet, folder: Path, batch: int = 16) -> Tensor | None:
    """All images as latents (N, C, H, W), from ``folder`` if they are stored there; None for a family without a VAE.

    The file is keyed by a fingerprint of the images, the VAE's weights and the size, so that a stale one is
    never used.  ``images.unreadable`` says which latents are of no picture.

    Raises:
        UserError: the file cannot be written, the latents are not finite, or too many pictures cannot be read.
    """
    if family.vae is None:
        return None
    (latents,) = _load_or_encode(
        family, images, folder, batch, ("latents",), lambda pixels: (family.encode_images(pixels),)
    )
    return latents


def encode_posterior_cached(family: Family, images: ImageSet, folder: Path, batch: int = 16) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of all images' latents, (N, C, H, W) each, as :func:`encode_latents_cached` but in
    another file."""
    mean, std = _load_or_encode(family, images, folder, batch, ("latents", "std"), family.encode_posterior)
    return mean, std


def _load_or_encode(
    family: Family,
    images: ImageSet,
    folder: Path,
    batch: int,
    names: tuple[str, ...],
    encode: Callable[[Tensor], tuple[Tensor, ...]],
) -> list[Tensor]:
    """The results of ``encode`` for all pixels, one tensor (N, ...) for each of ``names``."""
    parts = (images.fingerprint, len(images), family.image_shape, *names[1:])
    digest = hashlib.sha256(repr(parts).encode())
    assert family.vae is not None, "only latents are cached"
    for value in family.vae.state_dict().values():
        digest.update(value.detach().float().cpu().numpy().tobytes())
    key = digest.hexdigest()
    file = folder / f"latents-{key[:16]}.safetensors"
    with contextlib.suppress(OSError, ValueError, KeyError, AttributeError, SafetensorError):  # not there, or damaged
        tensors, metadata = read_tensors(file)
        if metadata.get("fingerprint") == key and all(len(tensors[name]) == len(images) for name in names):
            known = json.loads(metadata.get("unreadable", "{}"))
            images.unreadable |= {int(index): reason for index, reason in known.items()}
            images.check_readable()
            return [tensors[name] for name in names]
    encoded: dict[str, Tensor] = {}
    for start in tqdm(range(0, len(images), batch), desc="latents", unit="batch"):
        pixels, index = images.readable(list(range(start, min(start + batch, len(images)))))
        if images.too_many_unreadable:
            break
        if pixels is not None:
            for name, part in zip(names, encode(pixels.to(family.device)), strict=True):
                if name not in encoded:
                    encoded[name] = torch.zeros(len(images), *part.shape[1:])
                encoded[name][index] = part.float().cpu()
    images.check_readable()
    if not all(is_finite(tensor) for tensor in encoded.values()):
        raise UserError(
            f"{images.source}: the teacher's VAE gives latents that are not finite; load it in float32 "
            "(teacher.dtype=float32)"
        )
    facts = {"fingerprint": key, "unreadable": json.dumps(images.unreadable)}
    write_tensors(file, encoded, facts)  # several processes of a run may write it
    return list(encoded.values())
