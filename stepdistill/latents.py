"""Real images as latents, encoded once and kept in a file."""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from stepdistill.data import ImageSet
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.files import write_tensors
from stepdistill.finiteness import is_finite
from stepdistill.readers import read_tensors


def cached_latents(family: Family, images: ImageSet, folder: Path, batch: int = 16) -> Tensor | None:
    """All images as latents (N, C, H, W), from ``folder`` if they lie there; None for a family without a VAE.

    The file is keyed by a fingerprint of the images, the VAE's weights and the size, so that a stale one is
    never used.

    Raises:
        UserError: the file cannot be written.
    """
    vae = getattr(family, "vae", None)
    if vae is None:
        return None
    digest = hashlib.sha256(repr((images.fingerprint, len(images), family.image_shape)).encode())
    for value in vae.state_dict().values():
        digest.update(value.detach().float().cpu().numpy().tobytes())
    key = digest.hexdigest()
    file = folder / f"latents-{key[:16]}.safetensors"
    with contextlib.suppress(OSError, ValueError, KeyError, SafetensorError):  # not there, or damaged: made anew
        tensors, metadata = read_tensors(file)
        if metadata.get("fingerprint") == key and len(tensors["latents"]) == len(images):
            return tensors["latents"]
    bar = tqdm(range(0, len(images), batch), desc="latents", unit="batch")
    parts = [
        family.encode_images(images.batch(list(range(i, min(i + batch, len(images))))).to(family.device)).cpu()
        for i in bar
    ]
    latents = torch.cat(parts).contiguous()
    if not is_finite(latents):
        raise UserError(
            f"{images.source}: the teacher's VAE gives latents that are not finite; load it in float32 "
            "(teacher.dtype=float32)"
        )
    write_tensors(file, {"latents": latents}, {"fingerprint": key})  # every process of a run may be here
    return latents
