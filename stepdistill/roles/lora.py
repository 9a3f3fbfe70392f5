"""LoRA files: low-rank factors by module, in diffusers' keys and in kohya's.

``W' = W + (alpha / rank) B A`` (2106.09685), A (rank, in, ...) and B (out, rank, ...), convolutions included.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill.digests import check_file
from stepdistill.errors import UserError, reading, show_value
from stepdistill.files import write_tensors
from stepdistill.finiteness import first_not_finite
from stepdistill.plain_files import parse_json
from stepdistill.readers import read_tensors

FILE = "pytorch_lora_weights.safetensors"
KOHYA_FILE = "kohya_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"
MOST_RANK, MOST_ALPHA = 4096, 1e6


@dataclass(frozen=True)
class LoRA:
    """One adapter: ``factors`` holds (A, B), float32, by the path of the module that they adapt."""

    rank: int
    alpha: float
    factors: dict[str, tuple[Tensor, Tensor]]

    def delta(self, path: str) -> Tensor:
        """What the adapter adds to the weight of module ``path``: ``(alpha / rank) B A``, float32, of its shape."""
        down, up = self.factors[path]
        return (self.alpha / self.rank * (up.flatten(1) @ down.flatten(1))).reshape(len(up), *down.shape[1:])

    def portable_state_dict(self) -> dict[str, Tensor]:
        """``path.lora_A.weight`` and ``path.lora_B.weight``, as roles name them without their adapter."""
        return {
            f"{path}.lora_{letter}.weight": factor
            for path, pair in self.factors.items()
            for letter, factor in zip("AB", pair, strict=True)
        }

    def save(self, folder: Path, component: str) -> Path:
        """Write diffusers' keys, ``<component>.<path>.lora_A.weight``, where ``component`` is the network's name in its
        pipeline (``unet``), and alpha in the metadata (without it every loader takes alpha = rank)."""
        settings = {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "target_modules": sorted(self.factors),
            "lora_dropout": 0.0,
            "bias": "none",
        }
        metadata = json.dumps({f"{component}.{key}": value for key, value in settings.items()}, sort_keys=True)
        tensors = {f"{component}.{key}": value for key, value in self.portable_state_dict().items()}
        return write_tensors(folder / FILE, tensors, {"format": "pt", METADATA: metadata})

    def save_kohya(self, folder: Path, prefix: str) -> Path:
        """Write kohya's keys: ``<prefix>_<path with _>.lora_down``, ``.lora_up`` and ``.alpha``."""
        tensors = {}
        for path, (down, up) in self.factors.items():
            name = f"{prefix}_{path.replace('.', '_')}"
            tensors[f"{name}.lora_down.weight"] = down
            tensors[f"{name}.lora_up.weight"] = up
            tensors[f"{name}.alpha"] = torch.tensor(float(self.alpha))
        metadata = {
            "format": "pt",
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(self.rank),
            "ss_network_alpha": str(self.alpha),
        }
        return write_tensors(folder / KOHYA_FILE, tensors, metadata)


def stacked(parts: list[tuple[LoRA, float]]) -> LoRA:
    """Several adapters on the same base, each with a ratio, as one: ``sum_i ratio_i (alpha_i / r_i) B_i A_i`` exactly.

    The factors stand beside each other along the rank, scales folded into B, so alpha is the new rank.  One part at
    ratio 1 stays as it is.

    Raises:
        ValueError: they adapt different modules.
    """
    if len(parts) == 1 and parts[0][1] == 1:
        return parts[0][0]
    first = parts[0][0]
    if any(part.factors.keys() != first.factors.keys() for part, _ in parts):
        raise ValueError("the adapters are on different modules")
    factors = {
        path: (
            torch.cat([part.factors[path][0] for part, _ in parts]),
            torch.cat([ratio * part.alpha / part.rank * part.factors[path][1] for part, ratio in parts], 1),
        )
        for path in first.factors
    }
    rank = sum(part.rank for part, _ in parts)
    return LoRA(rank, float(rank), factors)


def read_lora(path: str | Path, key: str) -> LoRA:
    """A LoRA in diffusers' keys: the file, its folder, or an exported student's folder.

    Args:
        key: the config key that named it, for errors.

    Raises:
        UserError: no such file, not a LoRA of one network, one of several ranks or that is not finite, metadata that
            do not fit, or not the file that stepdistill exported there.
    """
    path = Path(path)
    places = [path, path / FILE, path / "lora" / FILE]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(f"{key} = {path}: no LoRA there; name a file, or a student that was exported with its LoRA")
    check_file(file, f"{key} = {file}")
    with reading(f"{key} = {file}", "name another, or export the student again", "not a readable LoRA file"):
        tensors, header = read_tensors(file)
        return _of_tensors(tensors, parse_json(header.get(METADATA, "{}")))


def _of_tensors(tensors: dict[str, Tensor], metadata: Any) -> LoRA:
    """
    Raises:
        ValueError: not one LoRA in diffusers' keys, one that is not finite, or metadata that do not fit.
    """
    if (odd := first_not_finite(tensors.items())) is not None:
        raise ValueError(f"it has weights that are not finite, {odd} holds a NaN or an infinity")
    component = next(iter(tensors), "").partition(".")[0]
    factors = {}
    for name, down in tensors.items():
        up_name = name.replace(".lora_A.", ".lora_B.")
        if name.startswith(f"{component}.") and name.endswith(".lora_A.weight") and up_name in tensors:
            path = name.removeprefix(f"{component}.").removesuffix(".lora_A.weight")
            factors[path] = (down.float(), tensors[up_name].float())
    ranks = {len(down) if down.ndim else 0 for down, _ in factors.values()}
    if 2 * len(factors) != len(tensors) or len(ranks) != 1:
        raise ValueError("it is not one LoRA in diffusers' keys, <network>.<module>.lora_A.weight")
    (rank,) = ranks
    if not 1 <= rank <= MOST_RANK:
        raise ValueError(f"its rank is {rank}; 1 to {MOST_RANK} are read")
    for path, (down, up) in factors.items():
        if down.ndim < 2 or up.ndim != down.ndim or up.shape[1] != rank:
            raise ValueError(f"{path}: factors of {tuple(down.shape)} and {tuple(up.shape)} do not belong together")
    if not isinstance(metadata, dict):
        raise ValueError("its metadata are not a mapping")
    alpha = metadata.get(f"{component}.lora_alpha", rank)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= MOST_ALPHA:
        raise ValueError(f"its alpha is {show_value(alpha)}; a number above 0 is needed")
    return LoRA(rank, float(alpha), factors)
