"""Real images and prompts as a config's sections name them."""

from __future__ import annotations

from stepdistill import assets
from stepdistill.conditions import NONE, Conditions
from stepdistill.errors import UserError
from stepdistill.settings import DataSettings, ImagesSettings, PromptColumnSettings

from .arrays import read_npz
from .columns import read_dataset, read_texts
from .folders import read_folder
from .images import ImageSet
from .pictures import Shape
from .prompts import drop_empty, read_prompts


def load_images(
    settings: ImagesSettings,
    shape: Shape | None,
    conditions: Conditions = NONE,
    key: str = "data.images",
) -> ImageSet:
    """The real images of a config, with what a teacher of ``conditions`` needs to know of each.

    Args:
        shape: (C, H, W) of the teacher's pictures; None where they are not read, for their captions alone.
        key: the config's section, for errors.

    Raises:
        UserError: they are not there, do not fit, or lack labels or captions that the teacher needs.
    """
    column = _condition_column(settings, conditions, key)
    if settings.folder is not None:
        images = read_folder(
            settings.folder,
            shape,
            settings.resize,
            background=settings.background,
            conditions=conditions,
            column=column,
            key=key,
            max_unreadable=settings.max_unreadable,
        )
    elif settings.npz is not None:
        if column is not None:
            raise UserError(f"{key}: an .npz has no columns, its array 'labels' is read; remove the key")
        images = read_npz(assets.resolve(settings.npz), shape, settings.resize, f"{key}.npz", settings.background)
    else:
        images = read_dataset(
            str(settings.dataset),  # one of the three is set
            shape,
            settings.split,
            settings.revision,
            settings.image_column,
            label_column=column if conditions.kind == "label" else None,
            caption_column=column if conditions.kind == "prompt" else None,
            resize=settings.resize,
            background=settings.background,
            max_unreadable=settings.max_unreadable,
        )
    if shape is not None and settings.npz is None:
        images.try_reading()
    images.prepare(conditions, key)
    return images


def _condition_column(settings: ImagesSettings, conditions: Conditions, key: str) -> str | None:
    """The column of what the teacher takes."""
    if conditions.kind == "none":
        return None
    column, other, needed = settings.label_column, settings.caption_column, "label"
    if conditions.kind == "prompt":
        column, other, needed = other, column, "caption"
    if other is not None:
        raise UserError(
            f"{key}: the column {other!r}: this teacher's images need {needed}s; name their column with "
            f"{key}.{needed}_column"
        )
    return column


def load_prompts(
    settings: DataSettings, notes: list[str] | None = None, images: ImageSet | None = None
) -> list[str] | None:
    """The prompts of a config's ``data``; None: it names none.

    Args:
        notes: gets a line on each thing that a user should know of them.
        images: the real images, where they are read already.
    """
    if settings.prompts_from_images and images is not None:
        return drop_empty(images.captions, "data.images", [] if notes is None else notes)
    captioned = settings.images if settings.prompts_from_images else None
    return read_named_prompts(settings.prompts, settings.prompt_dataset, settings.prompt_column, captioned, notes)


def read_named_prompts(
    file: str | None,
    dataset: PromptColumnSettings | None = None,
    column: str | None = None,
    images: ImagesSettings | None = None,
    notes: list[str] | None = None,
    section: str = "data.",
) -> list[str] | None:
    """The prompts that a config's keys name; None: none does.

    Args:
        file, column: ``prompts`` and ``prompt_column``.
        dataset: ``prompt_dataset``.
        images: whose captions the prompts are.
        notes: gets a line on each thing that a user should know of them.
        section: what the keys are called with, for errors.
    """
    notes = [] if notes is None else notes
    if dataset is not None:
        key = f"{section}prompt_dataset.column"
        texts = read_texts(dataset.name, dataset.column, dataset.split, dataset.revision, key, notes)
        return drop_empty(texts, f"dataset {dataset.name!r}", notes)
    if images is not None:
        captions = load_images(images, None, Conditions("prompt")).captions
        return drop_empty(captions, "data.images", notes)
    if file is None:
        return None
    return read_prompts(file, f"{section}prompts", column, f"{section}prompt_column", notes)
