"""Noise and the sample that the teacher's deterministic sampler makes of it: what a regression needs (DMD, 2311.18828).

A folder of shards, each a safetensors file with ``noise`` and ``x0`` (n, C, H, W), and in its metadata the labels or
prompts and the fingerprint of how they were made.  x0 is bounded on the way as the teacher's own scheduler bounds it
(``clip_sample``, ``thresholding``), so that a teacher of stock DDIM is sampled as stock DDIM does.  A shard is whole or
absent; what is there is not made again.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from stepdistill.denoiser import guided
from stepdistill.errors import UserError, reading
from stepdistill.families.base import Family
from stepdistill.files import write_tensors
from stepdistill.finiteness import is_finite
from stepdistill.readers import digest_of, parse_json, read_tensors, regular
from stepdistill.sampler import ddim_times, ode_sample
from stepdistill.seeds import DistinctSeeds, generator

from .order import Order


@dataclass(frozen=True)
class PairRecipe:
    """How pairs are made; pairs of other settings are refused."""

    count: int
    shard: int
    steps: int
    guidance_scale: float
    seed: int

    def fingerprint(self, family: Family, items: list) -> str:
        """SHA-256 over these settings (but ``count``: a folder may grow), the teacher's weights and the conditions."""
        said = [self.shard, self.steps, self.guidance_scale, self.seed, family.sample_shape, items]
        if family.clipping is not None:
            said.append(asdict(family.clipping))
        state = family.network.state_dict()  # a LoRA on it is not the teacher's
        weights = digest_of({k.replace(".base_layer.", "."): v for k, v in state.items() if "lora_" not in k})
        return hashlib.sha256(f"{json.dumps(said)} {weights}".encode()).hexdigest()

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard)


def _file(folder: Path, index: int) -> Path:
    return folder / f"pairs-{index:05d}.safetensors"


def make_pairs(
    family: Family,
    items: list,
    recipe: PairRecipe,
    folder: Path,
    batch: int,
    part: tuple[int, int] = (0, 1),
    autocast_dtype: torch.dtype | None = None,
) -> None:
    """Write the shards that are missing, ``part`` = (i, n): every n-th from the i-th, for n machines.

    Noise is a function of (seed, shard) alone; conditions are taken in a seeded order.  ``autocast_dtype`` is what the
    teacher is asked to compute in, None float32; pairs of either are the same but for rounding, and serve any run.

    Raises:
        UserError: the folder holds pairs made in another way, or cannot be written.
    """
    fingerprint = recipe.fingerprint(family, items)
    wanted = range(part[0], recipe.shards, part[1])
    missing = [index for index in wanted if not _is_whole(_file(folder, index), fingerprint, recipe, index)]
    total = sum(_size(recipe, index) for index in missing)
    for index in missing:
        if _file(folder, index).exists():
            print(f"note: {_file(folder, index)}: not a whole shard of pairs; it is made again")
    with tqdm(total=total, desc=f"pairs, {recipe.steps} steps", unit="pair", disable=not missing) as bar:
        for index in missing:
            _write(family, items, recipe, folder, index, batch, fingerprint, bar, autocast_dtype)


def _size(recipe: PairRecipe, index: int) -> int:
    return min(recipe.shard, recipe.count - index * recipe.shard)


def _is_whole(file: Path, fingerprint: str, recipe: PairRecipe, index: int) -> bool:
    """Whether the shard is there, in full; one of other settings is an error."""
    if not file.exists():
        return False
    try:
        with safe_open(regular(file), "pt") as opened:
            metadata, shape = opened.metadata() or {}, opened.get_slice("noise").get_shape()
    except (SafetensorError, OSError, ValueError):
        return False  # cut short: made again
    if metadata.get("fingerprint") != fingerprint:
        raise UserError(f"{file}: made with another teacher or other settings; choose another folder for the pairs")
    return bool(shape) and shape[0] >= _size(recipe, index)


@torch.no_grad()
def _write(family, items, recipe, folder, index, batch, fingerprint, bar, autocast_dtype) -> None:
    count, device = _size(recipe, index), family.device
    noise = torch.randn(count, *family.sample_shape, generator=generator(shard_seeds(recipe.seed)[index]))
    order = Order(max(1, len(items)), recipe.seed).indices(index * recipe.shard, count)
    own = [items[i] for i in order] if items else []
    denoiser, parts = family.teacher_denoiser() or family.denoiser(None, autocast_dtype), []
    times = ddim_times(family.schedule, recipe.steps)
    for start in range(0, count, batch):
        part = noise[start : start + batch].to(device)
        condition = family.encode_conditions(own[start : start + batch]) if items else {}
        null = family.null_condition(len(part)) if recipe.guidance_scale != 1 else None

        def denoise(x_t: Tensor, t: Tensor, condition=condition, null=null) -> Tensor:
            return guided(denoiser, x_t, t, condition, null, recipe.guidance_scale).x0

        parts.append(ode_sample(denoise, family.schedule, times, part, family.clipping).float().cpu())
        if not is_finite(parts[-1]):
            raise UserError(
                f"pairs: the teacher's samples in {recipe.steps} steps are not finite; load it in float32 "
                "(teacher.dtype=float32), or look at its own pictures"
            )
        bar.update(len(part))
    metadata = {"fingerprint": fingerprint, "items": json.dumps(own)}
    write_tensors(_file(folder, index), {"noise": noise, "x0": torch.cat(parts)}, metadata)


@functools.lru_cache
def shard_seeds(seed: int) -> DistinctSeeds:
    """The seed of each shard's noise."""

    def hashed(index: int) -> int:
        return int.from_bytes(hashlib.sha256(f"pairs {seed} {index}".encode()).digest()[:8], "big") >> 1

    return DistinctSeeds(hashed)


class PairSet:
    """All pairs of a folder: ``noise``, ``x0`` (N, C, H, W) on the CPU and ``items``."""

    def __init__(self, folder: Path, family: Family, items: list, recipe: PairRecipe):
        """
        Raises:
            UserError: shards are missing, damaged or of other settings.
        """
        fingerprint, noise, x0, self.items = recipe.fingerprint(family, items), [], [], []
        for index in range(recipe.shards):
            file = _file(folder, index)
            if not _is_whole(file, fingerprint, recipe, index):
                raise UserError(f"{folder}: pair shard {file.name} is missing; make it with: stepdistill pairs CONFIG")
            count = _size(recipe, index)
            with reading(file, "delete it, and make it with: stepdistill pairs CONFIG", "not a whole shard of pairs"):
                tensors, metadata = read_tensors(file)
                own = parse_json(metadata["items"])
                shapes = [tuple(tensors[name].shape[1:]) for name in ("noise", "x0")]
                if shapes != [tuple(family.sample_shape)] * 2 or len(tensors["x0"]) < count:
                    raise ValueError(f"samples of {shapes[1]} from noise of {shapes[0]}")
                if not isinstance(own, list) or (items and len(own) < count):
                    raise ValueError("its conditions are not those of its samples")
            noise.append(tensors["noise"][:count])
            x0.append(tensors["x0"][:count])
            self.items += own[:count]
        self.noise, self.x0 = torch.cat(noise), torch.cat(x0)

    def __len__(self) -> int:
        return len(self.noise)
