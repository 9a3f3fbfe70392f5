"""Pairs of noise and the sample that the teacher's deterministic sampler turns it into, for regression (DMD,
2311.18828).

A folder of shards, each a safetensors file with ``noise`` and ``x0`` (n, C, H, W), and in its metadata the labels or
prompts and a fingerprint of how they were made.  x0 is bounded on the way as the teacher's own scheduler bounds it
(``clip_sample``, ``thresholding``), so that a teacher of stock DDIM is sampled as stock DDIM does.  A shard is whole or
absent; a whole one is not made again.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from stepdistill.denoiser import Condition, guided
from stepdistill.errors import UserError, reading
from stepdistill.families.base import Family
from stepdistill.files import write_tensors
from stepdistill.finiteness import is_finite
from stepdistill.plain_files import parse_json, regular
from stepdistill.readers import digest_tensors, read_tensors
from stepdistill.sampler import ddim_times, ode_sample
from stepdistill.seeds import DistinctSeeds, generator

from .order import Order


@dataclass(frozen=True)
class PairRecipe:
    """The settings that pairs are made with; pairs of other settings are refused."""

    count: int
    shard: int
    steps: int
    guidance_scale: float
    seed: int

    def fingerprint(self, family: Family, items: list[Any]) -> str:
        """SHA-256 over these settings (but ``count``: a folder may grow), the teacher's weights and the conditions."""
        facts: list[Any] = [self.shard, self.steps, self.guidance_scale, self.seed, family.sample_shape, items]
        if family.clipping is not None:
            facts.append(asdict(family.clipping))
        state = family.network.state_dict()  # a LoRA on it is not the teacher's
        weights = digest_tensors({k.replace(".base_layer.", "."): v for k, v in state.items() if "lora_" not in k})
        return hashlib.sha256(f"{json.dumps(facts)} {weights}".encode()).hexdigest()

    @property
    def shards(self) -> int:
        """The number of shards."""
        return -(-self.count // self.shard)

    def size(self, shard: int) -> int:
        """The number of pairs in a shard."""
        return min(self.shard, self.count - shard * self.shard)


def _file(folder: Path, index: int) -> Path:
    return folder / f"pairs-{index:05d}.safetensors"


@dataclass(frozen=True)
class PairPlan:
    """Which pairs a run wants: how they are made, the folder that they are in, and how many are made at a time."""

    recipe: PairRecipe
    folder: Path
    batch: int


def make_pairs(
    family: Family,
    items: list[Any],
    recipe: PairRecipe,
    folder: Path,
    batch: int,
    part: tuple[int, int] = (0, 1),
    autocast_dtype: torch.dtype | None = None,
) -> None:
    """Write the shards that are missing.

    Noise is a function of (seed, shard) alone; conditions are taken in a seeded order.

    Args:
        batch: samples of one call of the teacher.
        part: (i, n): of every n shards the i-th, for n machines.
        autocast_dtype: what the teacher computes in, None is float32; pairs of either differ by rounding alone, and
            serve any run.

    Raises:
        UserError: the folder holds pairs made in another way, or cannot be written.
    """
    fingerprint = recipe.fingerprint(family, items)
    shards = range(part[0], recipe.shards, part[1])
    missing = [index for index in shards if not _is_whole(_file(folder, index), fingerprint, recipe, index)]
    total = sum(recipe.size(index) for index in missing)
    for index in missing:
        if _file(folder, index).exists():
            print(f"note: {_file(folder, index)}: not a whole shard of pairs; it is made again")
    with tqdm(total=total, desc=f"pairs, {recipe.steps} steps", unit="pair", disable=not missing) as bar:
        for index in missing:
            chosen = _choose_items(items, recipe, index)
            noise, x0 = _sample(family, chosen, recipe, index, batch, autocast_dtype, bar)
            _write(_file(folder, index), noise, x0, {"fingerprint": fingerprint, "items": json.dumps(chosen)})


def _is_whole(file: Path, fingerprint: str, recipe: PairRecipe, index: int) -> bool:
    """Whether a shard exists in full.

    Raises:
        UserError: it was made with other settings.
    """
    if not file.exists():
        return False
    try:
        with safe_open(regular(file), "pt") as opened:
            metadata, shape = opened.metadata() or {}, opened.get_slice("noise").get_shape()
    except (SafetensorError, OSError, ValueError):
        return False  # cut short: made again
    if metadata.get("fingerprint") != fingerprint:
        raise UserError(f"{file}: made with another teacher or other settings; choose another folder for the pairs")
    return bool(shape) and shape[0] >= recipe.size(index)


def _choose_items(items: list[Any], recipe: PairRecipe, index: int) -> list[Any]:
    """The conditions of shard ``index``."""
    order = Order(max(1, len(items)), recipe.seed).indices(index * recipe.shard, recipe.size(index))
    return [items[i] for i in order] if items else []


@torch.no_grad()
def _sample(
    family: Family,
    items: list[Any],
    recipe: PairRecipe,
    index: int,
    batch: int,
    autocast_dtype: torch.dtype | None,
    bar: tqdm[Any],
) -> tuple[Tensor, Tensor]:
    """Noise and samples (n, C, H, W) of shard ``index``, on the CPU; ``items`` are its conditions.

    Raises:
        UserError: a sample is not finite.
    """
    count = recipe.size(index)
    noise = torch.randn(count, *family.sample_shape, generator=generator(shard_seeds(recipe.seed)[index]))
    denoiser = family.teacher_denoiser() or family.denoiser(None, autocast_dtype)
    times, samples = ddim_times(family.schedule, recipe.steps), []
    for start in range(0, count, batch):
        part = noise[start : start + batch].to(family.device)
        condition = family.encode_conditions(items[start : start + batch]) if items else {}
        null = family.null_condition(len(part)) if recipe.guidance_scale != 1 else None

        def denoise(x_t: Tensor, t: Tensor, condition: Condition = condition, null: Condition | None = null) -> Tensor:
            return guided(denoiser, x_t, t, condition, null, recipe.guidance_scale).x0

        samples.append(ode_sample(denoise, family.schedule, times, part, family.clipping).float().cpu())
        if not is_finite(samples[-1]):
            raise UserError(
                f"pairs: the teacher's samples in {recipe.steps} steps are not finite; load it in float32 "
                "(teacher.dtype=float32), or look at its pictures"
            )
        bar.update(len(part))
    return noise, torch.cat(samples)


def _write(file: Path, noise: Tensor, x0: Tensor, metadata: dict[str, str]) -> None:
    write_tensors(file, {"noise": noise, "x0": x0}, metadata)


@functools.lru_cache
def shard_seeds(seed: int) -> DistinctSeeds:
    """The seed of each shard's noise."""

    def hashed(index: int) -> int:
        return int.from_bytes(hashlib.sha256(f"pairs {seed} {index}".encode()).digest()[:8], "big") >> 1

    return DistinctSeeds(hashed)


class PairSet:
    """All pairs of a folder: ``noise``, ``x0`` (N, C, H, W) on the CPU and ``items``."""

    def __init__(self, folder: Path, family: Family, items: list[Any], recipe: PairRecipe):
        """Read the shards of ``recipe``.

        Raises:
            UserError: shards are missing, damaged or of other settings.
        """
        fingerprint, noise, x0 = recipe.fingerprint(family, items), [], []
        self.items: list[Any] = []
        for index in range(recipe.shards):
            file = _file(folder, index)
            if not _is_whole(file, fingerprint, recipe, index):
                raise UserError(f"{folder}: pair shard {file.name} is missing; make it with: stepdistill pairs CONFIG")
            count = recipe.size(index)
            with reading(file, "delete it, and make it with: stepdistill pairs CONFIG", "not a whole shard of pairs"):
                tensors, metadata = read_tensors(file)
                chosen = parse_json(metadata["items"])
                shapes = [tuple(tensors[name].shape[1:]) for name in ("noise", "x0")]
                if shapes != [tuple(family.sample_shape)] * 2 or len(tensors["x0"]) < count:
                    raise ValueError(f"samples of {shapes[1]} from noise of {shapes[0]}")
                if not isinstance(chosen, list) or (items and len(chosen) < count):
                    raise ValueError("its conditions are not those of its samples")
            noise.append(tensors["noise"][:count])
            x0.append(tensors["x0"][:count])
            self.items += chosen[:count]
        self.noise, self.x0 = torch.cat(noise), torch.cat(x0)

    def __len__(self) -> int:
        return len(self.noise)
