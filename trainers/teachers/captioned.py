"""A folder of captioned pictures, and captions for training.

``images.npz`` and ``captions.json`` hold all pictures and their words; ``training.npz`` and ``prompts.txt`` hold the
training split alone, as ``data.images.npz`` and ``data.prompts`` read them.
"""

from __future__ import annotations

import json
import random
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stepdistill import files
from stepdistill.data.arrays import write_npz
from stepdistill.errors import UserError, reading
from stepdistill.plain_files import read_json
from stepdistill.readers import read_arrays


@dataclass
class Entry:
    """The words that describe a picture; ``split`` is train, held-out-name or held-out-pair."""

    caption: str
    name: str
    style: str
    keywords: list[str] = field(default_factory=list)
    split: str = "train"


def caption_of(name: str, style: str) -> str:
    """The canonical caption."""
    return f"{name}, {style} style"


def training_caption(entry: Entry, draw: random.Random) -> str:
    """A caption for one training step: canonical (75 %), the name alone (8 %), with one or two keywords (10 %), or two
    or three keywords in the name's place (7 %)."""
    kind = draw.random()
    if kind < 0.08:
        return entry.name
    if kind < 0.83 or not entry.keywords:
        return entry.caption
    if kind < 0.93:
        words = draw.sample(entry.keywords, min(len(entry.keywords), draw.randint(1, 2)))
        return caption_of(", ".join([entry.name, *words]), entry.style)
    words = draw.sample(entry.keywords, min(len(entry.keywords), draw.randint(2, 3)))
    return caption_of(", ".join(words), entry.style)


def write_pictures(output: Path, images: np.ndarray, entries: list[Entry], credit: list[dict[str, str]]) -> None:
    """The four files of a data folder; images uint8 (N, H, W, 3)."""
    write_npz(output / "images.npz", images)
    training = [n for n, entry in enumerate(entries) if entry.split == "train"]
    prompts = [entries[n].caption for n in training]
    write_npz(output / "training.npz", images[training], np.array(prompts))
    document = {"credits": credit, "pictures": [asdict(entry) for entry in entries]}
    lines = json.dumps(document, ensure_ascii=False).replace('{"caption"', '\n{"caption"')
    files.write_text(output / "captions.json", lines + "\n")
    files.write_text(output / "prompts.txt", "\n".join(prompts) + "\n")


def read_pictures(folder: str | Path, key: str = "data") -> tuple[np.ndarray, list[Entry]]:
    """The images uint8 (N, H, W, 3) and words of a data folder; ``key`` is the config's, for errors.

    Raises:
        UserError: not such a folder, or files that do not belong together.
    """
    folder = Path(folder)
    remedy = "make it with: stepdistill teacher emoji"
    for name in ("images.npz", "captions.json"):
        if not (folder / name).exists():
            raise UserError(f"{key}: {folder / name} is not there; {remedy}")
    with reading(f"{key}: {folder}", remedy):
        images = read_arrays(folder / "images.npz", "images")["images"]
        entries = [_entry(item) for item in read_json(folder / "captions.json")["pictures"]]
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or len(images) != len(entries):
        raise UserError(
            f"{key}: {folder} has {len(entries)} captions for images {images.dtype} {images.shape}; uint8 (N, H, W, 3) "
            f"is read; {remedy}"
        )
    return images, entries


def _entry(item: dict[str, Any]) -> Entry:
    """One picture's words as ``captions.json`` holds them.

    Raises:
        ValueError, TypeError: they are of another form.
    """
    entry = Entry(**item)
    words = (entry.caption, entry.name, entry.style, entry.split, *entry.keywords)
    if not isinstance(entry.keywords, list) or not all(isinstance(word, str) for word in words):
        raise ValueError("captions.json holds captions that are no text")
    return entry
