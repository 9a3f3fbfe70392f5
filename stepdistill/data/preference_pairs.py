"""Preference pairs: of two pictures of one condition, which is preferred.  A folder, or a Hugging Face dataset."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, model_validator

from stepdistill.conditions import NONE, Conditions, list_first
from stepdistill.config import UserPath
from stepdistill.errors import UserError

from .columns import read_column, read_dataset
from .folders import read_folder
from .images import ImageSet, Label
from .listing import list_pictures
from .picture_settings import PictureSettings
from .pictures import Shape

DEFAULT_PROMPTS = "prompt"


class PreferenceSettings(PictureSettings):
    """Where the pairs come from.

    A folder holds ``winner`` and ``loser`` with pictures of equal names, each as ``data.images.folder`` is read: a
    caption ``NAME.txt`` next to each winner (or metadata.jsonl), or a sub-folder for each label.  A dataset has a
    column of each.
    """

    folder: UserPath | None = None
    dataset: UserPath | None = Field(None, description="a save_to_disk folder or a hub id")
    split: str = "train"
    revision: str | None = None
    winner_column: str = Field("winner", description="pictures; Pick-a-Pic: jpg_0")
    loser_column: str = Field("loser", description="pictures; Pick-a-Pic: jpg_1")
    prompt_column: str | None = Field(
        DEFAULT_PROMPTS, description="captions or labels; null for none; Pick-a-Pic: caption"
    )
    preference_column: str | None = Field(
        None,
        description="how much winner_column's picture is preferred: above 0.5 it is, below the other, 0.5 is a tie, "
        "left out; Pick-a-Pic: label_0",
    )

    @model_validator(mode="after")
    def _check_sources(self) -> PreferenceSettings:
        sources = [k for k in ("folder", "dataset") if getattr(self, k) is not None]
        if len(sources) != 1:
            raise ValueError(f"set exactly one of folder, dataset (set: {', '.join(sources) or 'none'})")
        if self.winner_column == self.loser_column:
            raise ValueError(f"winner_column and loser_column are both {self.winner_column!r}; name two columns")
        return self


@dataclass(frozen=True)
class PreferencePairs:
    """``order``: (picture of the winner, picture of the loser), as (which set, index), for each pair; ``labels`` the
    pairs' conditions (None without)."""

    sets: tuple[ImageSet, ImageSet]
    order: list[tuple[tuple[int, int], tuple[int, int]]]
    labels: list[Label] | None

    def __len__(self) -> int:
        return len(self.order)

    @property
    def lines(self) -> list[str]:
        """What a user should know of the pairs."""
        first, second = self.sets
        left_out = len(first) - len(self.order)
        ties = f", {left_out:,} are ties or without a condition" if left_out else ""
        lines = [f"pairs {first.source}: {len(self.order):,} of {len(first):,}{ties}", *first.notes]
        return [*lines, *(note for images in (first, second) for note in images.skipped_note)]


def read_preferences(settings: PreferenceSettings, shape: Shape, conditions: Conditions = NONE) -> PreferencePairs:
    """The pairs that the settings name, for pictures (C, H, W); ties, and pairs without a condition, are left out.

    Args:
        conditions: what the teacher takes, which the pairs must have.

    Raises:
        UserError: not there, pictures without a partner, another size, no condition that the teacher needs, or no pair
            that is not a tie.
    """
    if settings.folder is not None:
        return _read_folder(Path(settings.folder), shape, settings, conditions)
    return _read_dataset(str(settings.dataset), shape, settings, conditions)


def _read_dataset(name: str, shape: Shape, settings: PreferenceSettings, conditions: Conditions) -> PreferencePairs:
    def read(column: str, conditions: Conditions) -> ImageSet:
        return read_dataset(
            name,
            shape,
            settings.split,
            settings.revision,
            image_column=column,
            label_column=settings.prompt_column if conditions.kind == "label" else None,
            caption_column=settings.prompt_column if conditions.kind == "prompt" else None,
            resize=settings.resize,
            background=settings.background,
            max_unreadable=settings.max_unreadable,
        )

    first, second = read(settings.winner_column, conditions), read(settings.loser_column, NONE)
    first.hint = "set pso.pairs.prompt_column"
    first.try_reading()
    second.try_reading()
    first.prepare(conditions, "pso.pairs")
    wins = _read_wins(name, settings, len(first))
    usable = range(len(first)) if first.usable is None else first.usable
    decided = [i for i in usable if wins[i] != 0.5]
    if not decided:
        raise UserError(f"pso.pairs: {name} holds no pair that is not a tie")
    order = [((0, i), (1, i)) if wins[i] > 0.5 else ((1, i), (0, i)) for i in decided]
    labels = None if first.labels is None else [first.labels[i] for i in decided]
    return PreferencePairs((first, second), order, labels)


def _read_wins(name: str, settings: PreferenceSettings, count: int) -> list[float]:
    """How much the first picture of each pair is preferred."""
    if settings.preference_column is None:
        return [1.0] * count
    wins = read_column(name, settings.preference_column, settings.split, settings.revision)
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in wins):
        raise UserError(f"pso.pairs.preference_column = {settings.preference_column}: its values are no numbers")
    return wins


def _read_folder(root: Path, shape: Shape, settings: PreferenceSettings, conditions: Conditions) -> PreferencePairs:
    names = []
    for part in ("winner", "loser"):
        if not (root / part).is_dir():
            raise UserError(f"pso.pairs.folder = {root}: it has no folder '{part}'; pairs are winner/NAME, loser/NAME")
        files = list_pictures(root / part, "pso.pairs.folder").files
        names.append({str(p.relative_to(root / part)) for p in files})
    odd = sorted(names[0] ^ names[1])
    if odd:
        raise UserError(
            f"pso.pairs.folder = {root}: in one of winner and loser alone: {list_first(odd)}; pair or remove them"
        )

    def read(part: str, conditions: Conditions, column: str | None) -> ImageSet:
        return read_folder(
            root / part,
            shape,
            settings.resize,
            background=settings.background,
            conditions=conditions,
            column=column,
            key="pso.pairs",
            max_unreadable=settings.max_unreadable,
        )

    column = None if settings.prompt_column == DEFAULT_PROMPTS else settings.prompt_column
    first, second = read("winner", conditions, column), read("loser", NONE, None)
    first.try_reading()
    second.try_reading()
    first.prepare(conditions, "pso.pairs")
    return PreferencePairs((first, second), [((0, i), (1, i)) for i in range(len(first))], first.labels)
