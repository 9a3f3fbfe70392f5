"""What teachers are conditioned on, and how a user's class names and captions become that."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from .errors import UserError, show_value

ConditionKind = Literal["none", "label", "prompt"]


@dataclass(frozen=True)
class Conditions:
    """What a teacher is conditioned on: nothing, ``labels`` (ascending), or prompts."""

    kind: ConditionKind = "none"
    labels: Sequence[int] = ()


NONE = Conditions()


# -- names of classes --------------------------------------------------------------------------------------


def are_labels(names: Iterable[str]) -> bool:
    """Whether class names are whole numbers, which then are the labels themselves."""
    return all(name.isascii() and name.isdigit() for name in names)


def number_classes(names: Iterable[str], source: str) -> dict[str, int]:
    """The number of each class name, in order: whole numbers are labels, other names count from 0 in sorted order.

    Args:
        source: where the names are from, for errors.

    Raises:
        UserError: numbers and other names together, or two names that differ in writing alone.
    """
    normal = {name: unicodedata.normalize("NFC", name) for name in sorted(set(names))}
    numbers = [name for name in normal if are_labels([name])]
    if numbers and len(numbers) < len(normal):
        other = next(name for name in normal if name not in numbers)
        raise UserError(
            f"{source}: {numbers[0]!r} is a number and {other!r} is none; name every class by its label (0, 1, 2, "
            "...), or none"
        )
    written: dict[str | int, str] = {}
    for name, form in normal.items():
        same = written.setdefault(int(name) if numbers else form.casefold(), name)
        if same != name:
            raise UserError(
                f"{source}: {same!r} and {name!r} differ in writing alone; are they one class?  Merge them, or name "
                "every class by its label (0, 1, 2, ...)"
            )
    if numbers:
        return {name: int(name) for name in sorted(numbers, key=int)}
    return {name: label for label, name in enumerate(sorted(normal, key=normal.__getitem__))}


def check_class_count(labels: dict[str, int], conditions: Conditions, source: str, empty: Iterable[str] = ()) -> None:
    """Refuse classes counted by their names that are not as many as the teacher's: the labels would be others.

    Args:
        empty: those of the names that have no picture.

    Raises:
        UserError: another number.
    """
    if are_labels(labels) or len(labels) == len(conditions.labels):
        return
    hollow = f"; without a picture: {', '.join(sorted(empty)[:3])}" if empty else ""
    raise UserError(
        f"{source}: {len(labels)} classes by name ({list_first(labels)}){hollow}, and the teacher knows "
        f"{len(conditions.labels)}; give all of the teacher's classes in the order of its labels, or name each by its "
        "label (0, 1, 2, ...)"
    )


def check_labels(labels: Collection[int], known: Sequence[int], source: str) -> None:
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


def order_note(labels: dict[str, int]) -> str | None:
    """A line on names whose order as text is not that of the numbers in them (``class10`` before ``class2``)."""
    for a, b in itertools.pairwise(labels):
        if not are_labels(labels) and _natural(a) > _natural(b):
            return f"classes are in the order of text: {a!r} is label {labels[a]}, before {b!r}"
    return None


def _natural(name: str) -> list[tuple[int, int, str]]:
    parts = re.split(r"([0-9]+)", name)
    return [(1, int(part), "") if part.isdigit() and part.isascii() else (0, 0, part) for part in parts if part]


def list_first(values: Iterable[Any], most: int = 3) -> str:
    """The first few of values, in words: ``a, b, c, ... (7 more)``."""
    words = [str(value) for value in values]
    more = len(words) - most
    return ", ".join(words[:most]) + (f", ... ({more} more)" if more > 0 else "")


def quote_line(text: str, most: int = 70) -> str:
    """A text in quotes on one line, at most so many of its characters."""
    line = " ".join(text.split())
    return f'"{line if len(line) <= most else line[: most - 3] + "..."}"'


# -- captions and prompts ----------------------------------------------------------------------------------


class Captions(str):
    """Several captions of one thing; as a string it is the first of them.

    Attributes:
        every: all of them.
    """

    every: tuple[str, ...]

    def __new__(cls, every: Iterable[str]) -> Captions:
        every = tuple(every)
        caption = super().__new__(cls, every[0])
        caption.every = every
        return caption

    def __getnewargs__(self) -> Any:
        return (self.every,)


def draw_caption(item: Any, seed: int, position: int) -> Any:
    """The condition at a position of an order: of :class:`Captions` one, drawn by (seed, position) alone."""
    if not isinstance(item, Captions):
        return item
    return item.every[int(np.random.default_rng((seed, position)).integers(len(item.every)))]


def as_caption(value: Any, where: str) -> str | None:
    """A text, or several (:class:`Captions`), stripped; None for an empty value.

    Args:
        where: the value's place, for errors.

    Raises:
        UserError: neither a text nor a list of texts.
    """
    if value is None or (isinstance(value, float) and value != value):  # pandas writes NaN for an empty value
        return None
    if isinstance(value, str):
        return value.strip()
    if isinstance(value, list | tuple | np.ndarray):
        captions = [as_caption(text, where) for text in value]
        if any(isinstance(caption, Captions) for caption in captions):
            raise UserError(f"{where}: a list of lists; a caption is a text, or a list of texts to draw from")
        texts = [caption for caption in captions if caption]
        if len(texts) > 1:
            return Captions(texts)
        return texts[0] if texts else None
    raise UserError(f"{where}: {type(value).__name__} {show_value(value, 60)} is no text; name a column of texts")
