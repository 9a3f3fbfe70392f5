"""Real images with their labels or captions, and what is to be done where some cannot be read."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from torch import Tensor
from tqdm import tqdm

from stepdistill.conditions import (
    Conditions,
    are_labels,
    check_class_count,
    check_labels,
    list_first,
    number_classes,
    order_note,
    quote_line,
)
from stepdistill.errors import UserError

from .pictures import UnreadablePicture, as_pixels

Label = int | str | None
"""What an image is of: a class label, a class name or a caption; None: this image has none."""
MOST_TRIED = 2000
"""Pictures that are decoded before a run, to find those that cannot be."""
MOST_SECONDS = 20.0
"""How long that may take."""
_TRIED: dict[str, dict[int, str | None]] = {}
"""By a set's fingerprint, the images that this process has decoded, and why one could not be."""


class ImageSet:
    """Real images with their labels or captions.

    ``size`` images, each (C, H, W); :meth:`batch` gives float32 pixels in [-1, 1].

    Pictures that cannot be read are skipped by what goes through :meth:`pixels`, and remembered; up to ``limit`` of
    them are tolerated: ``max_unreadable`` of all, and at least one where that is above 0.

    Attributes:
        source: where they are from.
        labels: what each image is of; None where the source says nothing.
        fingerprint: changes when an image does: the pixels' digest of an array, the names, sizes and times of files, a
            dataset's own.
        names: the label of each class name, where the source or :meth:`prepare` states it.
        hint: how the source could be given what it lacks, for errors.
        notes: what a user should know of how the source was read, a line each.
        unreadable: why a picture could not be read, by its index, as far as that is known.
    """

    def __init__(
        self,
        source: str,
        read: Callable[[int], np.ndarray],
        size: int,
        labels: Sequence[Label] | None,
        fingerprint: str,
        names: dict[str, int] | None = None,
        hint: str = "",
        notes: Iterable[str] = (),
        max_unreadable: float = 0.0,
        unreadable: dict[int, str] | None = None,
    ):
        self.source, self._read, self.size = source, read, size
        self.labels: list[Label] | None = None if labels is None else list(labels)
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
        except UserError as error:  # also a picture of another size: a run that is on its way goes on without it
            self.unreadable[index] = str(error)
            tqdm.write(f"note: skipped, and another picture taken: {error}")
            return None

    def readable(self, indices: list[int]) -> tuple[Tensor | None, list[int]]:
        """Pixels (B, C, H, W) in [-1, 1] of those images that can be read (None: of none), and which these are."""
        images = {index: pixels for index in indices if (pixels := self.pixels(index)) is not None}
        return as_pixels(list(images.values())) if images else None, list(images)

    def try_reading(self, most: int | None = None) -> None:
        """Decode the first images, :data:`MOST_TRIED` by default, to find before a run those that cannot be read.

        What this process has decoded already is not decoded again.

        Raises:
            UserError: one is of another kind or size, or more than the limit cannot be read.
        """
        end = time.monotonic() + MOST_SECONDS
        tried = _TRIED.setdefault(self.fingerprint, {})
        for index in range(min(MOST_TRIED if most is None else most, self.size)):
            if index not in tried:
                tried[index] = self._reason(index)
            reason = tried[index]
            if reason is not None:
                self.unreadable[index] = reason
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
        """Refuse a set of which more pictures than the limit cannot be read, or none can be.

        Raises:
            UserError: it names the pictures.
        """
        if self.too_many_unreadable or len(self.unreadable) == self.size:
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
        some = list_first(names)
        return f"{len(reasons):,} of {self.size:,} pictures cannot be used: {some}; the first: {reasons[0]}"

    # -- conditions ----------------------------------------------------------------------------------------

    def classes(self, num_labels: int) -> list[int]:
        """The labels, all in 0..num_labels - 1.

        Raises:
            UserError: there are none, they are captions, or one is out of range.
        """
        labels = [label for label in self.labels or [] if isinstance(label, int)]
        if not labels or len(labels) < len(self):
            raise UserError(f"{self.source}: its images have no class labels, which are needed here")
        check_labels(labels, range(num_labels), self.source)
        return labels

    @property
    def captions(self) -> list[str | None]:
        """The caption of each image, None where it has none."""
        return [label if isinstance(label, str) else None for label in self.labels or [None] * self.size]

    def subset(self, indices: list[int]) -> ImageSet:
        """A set of the images ``indices``."""
        labels = None if self.labels is None else [self.labels[i] for i in indices]
        name = f"{self.fingerprint} {indices}"
        subset = ImageSet(self.source, lambda index: self._read(indices[index]), len(indices), labels, name)
        subset.limit = self.limit
        return subset

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
        texts = [label for label in stated if isinstance(label, str)]
        if not stated or (conditions.kind == "prompt" and len(texts) < len(stated)):
            needed = "captions" if conditions.kind == "prompt" else "labels"
            raise UserError(
                f"{source} has no {needed}, which this teacher's images need{self.hint and '; '}{self.hint}"
            )
        if len(stated) < len(labels):
            self.notes.append(f"{len(labels) - len(stated):,} of {len(labels):,} have no condition and are left out")
        if conditions.kind == "prompt":
            return
        if texts and len(texts) < len(stated):
            raise UserError(f"{source}: labels are numbers or names, all of one kind; one is {texts[0]!r}")
        if texts:
            self._name_classes(self.names or number_classes(texts, source), conditions, source)
        check_labels([label for label in self.labels or [] if isinstance(label, int)], conditions.labels, source)

    def _name_classes(self, names: dict[str, int], conditions: Conditions, source: str) -> None:
        """Replace the names of classes by their labels."""
        empty = sorted(set(names) - set(self.captions))
        check_class_count(names, conditions, source, empty)
        if empty:
            self.notes.append(f"classes without a picture: {list_first(empty)}")
        if not are_labels(names):
            names = dict(zip(names, conditions.labels, strict=True))
        self.notes += filter(None, [order_note(names)])
        self.names = names
        self.labels = [None if name is None else names[name] for name in self.captions]

    @property
    def described(self) -> str:
        """How many, and of what: the first few classes with their labels and numbers, or the first caption."""
        count = f"{len(self):,} picture{'s' * (len(self) != 1)}"
        labels = [label for label in self.labels or [] if label is not None]
        if not labels:
            return count
        if isinstance(labels[0], str):
            return f"{count}, the first is of {quote_line(labels[0])}"
        name_of = {label: f" {name}" for name, label in (self.names or {}).items() if name != str(label)}
        sizes = Counter(label for label in labels if isinstance(label, int))
        classes = [f"{label}{name_of.get(label, '')} ({sizes[label]:,})" for label in sorted({*sizes, *name_of})]
        return f"{count} of labels {list_first(classes, 5)}"

    @property
    def usable(self) -> list[int] | None:
        """The images with a condition, after :meth:`prepare`; None: all of them."""
        if not self.labels or None not in self.labels:
            return None
        return [index for index, label in enumerate(self.labels) if label is not None]

    def __len__(self) -> int:
        return self.size
