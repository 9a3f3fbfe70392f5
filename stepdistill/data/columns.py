"""Columns of Hugging Face datasets: pictures in every form that they come in, labels, captions, prompts."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stepdistill.conditions import are_labels, as_caption, list_first, number_classes
from stepdistill.errors import UserError, first_line

from .images import ImageSet
from .pictures import Shape, UnreadablePicture, fit, open_picture
from .rows import choose_column


def open_dataset(name: str, split: str, revision: str | None = None) -> Any:
    """A Hugging Face dataset: a folder written by ``save_to_disk``, or a hub id.

    Raises:
        UserError: the package is missing, or the dataset cannot be loaded.
    """
    try:
        import datasets
    except ImportError:
        raise UserError("reading a Hugging Face dataset needs the 'datasets' package: pip install datasets") from None
    try:
        if is_saved(name):
            loaded = datasets.load_from_disk(name)
            return loaded[split] if isinstance(loaded, datasets.DatasetDict) else loaded
        return datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # the library raises many kinds; the user needs the name and the reason
        raise UserError(f"dataset {name!r} (split {split!r}) cannot be loaded: {first_line(error)}") from None


def is_saved(folder: str | Path) -> bool:
    """Whether a folder was written by a dataset's ``save_to_disk``."""
    return any((Path(folder) / marker).is_file() for marker in ("dataset_info.json", "dataset_dict.json"))


def _check_column(dataset: Any, column: str, name: str) -> None:
    if column not in dataset.column_names:
        raise UserError(f"dataset {name!r} has no column {column!r}; it has {', '.join(dataset.column_names)}")


def _read_column(dataset: Any, column: str, name: str) -> list[Any]:
    _check_column(dataset, column, name)
    return list(dataset[column])


def read_column(name: str, column: str, split: str = "train", revision: str | None = None) -> list[Any]:
    """One column of a Hugging Face dataset."""
    return _read_column(open_dataset(name, split, revision), column, name)


def read_texts(
    name: str, column: str | None, split: str, revision: str | None, key: str, notes: list[str] | None = None
) -> list[str | None]:
    """A column of texts, or of lists of them, a value a row.

    Args:
        column: None: the first of the usual names that is there; ``key`` is the config's, for errors.
        notes: gets a line where other columns could have been meant.
    """
    dataset = open_dataset(name, split, revision)
    where = f"dataset {name!r}"
    column, note = choose_column(dataset.column_names, column, where, key)
    if notes is not None and note is not None:
        notes.append(note)
    return [as_caption(value, f"{where}: column {column!r}: row {i}") for i, value in enumerate(dataset[column])]


def read_dataset(
    name: str,
    shape: Shape | None,
    split: str = "train",
    revision: str | None = None,
    image_column: str = "image",
    label_column: str | None = None,
    caption_column: str | None = None,
    resize: bool = False,
    background: str = "white",
    max_unreadable: float = 0.0,
) -> ImageSet:
    """Images of a Hugging Face dataset: a column of decoded or encoded pictures, their bytes, paths, or arrays.

    Args:
        shape: (C, H, W) of the images; None where they are not read, for their captions alone.
        label_column: integers, or names of classes.
        caption_column: texts, or lists of texts to draw from.
        max_unreadable: the share of the pictures that may be unreadable.

    Raises:
        UserError: the dataset or a column is not there, or a value is no label or caption.
    """
    dataset = open_dataset(name, split, revision)
    if len(dataset) == 0:
        raise UserError(f"dataset {name!r} (split {split!r}) is empty")
    labels, names = None, None
    if label_column is not None:
        labels, names = _read_labels(dataset, label_column, name)
    elif caption_column is not None:
        values = _read_column(dataset, caption_column, name)
        where = f"dataset {name!r}: column {caption_column!r}"
        labels = [as_caption(value, f"{where}: row {i}") for i, value in enumerate(values)]
    _check_column(dataset, image_column, name)
    pictures = _select_undecoded(dataset, image_column)

    def read(index: int) -> np.ndarray:
        where = f"{name}[{index}]"
        return fit(
            _open_value(pictures[index][image_column], where, image_column, Path(name)),
            shape,
            resize,
            where,
            background,
        )

    hint = f"set caption_column or label_column (the dataset's columns: {list_first(dataset.column_names, 8)})"
    fingerprint = f"{dataset._fingerprint} {image_column} {background} {shape} {resize}"
    images = ImageSet(name, read, len(dataset), labels, fingerprint, names, hint, (), max_unreadable)
    if shape is not None:
        images.try_reading(1)
    return images


def _read_labels(dataset: Any, column: str, name: str) -> tuple[list[Any], dict[str, int] | None]:
    """Class labels, or names of classes with their labels where the dataset states these; None: a row has none."""
    values = _read_column(dataset, column, name)
    for row, value in enumerate(values):
        if value is not None and not isinstance(value, int | str):
            raise UserError(
                f"dataset {name!r}: column {column!r}: row {row}: {type(value).__name__} {str(value)[:40]} is no "
                "label; labels are whole numbers or names of classes"
            )
    classes = getattr(dataset.features[column], "names", None)
    if not classes:
        return values, None
    if odd := [value for value in values if value is not None and value >= len(classes)]:
        raise UserError(f"dataset {name!r}: column {column!r}: label {odd[0]} has no name of its {len(classes)}")
    names = number_classes(classes, name) if are_labels(classes) else {c: label for label, c in enumerate(classes)}
    return [None if value is None or value < 0 else classes[value] for value in values], names


def _select_undecoded(dataset: Any, column: str) -> Any:
    """A dataset of the column of pictures alone, as encoded bytes: other columns are not read, nothing is decoded."""
    import datasets

    alone = dataset.select_columns([column])
    if isinstance(dataset.features[column], datasets.Image):
        alone = alone.cast_column(column, datasets.Image(decode=False))
    return alone


def _open_value(value: Any, where: str, column: str, folder: Path) -> Image.Image:
    """The picture of a value: encoded bytes, a path (relative to the dataset's folder or to the current one), a
    dictionary with one of them, a PIL image, or uint8 pixels.

    Raises:
        UnreadablePicture: it is none of these, or cannot be decoded.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray | memoryview):
        return open_picture(io.BytesIO(value), where)
    if isinstance(value, str) and "://" in value:  # inside an archive, or on the hub
        return _open_address(value, where, column)
    if isinstance(value, str) and value:
        place = folder / value if (folder / value).is_file() else Path(value)
        if not place.is_file():
            raise UnreadablePicture(f"{where}: column {column!r} holds no readable image (no file {value!r})")
        return open_picture(place, f"{where} ({place})")
    if isinstance(value, Image.Image):
        return value
    return _convert_array(value, where, column)


def _open_address(value: str, where: str, column: str) -> Image.Image:
    import datasets

    try:
        return datasets.Image().decode_example({"path": value, "bytes": None})
    except Exception as error:
        raise UnreadablePicture(
            f"{where}: column {column!r} holds no readable image ({first_line(error)}); replace it"
        ) from None


def _convert_array(value: Any, where: str, column: str) -> Image.Image:
    try:
        array = np.asarray(value)
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > 255:
            raise ValueError(f"{type(value).__name__} of {array.dtype}; pixels are whole numbers in 0..255")
        return Image.fromarray(
            array.astype(np.uint8).squeeze(-1) if array.shape[2:] == (1,) else array.astype(np.uint8)
        )
    except (ValueError, TypeError, OverflowError) as error:
        raise UnreadablePicture(
            f"{where}: column {column!r} holds no readable image ({first_line(error)}); name a column of pictures"
        ) from None
