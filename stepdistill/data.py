"""Where conditions and real images come from, and in which order.

Order is a function of (seed, position) alone, so a run resumes by remembering one integer, and any number of
processes see the same global batches.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from stepdistill import assets, files
from stepdistill.errors import UserError
from stepdistill.pictures import IMAGE_SUFFIXES, check_kind, fit, open_header, open_picture, upright_size

if TYPE_CHECKING:
    from stepdistill.settings import PromptColumnSettings


class Order:
    """An endless shuffled order over ``size`` items: a fresh permutation each epoch, seeded by (seed, epoch)."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def _of_epoch(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._permutation = np.random.default_rng((self.seed, epoch)).permutation(self.size)
            self._epoch = epoch
        return self._permutation

    def indices(self, position: int, count: int) -> list[int]:
        """The items at ``position .. position + count - 1`` of the order."""
        return [int(self._of_epoch(at // self.size)[at % self.size]) for at in range(position, position + count)]


def mirrored(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Each of the pictures (B, C, H, W) left to right with probability one half; ``generator`` is on the CPU."""
    flip = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.where(flip.to(pixels.device)[:, None, None, None], pixels.flip(-1), pixels)


def check_range(labels: list[int], known: Sequence[int], source: str) -> None:
    """Refuse labels that are not all among ``known``, which ascend.

    Raises:
        UserError: one is outside.
    """
    if not set(labels) <= set(known):
        raise UserError(
            f"{source}: labels {min(labels)}..{max(labels)} are outside {label_ranges(known)}; correct them, or the "
            "number of labels"
        )


def label_ranges(labels: Sequence[int]) -> str:
    """Ascending labels in words: ``0..9``, ``1..4, 6..9``, ``0, 2, 3``."""
    runs: list[list[int]] = []
    for label in labels:
        if runs and label == runs[-1][-1] + 1:
            runs[-1].append(label)
        else:
            runs.append([label])
    return ", ".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)


class ImageSet:
    """Real images with what was known of them.

    ``size`` images, each (C, H, W); :meth:`batch` gives float32 pixels in [-1, 1].  ``labels`` is a list of ints
    or captions (or None where the source has none), aligned with the images.  ``fingerprint`` changes when an image
    does: the pixels' digest of an array, the names, sizes and times of files, a dataset's own.
    """

    def __init__(self, source: str, read, size: int, labels: list[int] | list[str] | None, fingerprint: str):
        self.source, self._read, self.size, self.labels = source, read, size, labels
        self.fingerprint = fingerprint

    def batch(self, indices: list[int]) -> Tensor:
        """Pixels (len(indices), C, H, W) in [-1, 1]."""
        stack = np.stack([self._read(i) for i in indices])
        return torch.from_numpy(stack).permute(0, 3, 1, 2).float() / 127.5 - 1

    def classes(self, num_labels: int) -> list[int]:
        """The labels, all in 0..num_labels - 1.

        Raises:
            UserError: there are none, they are captions, or one is out of range.
        """
        if not self.labels or isinstance(self.labels[0], str):
            raise UserError(f"{self.source}: its images have no class labels, which are needed here")
        check_range(self.labels, range(num_labels), self.source)
        return self.labels

    def part(self, indices: list[int]) -> ImageSet:
        """The images ``indices`` as a set of their own."""
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        name = f"{self.fingerprint} {indices}"
        return ImageSet(self.source, lambda index: self._read(indices[index]), len(indices), labels, name)

    def __len__(self) -> int:
        return self.size


def read_array_images(
    pixels: np.ndarray,
    labels,
    shape: tuple[int, int, int],
    resize: bool,
    source: str,
    background: str = "white",
) -> ImageSet:
    """An ImageSet over a uint8 array (N, H, W) or (N, H, W, C); ``labels`` are integers or captions (N,), or None."""
    whole = pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[-1] in (1, 3, 4))
    if not whole or pixels.dtype != np.uint8 or pixels.size == 0:
        raise UserError(
            f"{source}: images must be uint8 of shape (N, H, W) or (N, H, W, C), C 1, 3 or 4, not {pixels.dtype} "
            f"{pixels.shape}"
        )
    if pixels.ndim == 4 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    labels = None if labels is None else np.asarray(labels)
    if labels is not None and (labels.ndim != 1 or labels.dtype.kind not in "iuU"):
        raise UserError(
            f"{source}: labels must be integers or captions of shape (N,), not {labels.dtype} {labels.shape}"
        )
    if labels is not None and len(labels) != len(pixels):
        raise UserError(f"{source}: {len(pixels)} images but {len(labels)} labels")

    def read(index: int) -> np.ndarray:
        return fit(Image.fromarray(pixels[index]), shape, resize, f"{source}[{index}]", background)

    read(0)  # a wrong size is answered at once
    fingerprint = hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest() + background * _has_alpha(pixels)
    return ImageSet(source, read, len(pixels), None if labels is None else labels.tolist(), fingerprint)


def _has_alpha(pixels: np.ndarray) -> bool:
    return pixels.ndim == 4 and pixels.shape[-1] == 4


def read_npz(
    path: str | Path,
    shape: tuple[int, int, int],
    resize: bool = False,
    key: str = "data.images.npz",
    background: str = "white",
) -> ImageSet:
    """``.npz`` with ``images`` uint8 (N, H, W[, C]) and, if it has them, ``labels`` (N,): integers or captions.

    ``key`` is the config's, for errors.
    """
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise ValueError("it is a single array; write one with numpy.savez")
        with file:
            if "images" not in file:
                raise UserError(f"{path}: no array named 'images' (it holds {', '.join(file.files) or 'none'})")
            images, labels = file["images"], file["labels"] if "labels" in file else None
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; set {key} to an existing .npz") from None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"{path}: not a readable .npz file ({error})") from None
    return read_array_images(images, labels, shape, resize, str(path), background)


def write_npz(path: str | Path, images: np.ndarray, labels: np.ndarray | None = None) -> Path:
    """A compressed ``.npz`` that :func:`read_npz` reads, whole or not at all.

    Args:
        images: uint8 (N, H, W) or (N, H, W, C); of one channel they are written as (N, H, W).
        labels: integers or captions (N,).

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path)
    images = images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images
    labelled = {} if labels is None else {"labels": labels if labels.dtype.kind == "U" else labels.astype(np.int64)}
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, images=images, **labelled)
    return path


def read_idx(images: str | Path, labels: str | Path | None, shape, resize: bool = True) -> ImageSet:
    """MNIST's idx format, plain or gzipped: uint8 images (N, H, W) and labels (N,)."""

    def parse(path) -> np.ndarray:
        try:
            raw = Path(path).read_bytes()
            raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        except FileNotFoundError:
            raise UserError(f"{path}: no such file (Debian's dataset-fashion-mnist has one)") from None
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: not readable ({error}); fetch the file again") from None
        if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
            raise UserError(f"{path}: not an idx file of bytes")
        try:
            dims = np.frombuffer(raw, ">i4", raw[3], 4)
            return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(dims)
        except ValueError:
            raise UserError(f"{path}: cut short; fetch the file again") from None

    return read_array_images(parse(images), None if labels is None else parse(labels), shape, resize, str(images))


def read_folder(
    path: str | Path,
    shape: tuple[int, int, int],
    resize: bool = False,
    treat: Callable[[Image.Image], np.ndarray] | None = None,
    background: str = "white",
) -> ImageSet:
    """A folder of images.  Sub-folders, if any, are labels in sorted order; ``NAME.txt`` beside an image is its
    caption.  ``treat``, in place of the library's own crop and resize, gives uint8 (H, W, C) of ``shape``."""
    root = Path(path)
    if not root.is_dir():
        raise UserError(f"{path}: no such folder; set data.images.folder to a folder of images")
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    if not files:
        raise UserError(f"{path}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))} are read)")
    labels: list | None = None
    if all(p.with_suffix(".txt").exists() for p in files):
        labels = [_caption(p.with_suffix(".txt")) for p in files]
    elif all(p.parent != root for p in files):
        names = sorted({p.relative_to(root).parts[0] for p in files})
        labels = [names.index(p.relative_to(root).parts[0]) for p in files]

    def read(index: int) -> np.ndarray:
        image = open_picture(files[index], str(files[index]))
        return fit(image, shape, resize, str(files[index]), background) if treat is None else treat(image)

    for file in files:  # headers only: a run of days should not end on its last file
        with open_header(file, str(file)) as image:
            if treat is None:
                check_kind(image, upright_size(image), shape, resize, str(file))
    stats = [(str(p.relative_to(root)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return ImageSet(str(path), read, len(files), labels, hashlib.sha256(repr((stats, background)).encode()).hexdigest())


def _caption(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a readable text file ({error}); save it as UTF-8") from None


def _dataset(name: str, split: str, revision: str | None):
    """A Hugging Face dataset: a folder written by ``save_to_disk``, or a hub id."""
    try:
        import datasets
    except ImportError:
        raise UserError("reading a Hugging Face dataset needs the 'datasets' package: pip install datasets") from None
    try:
        if Path(name).is_dir() and any(
            (Path(name) / marker).exists() for marker in ("dataset_info.json", "dataset_dict.json")
        ):
            loaded = datasets.load_from_disk(name)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # the library raises many kinds; the user needs the name and the reason
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"dataset {name!r} (split {split!r}) cannot be loaded: {reason}") from None


def _check_column(dataset, column: str, name: str) -> None:
    if column not in dataset.column_names:
        raise UserError(f"dataset {name!r} has no column {column!r}; it has {', '.join(dataset.column_names)}")


def _column(dataset, column: str, name: str) -> list:
    _check_column(dataset, column, name)
    return list(dataset[column])


def read_column(name: str, column: str, split: str = "train", revision: str | None = None) -> list:
    """One column of a Hugging Face dataset."""
    return _column(_dataset(name, split, revision), column, name)


def read_dataset(
    name: str,
    shape: tuple[int, int, int],
    split: str = "train",
    revision: str | None = None,
    image_column: str = "image",
    label_column: str | None = None,
    resize: bool = False,
    background: str = "white",
) -> ImageSet:
    """Images of a Hugging Face dataset; ``label_column`` may hold ints or captions."""
    dataset = _dataset(name, split, revision)
    labels = None if label_column is None else _column(dataset, label_column, name)
    _check_column(dataset, image_column, name)  # reading the column would decode every image

    def read(index: int) -> np.ndarray:
        where = f"{name}[{index}]"
        try:
            value = dataset[index][image_column]
            if isinstance(value, dict) and value.get("bytes"):
                value = open_picture(io.BytesIO(value["bytes"]), where)
            if not isinstance(value, Image.Image):
                value = Image.fromarray(np.asarray(value, dtype=np.uint8))
        except (OSError, ValueError, TypeError, SyntaxError) as error:  # of the decoder, or of what is no image
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"{where}: column {image_column!r} holds no readable image ({reason})") from None
        return fit(value, shape, resize, where, background)

    if len(dataset) == 0:
        raise UserError(f"dataset {name!r} (split {split!r}) is empty")
    read(0)
    return ImageSet(name, read, len(dataset), labels, f"{dataset._fingerprint} {image_column} {background}")


def read_prompts(path: str | Path, key: str = "data.prompts") -> list[str]:
    """A text file or asset, one prompt a line, blank lines skipped; ``key`` is the config's, for errors."""
    try:
        text = Path(assets.resolve(str(path))).read_text(encoding="utf-8-sig")
        prompts = [line.strip() for line in text.splitlines() if line.strip()]
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; set {key} to a text file, one prompt a line") from None
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path}: not a readable text file ({error}); save it as UTF-8") from None
    if not prompts:
        raise UserError(f"{path}: no prompts in it; write one a line")
    return prompts


def given_prompts(file: str | None, column: PromptColumnSettings | None) -> list[str] | None:
    """The prompts that a config's ``prompts`` or ``prompt_dataset`` names; None: neither does."""
    if column is not None:
        return read_prompt_column(column.name, column.column, column.split, column.revision)
    return None if file is None else read_prompts(file)


def read_prompt_column(name: str, column: str, split: str = "train", revision: str | None = None) -> list[str]:
    """One text column of a Hugging Face dataset."""
    prompts = [str(x).strip() for x in read_column(name, column, split, revision) if x is not None]
    prompts = [x for x in prompts if x]
    if not prompts:
        raise UserError(f"dataset {name!r}: column {column!r} has no text in it")
    return prompts
