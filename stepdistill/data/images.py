"""Where conditions and real images come from, and in which order.

Order is a function of (seed, position) alone, so a run resumes by remembering one integer, and any number of
processes see the same global batches.
"""

from __future__ import annotations

import gzip
import hashlib
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from stepdistill import files
from stepdistill.conditions import Conditions, are_labels, check_number, labels_of_names, listed, order_note, shortened
from stepdistill.errors import UserError, reading
from stepdistill.readers import array_names, read_arrays

from .pictures import UnreadablePicture, fit


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


def as_pixels(images: list[np.ndarray]) -> Tensor:
    """uint8 images (H, W, C) as float32 (B, C, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


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


LOOKED_AT = 2000
"""Pictures that are decoded before a run, to find what cannot be."""
LOOK_SECONDS = 20.0
"""And how long that may take."""
_SEEN: dict[str, dict[int, str | None]] = {}
"""Of sets by their fingerprint: images that were decoded, and why they could not be."""


class ImageSet:
    """Real images with what was known of them.

    ``size`` images, each (C, H, W); :meth:`batch` gives float32 pixels in [-1, 1].

    Pictures that cannot be read are skipped by what goes through :meth:`pixels`, and remembered; up to ``limit`` of
    them are tolerated: ``max_unreadable`` of all, and at least one where that is above 0.

    Attributes:
        source: where they are from.
        labels: what each image is of: class labels, names of classes, or captions (None: this image has none); None
            where the source says nothing.
        fingerprint: changes when an image does: the pixels' digest of an array, the names, sizes and times of files, a
            dataset's own.
        names: the label of each class name, where the source or :meth:`prepare` says it.
        hint: how the source could be given what it lacks, for errors.
        notes: what a user should know of how the source was read, a line each.
        unreadable: why a picture could not be read, by its index, as far as that is known.
    """

    def __init__(
        self,
        source: str,
        read: Callable[[int], np.ndarray],
        size: int,
        labels: list[int] | list[str | None] | None,
        fingerprint: str,
        names: dict[str, int] | None = None,
        hint: str = "",
        notes: Iterable[str] = (),
        max_unreadable: float = 0.0,
        unreadable: dict[int, str] | None = None,
    ):
        self.source, self._read, self.size, self.labels = source, read, size, labels
        self.fingerprint, self.names, self.hint, self.notes = fingerprint, names, hint, list(notes)
        self.limit = max(1, int(max_unreadable * size)) if max_unreadable > 0 else 0
        self.unreadable = {} if unreadable is None else unreadable

    # -- pixels --------------------------------------------------------------------------------------------

    def batch(self, indices: list[int]) -> Tensor:
        """Pixels (len(indices), C, H, W) in [-1, 1]."""
        return as_pixels([self._read(i) for i in indices])

    def pixels(self, index: int) -> np.ndarray | None:
        """One image, uint8 (H, W, C); None where it cannot be read, which is noted once."""
        if index in self.unreadable:
            return None
        try:
            return self._read(index)
        except UserError as error:  # of another size too: found here, a run is on its way
            self.unreadable[index] = str(error)
            tqdm.write(f"note: skipped, and another picture taken: {error}")
            return None

    def readable(self, indices: list[int]) -> tuple[Tensor | None, list[int]]:
        """Pixels (B, C, H, W) in [-1, 1] of those images that can be read (None: of none), and which these are."""
        images = {index: pixels for index in indices if (pixels := self.pixels(index)) is not None}
        return as_pixels(list(images.values())) if images else None, list(images)

    def look(self, most: int | None = None) -> None:
        """Decode the first images, :data:`LOOKED_AT` by default, to find before a run what cannot be read; those that
        this process has looked at already are not decoded again.

        Raises:
            UserError: one is of another kind or size, or more than the limit cannot be read.
        """
        end = time.monotonic() + LOOK_SECONDS
        seen = _SEEN.setdefault(self.fingerprint, {})
        for index in range(min(LOOKED_AT if most is None else most, self.size)):
            if index not in seen:
                seen[index] = self._reason(index)
            if seen[index] is not None:
                self.unreadable[index] = seen[index]
            if len(self.unreadable) > self.limit or time.monotonic() > end:
                break
        self.check_readable()

    def _reason(self, index: int) -> str | None:
        """Why one image cannot be read; None where it can be."""
        try:
            self._read(index)
        except UnreadablePicture as error:
            return str(error)
        return None

    def check_readable(self) -> None:
        """Refuse a set of which more cannot be read than the limit, or nothing can be.

        Raises:
            UserError: so it is; the pictures are named.
        """
        if len(self.unreadable) > self.limit or len(self.unreadable) == self.size:
            raise UserError(self.unreadable_note)

    @property
    def skipped_note(self) -> list[str]:
        """A line on the pictures that are skipped, where there are any."""
        return [f"skipped, up to {self.limit:,} are: {self.unreadable_note}"] if self.unreadable else []

    @property
    def too_many_unreadable(self) -> bool:
        return len(self.unreadable) > self.limit

    @property
    def unreadable_note(self) -> str:
        """The pictures that cannot be read, in a line; the reason of the first."""
        reasons = [self.unreadable[index] for index in sorted(self.unreadable)]
        if len(reasons) == 1:
            return reasons[0]
        names = [reason.split(": ")[0] for reason in reasons]
        return f"{len(reasons):,} of {self.size:,} pictures cannot be used: {listed(names)}; the first: {reasons[0]}"

    # -- conditions ----------------------------------------------------------------------------------------

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
        part = ImageSet(self.source, lambda index: self._read(indices[index]), len(indices), labels, name)
        part.limit = self.limit
        return part

    def prepare(self, conditions: Conditions, key: str) -> None:
        """Make :attr:`labels` what a teacher takes: names of classes become labels.

        Args:
            key: the config's, for errors.

        Raises:
            UserError: the images have no labels or captions and the teacher needs them, or other classes than the
                teacher's.
        """
        if conditions.kind == "none":
            return
        source, labels = f"{key}: {self.source}", self.labels or []
        stated = [label for label in labels if label is not None]
        texts = all(isinstance(label, str) for label in stated)
        if not stated or (conditions.kind == "prompt" and not texts):
            needed = "captions" if conditions.kind == "prompt" else "labels"
            raise UserError(
                f"{source} has no {needed}, which this teacher's images need{self.hint and '; '}{self.hint}"
            )
        if len(stated) < len(labels):
            self.notes.append(f"{len(labels) - len(stated):,} of {len(labels):,} have no condition and are left out")
        if conditions.kind == "prompt":
            return
        if not texts and not all(isinstance(label, int) for label in stated):
            odd = next(label for label in stated if not isinstance(label, int))
            raise UserError(f"{source}: labels are numbers or names, all of one kind; one is {odd!r}")
        if texts:
            self._name_classes(self.names or labels_of_names(stated, source), conditions, source)
        check_range([label for label in self.labels if label is not None], conditions.labels, source)

    def _name_classes(self, names: dict[str, int], conditions: Conditions, source: str) -> None:
        """Put the classes' labels in the place of their names."""
        empty = sorted(set(names) - set(self.labels))
        check_number(names, conditions, source, empty)
        if empty:
            self.notes.append(f"classes without a picture: {listed(empty)}")
        if not are_labels(names):
            names = dict(zip(names, conditions.labels, strict=True))
        self.notes += filter(None, [order_note(names)])
        self.names = names
        self.labels = [None if label is None else names[label] for label in self.labels]

    @property
    def described(self) -> str:
        """How many, and of what: the first few classes with their labels and numbers, or the first caption."""
        count = f"{len(self):,} picture{'s' * (len(self) != 1)}"
        labels = [label for label in self.labels or [] if label is not None]
        if not labels:
            return count
        if isinstance(labels[0], str):
            return f"{count}, the first is of {shortened(labels[0])}"
        name_of = {label: f" {name}" for name, label in (self.names or {}).items() if name != str(label)}
        sizes = Counter(labels)
        classes = [f"{label}{name_of.get(label, '')} ({sizes[label]:,})" for label in sorted({*sizes, *name_of})]
        return f"{count} of labels {listed(classes, 5)}"

    @property
    def usable(self) -> list[int] | None:
        """The images with a condition, after :meth:`prepare`; None: all of them."""
        if not self.labels or None not in self.labels:
            return None
        return [index for index, label in enumerate(self.labels) if label is not None]

    def __len__(self) -> int:
        return self.size


def read_array_images(
    pixels: np.ndarray,
    labels,
    shape: tuple[int, int, int] | None,
    resize: bool,
    source: str,
    background: str = "white",
) -> ImageSet:
    """An ImageSet over a uint8 array (N, H, W) or (N, H, W, C); ``labels`` are integers or captions (N,), or None.

    ``shape`` None: the images are not read, their labels are.
    """
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

    if shape is not None:
        read(0)  # a wrong size is answered at once
    fingerprint = hashlib.sha256(np.ascontiguousarray(pixels)).hexdigest() + background * _has_alpha(pixels)
    labels = None if labels is None else labels.tolist()
    hint = "write labels or captions into an array 'labels'"
    return ImageSet(source, read, len(pixels), labels, fingerprint, hint=hint)


def _has_alpha(pixels: np.ndarray) -> bool:
    return pixels.ndim == 4 and pixels.shape[-1] == 4


def read_npz(
    path: str | Path,
    shape: tuple[int, int, int] | None,
    resize: bool = False,
    key: str = "data.images.npz",
    background: str = "white",
) -> ImageSet:
    """``.npz`` with ``images`` uint8 (N, H, W[, C]) and, if it has them, ``labels`` (N,): integers or captions.

    ``key`` is the config's, for errors.
    """
    with reading(path, f"set {key} to an existing .npz", "not a readable .npz file"):
        arrays = read_arrays(path, "images", "labels")
    if "images" not in arrays:
        held = ", ".join(array_names(path)) or "none"
        raise UserError(f"{path}: no array named 'images' (it holds {held}); write one with numpy.savez")
    return read_array_images(arrays["images"], arrays.get("labels"), shape, resize, str(path), background)


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
