"""Folders of pictures, with what each picture is of.

Class labels come from a folder for each class, or from a column of labels in ``metadata.jsonl``, ``.csv`` or
``.parquet`` (the "imagefolder" convention: ``file_name`` and more); captions from such a column, or from ``NAME.txt``
next to each picture.  Folders of classes whose names are whole numbers are labelled by them; other names count in
sorted order, and must be as many as the teacher's classes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stepdistill.conditions import NONE, Captions, Conditions, as_caption, list_first, number_classes
from stepdistill.errors import UserError

from .images import ImageSet, Label
from .listing import METADATA, Listing, list_pictures
from .pictures import Shape, UnreadablePicture, check_kind, fit, open_header, open_picture, size_upright
from .rows import choose_column, find_text_columns, read_rows, read_text

SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}
FILE_NAME = "file_name"


def read_folder(
    path: str | Path,
    shape: Shape | None,
    resize: bool = False,
    treat: Callable[[Image.Image], np.ndarray] | None = None,
    background: str = "white",
    conditions: Conditions = NONE,
    column: str | None = None,
    key: str = "data.images",
    max_unreadable: float = 0.0,
) -> ImageSet:
    """A folder of images, with what a teacher of ``conditions`` needs to know of each.

    Args:
        shape: (C, H, W) of the images; None where they are not read, for their captions alone.
        treat: in place of the library's crop and resize: gives uint8 (H, W, C) of ``shape``.
        column: of captions or labels in the folder's metadata; by default the usual names.
        key: the config's section, for errors.
        max_unreadable: the share of the pictures that may be unreadable.

    Raises:
        UserError: pictures that are not there, not readable, of another size, or without label or caption.
    """
    listing = list_pictures(path, f"{key}.folder")
    files, notes, names = listing.files, listing.notes, None
    labels: Sequence[Label] | None = None
    if conditions.kind == "prompt":
        labels = _read_captions(listing, column, key, notes)
    elif conditions.kind == "label":
        labels, names = _read_labels(listing, column, key)

    def read(index: int) -> np.ndarray:
        image = open_picture(files[index], str(files[index]))
        return fit(image, shape, resize, str(files[index]), background) if treat is None else treat(image)

    unreadable = {} if shape is None else _check_headers(files, shape, resize, treat is None)
    stats = [(str(p.relative_to(listing.root)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    fingerprint = hashlib.sha256(repr((stats, background, shape, resize)).encode()).hexdigest()
    images = ImageSet(str(path), read, len(files), labels, fingerprint, names, "", notes, max_unreadable, unreadable)
    images.check_readable()
    return images


def _check_headers(files: list[Path], shape: Shape, resize: bool, as_they_are: bool) -> dict[int, str]:
    """Why a picture cannot be read, by its index, as far as headers show it: there may be millions of pictures.

    Args:
        as_they_are: whether kind and size have to be those of ``shape``.

    Raises:
        UserError: they are not.
    """
    unreadable = {}
    for index, file in enumerate(files):
        try:
            with open_header(file, str(file)) as image:
                if as_they_are:
                    check_kind(image, size_upright(image), shape, resize, str(file))
        except UnreadablePicture as error:
            unreadable[index] = str(error)
    return unreadable


# -- class labels ------------------------------------------------------------------------------------------


def _read_labels(listing: Listing, column: str | None, key: str) -> tuple[Sequence[Label], dict[str, int] | None]:
    """The class label or name of each picture, and the label of each name."""
    if listing.metadata or column is not None:
        rows = _read_metadata(listing, column or "label", f"{key}.label_column", column is not None)
        if rows is not None:
            return [_require_label(values, file) for values, file in zip(rows, listing.files, strict=True)], None
    source = str(listing.root)
    inside = [file.relative_to(listing.root).parts for file in listing.files]
    loose = [parts[0] for parts in inside if len(parts) == 1]
    if len(loose) == len(inside):
        raise UserError(
            f"{key}: {source} has no labels, which this teacher's images need; put the pictures into a folder for each "
            "class"
        )
    if loose:
        raise UserError(
            f"{key}: {source}: {list_first(loose)} lie next to the folders of classes; move every picture into the "
            "folder of its class"
        )
    if set(map(str.lower, listing.folders)) <= SPLITS or all(len(parts) > 2 for parts in inside):
        raise UserError(
            f"{key}: {source}: its folders ({list_first(listing.folders)}) are none of classes, these lie deeper; name "
            f"one of them, such as {listing.root / listing.folders[0]}"
        )
    return [parts[0] for parts in inside], number_classes(listing.folders, f"{key}: {source}")


def _require_label(values: list[Any], file: Path) -> int | str:
    """A picture's label by its metadata."""
    stated = {value for value in values if value is not None}
    if len(stated) != 1 or not isinstance(label := stated.pop(), int | str):
        raise UserError(
            f"{file}: its metadata must give it one label, a number or a class name, not {list_first(values) or 'none'}"
        )
    return label


# -- captions ----------------------------------------------------------------------------------------------


def _read_captions(listing: Listing, column: str | None, key: str, notes: list[str]) -> list[str]:
    """The caption of each picture: from a column of the metadata, else from the text files next to the pictures."""
    caption_key = f"{key}.caption_column"
    if listing.metadata or column is not None:
        rows = _read_metadata(listing, column, caption_key, column is not None, notes)
        if rows is not None:
            pairs = zip(rows, listing.files, strict=True)
            return _require_captions(listing, [_merge_captions(values, file) for values, file in pairs])
    texts = [file.with_suffix(".txt") for file in listing.files]
    if not any(text.exists() for text in texts):
        raise UserError(
            f"{key}: {listing.root} has no captions, which this teacher's images need; write NAME.txt next to each "
            "picture, or metadata.jsonl with file_name and text"
        )
    captions = [read_text(text).strip() if text.exists() else None for text in texts]
    return _require_captions(listing, captions)


def _merge_captions(values: list[Any], file: Path) -> str | None:
    """One caption of all that several rows of metadata say of a picture; None: nothing."""
    captions = [as_caption(value, str(file)) for value in values]
    texts = [text for caption in captions if caption for text in getattr(caption, "every", (caption,))]
    if len(texts) > 1:
        return Captions(texts)
    return texts[0] if texts else None


def _require_captions(listing: Listing, captions: list[str | None]) -> list[str]:
    without = [str(file) for file, caption in zip(listing.files, captions, strict=True) if caption is None]
    if without:
        raise UserError(
            f"{len(without):,} of {len(captions):,} pictures have no caption: {list_first(without)}; write one for each"
            ", or move these away"
        )
    return [caption for caption in captions if caption is not None]


# -- metadata ----------------------------------------------------------------------------------------------


def _read_metadata(
    listing: Listing, column: str | None, key: str, required: bool, notes: list[str] | None = None
) -> list[list[Any]] | None:
    """The values of a column of metadata for each picture, one a row of it; None where no file has the column.

    Args:
        column: None: the first of the usual names of texts.
        required: whether a file without the column is an error.
    """
    if not listing.metadata:
        raise UserError(f"{key} = {column}: {listing.root} has no {METADATA[0]} or {METADATA[1]} to read it from")
    values: dict[Path, list[Any]] = {}
    for file in listing.metadata:
        twins = [other for other in listing.metadata if other.parent == file.parent]
        if len(twins) > 1:
            raise UserError(f"{file.parent}: {twins[0].name} and {twins[1].name}; keep one of them")
        rows = read_rows(file)
        if FILE_NAME not in rows.columns:
            raise UserError(f"{file}: no column {FILE_NAME!r}; it has {list_first(rows.columns, 8) or 'none'}")
        columns = [name for name in rows.columns if name != FILE_NAME]
        if not required and not (find_text_columns(columns) if column is None else column in columns):
            continue
        name, note = choose_column(columns, column, str(file), key)
        if note is not None and notes is not None:
            notes.append(note)
        for place, value in zip(rows.column(FILE_NAME), rows.column(name), strict=True):
            if isinstance(place, str):
                values.setdefault(Path(os.path.normpath(file.parent / place)), []).append(value)
    if not values:
        return None
    gone = [str(path) for path in values if not path.exists()]
    if gone:
        raise UserError(f"{listing.metadata[0]}: {len(gone):,} of its pictures are not there: {list_first(gone)}")
    return [values.get(Path(os.path.normpath(file)), []) for file in listing.files]
