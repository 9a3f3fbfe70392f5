"""The table of tiny teachers: a new family, or a new kind of schedule, joins every contract by adding a row here."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tiny
from PIL import Image

from stepdistill.config import merge

FAMILIES: dict[str, Callable[..., Path]] = {
    "unet2d": lambda path, kind, labels, **network: tiny.save_pixels(
        path, kind, labels=labels, null=bool(labels), **network
    ),
    "stable_diffusion": lambda path, kind, _: tiny.save_stable_diffusion(path, kind),
}
"""How a folder of each family is written: where, with which of tiny's schedulers, and of how many classes (None: none;
for teachers of prompts it is "prompt"); pixels with further arguments of the network."""


@dataclass(frozen=True)
class TinyTeacher:
    """Attributes:
    family, kind, conditions: what its stock folder is written with, see :data:`FAMILIES`.
    transitions: how its exported student of several steps can move, the usual one first.
    small: the keys of the network's config that make a smaller student.
    has_null: whether it can be guided.
    sections: further config sections of its runs.
    refused: the rows of methods that it is not for, and what the error says.
    """

    family: str
    kind: str
    conditions: int | str | None
    transitions: tuple[str, ...]
    small: dict[str, Any] = field(default_factory=lambda: {"block_out_channels": [4, 8]})
    has_null: bool = True
    sections: dict[str, Any] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def save(self, path: Path) -> Path:
        return FAMILIES[self.family](path, self.kind, self.conditions)

    @property
    def data(self) -> str:
        """Which data of :func:`make_data` it trains on."""
        return "prompts" if self.conditions == "prompt" else "labels"

    def export_case(self, steps: int, weights: str = "full") -> tuple:
        """Its row of test_export's cases, with its usual transition."""
        return (self.family, self.kind, self.conditions, steps, None, self.transitions[0], weights)


VP = ("renoise", "ode", "tcd", "ancestral")
HALF = {"teacher": {"dtype": "bfloat16"}, "train": {"precision": "bf16"}}
TEACHERS: dict[str, TinyTeacher] = {
    # of a v network whose last timestep is pure noise, where Euler's scheduler has no ancestral move
    "unet2d": TinyTeacher("unet2d", "v", 3, ("renoise", "ode", "tcd")),
    "stable_diffusion": TinyTeacher("stable_diffusion", "sd_ddim_eps", "prompt", VP),
    "flow": TinyTeacher("unet2d", "flow", 3, ("ode",), refused={"tscd_phased": "only students of VP teachers"}),
    "edm": TinyTeacher(
        "unet2d",
        "edm",
        3,
        ("renoise",),
        refused={
            "boot": "no stock scheduler gives an EDM network",
            "boot_heun_guided": "no stock scheduler gives an EDM network",
            "tscd_segments_adversarial": "so it moves along the ODE",
            "tscd_phased": "only students of VP teachers",
        },
    ),
    "bf16": TinyTeacher("stable_diffusion", "sd_ddim_eps", "prompt", VP, sections=HALF),
}
GOLDEN = ("unet2d", "stable_diffusion")
"""The teachers of the golden record."""


def make_data(root: Path) -> dict[str, dict[str, Any]]:
    """Data sections by the kind of data, under ``root``: arrays of labelled 8x8 pictures, 16x16 pictures with
    captions, and pairs of preferred and other pictures of each kind."""
    root.mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    arrays = generator.integers(0, 255, (12, 8, 8), dtype=np.uint8)
    np.savez(root / "images.npz", images=arrays, labels=np.arange(12) % 3)
    (root / "prompts.txt").write_text("a cat\na dog\na red bus\n")
    for index in range(6):
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(root / f"{index}.png")
        (root / f"{index}.txt").write_text("a cat" if index % 2 else "a dog")
    pictures = root / "pictures"
    pictures.mkdir()
    for file in [*root.glob("*.png"), *(root / f"{i}.txt" for i in range(6))]:
        file.rename(pictures / file.name)
    for part in ("winner", "loser"):
        for index in range(6):
            place = root / "labels-pairs" / part / str(index % 3)
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 255, (8, 8), dtype=np.uint8)).save(place / f"{index}.png")
        (root / "prompts-pairs").mkdir(exist_ok=True)
        shutil.copytree(pictures, root / "prompts-pairs" / part)
    for file in (root / "prompts-pairs" / "loser").glob("*.png"):
        Image.fromarray(generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(file)
    return {
        "labels": {"images": {"npz": str(root / "images.npz")}},
        "prompts": {"prompts": str(root / "prompts.txt"), "images": {"folder": str(pictures)}},
    }


def make_teachers(root: Path) -> dict[str, dict[str, Any]]:
    """Config sections ``teacher`` and ``data`` of every row."""
    data = make_data(root)
    sections = {}
    for name, row in TEACHERS.items():
        path = row.save(root / name)
        shutil.copytree(root / f"{row.data}-pairs", root / f"{name}-pairs")
        sections[name] = merge({"teacher": {"path": str(path)}, "data": data[row.data]}, row.sections)
    return sections
