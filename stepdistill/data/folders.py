"""Folders of pictures: which files count, and what each picture is of.

Class labels come from a folder for each class, or from a column of labels in ``metadata.jsonl``, ``.csv`` or
``.parquet`` (the "imagefolder" convention: ``file_name`` and more); captions from such a column, or from ``NAME.txt``
beside each picture.  Folders of classes whose names are whole numbers are labelled by them; other names count in sorted
order, and must be as many as the teacher's classes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from stepdistill.conditions import NONE, Captions, Conditions, as_caption, labels_of_names, listed
from stepdistill.errors import UserError, first_line

from .images import ImageSet
from .pictures import IMAGE_SUFFIXES, UnreadablePicture, check_kind, fit, open_header, open_picture, upright_size
from .rows import choose_column, read_rows, read_text, text_columns

HIDDEN = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
"""Folders that systems leave among pictures, besides those that begin with a dot."""
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
FILE_NAME = "file_name"


@dataclass
class Listing:
    """What lies in a folder, links followed.

    Attributes:
        files: the pictures, sorted.
        folders: the folders right in it, those without a picture too.
        metadata: the files that say more of the pictures beside and below them.
        hidden: what was passed over as hidden or left by a system.
        unread: suffixes of pictures that are not read, with their numbers.
    """

    root: Path
    files: list[Path] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    unread: Counter = field(default_factory=Counter)

    @property
    def notes(self) -> list[str]:
        """A line on each kind of thing that was passed over."""
        notes = [f"passed over: {listed(self.hidden)}"] if self.hidden else []
        if self.unread:
            kinds = ", ".join(f"{count} of {suffix}" for suffix, count in sorted(self.unread.items()))
            notes.append(f"pictures that are not read: {kinds} ({', '.join(sorted(IMAGE_SUFFIXES))} are)")
        return notes


def list_pictures(root: str | Path, key: str) -> Listing:
    """Every picture in a folder and below, hidden ones aside.

    Args:
        key: the config's, for errors.

    Raises:
        UserError: no such folder, no picture in it, a folder that cannot be read, a link to nothing or back to a folder
            that it lies in.
    """
    listing = Listing(Path(root))
    if not listing.root.is_dir():
        raise UserError(f"{root}: no such folder; set {key} to a folder of images")
    Image.init()
    _walk(listing.root, listing, ())
    if not listing.files:
        others = f", and {listing.notes[-1]}" if listing.unread else ""
        raise UserError(f"{root}: no images in it ({', '.join(sorted(IMAGE_SUFFIXES))} are read){others}")
    listing.files.sort()
    return listing


def _walk(folder: Path, listing: Listing, above: tuple[tuple[int, int], ...]) -> None:
    try:
        place = folder.stat()
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be read ({first_line(error)}); change its rights") from None
    if (place.st_dev, place.st_ino) in above:
        raise UserError(f"{folder}: a link back to a folder that it lies in; remove it")
    above = (*above, (place.st_dev, place.st_ino))
    for entry in entries:
        path, suffix = folder / entry.name, Path(entry.name).suffix.lower()
        hidden = entry.name.startswith(".") or entry.name in HIDDEN
        kind = _kind(path)
        if hidden:
            if kind == "folder" or suffix in IMAGE_SUFFIXES:
                listing.hidden.append(str(path.relative_to(listing.root)))
        elif kind == "nothing":
            raise UserError(f"{path}: a link to nothing; mend or remove it")
        elif kind == "folder":
            if folder == listing.root:
                listing.folders.append(entry.name)
            _walk(path, listing, above)
        elif kind == "file" and entry.name in METADATA:
            listing.metadata.append(path)
        elif kind == "file" and suffix in IMAGE_SUFFIXES:
            listing.files.append(path)
        elif Image.registered_extensions().get(suffix) in Image.OPEN:
            listing.unread[suffix] += 1


def _kind(path: Path) -> Literal["folder", "file", "nothing", "other"]:
    """What a name is of, links followed."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "nothing"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "nothing"
        raise UserError(f"{path}: cannot be looked at ({first_line(error)}); change its rights") from None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"


def read_folder(
    path: str | Path,
    shape: tuple[int, int, int] | None,
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
        treat: in place of the library's own crop and resize: gives uint8 (H, W, C) of ``shape``.
        column: of captions or labels in the folder's metadata; by default the usual names.
        key: the config's section, for errors.
        max_unreadable: the share of the pictures that may be unreadable.

    Raises:
        UserError: pictures that are not there, not readable, of another size, or without label or caption.
    """
    listing = list_pictures(path, f"{key}.folder")
    files, notes, names, labels = listing.files, listing.notes, None, None
    if conditions.kind == "prompt":
        labels = _captions(listing, column, key, notes)
    elif conditions.kind == "label":
        labels, names = _labels(listing, column, key)

    def read(index: int) -> np.ndarray:
        image = open_picture(files[index], str(files[index]))
        return fit(image, shape, resize, str(files[index]), background) if treat is None else treat(image)

    unreadable = {}
    for index, file in enumerate(files if shape is not None else []):  # headers only: there may be millions
        try:
            with open_header(file, str(file)) as image:
                if treat is None:
                    check_kind(image, upright_size(image), shape, resize, str(file))
        except UnreadablePicture as error:
            unreadable[index] = str(error)
    stats = [(str(p.relative_to(listing.root)), p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    fingerprint = hashlib.sha256(repr((stats, background, shape, resize)).encode()).hexdigest()
    images = ImageSet(str(path), read, len(files), labels, fingerprint, names, "", notes, max_unreadable, unreadable)
    images.check_readable()
    return images


# -- class labels ------------------------------------------------------------------------------------------


def _labels(listing: Listing, column: str | None, key: str) -> tuple[list, dict[str, int] | None]:
    """The class label, or name, of each picture, and the labels of the names."""
    if listing.metadata or column is not None:
        found = _of_metadata(listing, column or "label", f"{key}.label_column", column is not None)
        if found is not None:
            return [_one_label(values, file) for values, file in zip(found, listing.files, strict=True)], None
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
            f"{key}: {source}: {listed(loose)} lie beside the folders of classes; move every picture into the folder "
            "of its class"
        )
    if set(map(str.lower, listing.folders)) <= SPLITS or all(len(parts) > 2 for parts in inside):
        raise UserError(
            f"{key}: {source}: its folders ({listed(listing.folders)}) are none of classes, these lie deeper; name one "
            f"of them, such as {listing.root / listing.folders[0]}"
        )
    return [parts[0] for parts in inside], labels_of_names(listing.folders, f"{key}: {source}")


def _one_label(values: list, file: Path) -> int | str:
    """A picture's label by its metadata."""
    stated = {value for value in values if value is not None}
    if len(stated) != 1 or not isinstance(label := stated.pop(), int | str):
        raise UserError(
            f"{file}: its metadata must give it one label, a number or a class name, not {listed(values) or 'none'}"
        )
    return label


# -- captions ----------------------------------------------------------------------------------------------


def _captions(listing: Listing, column: str | None, key: str, notes: list[str]) -> list[str]:
    """The caption of each picture: of the metadata, where there is such a column, or of the text files beside."""
    caption_key = f"{key}.caption_column"
    if listing.metadata or column is not None:
        found = _of_metadata(listing, column, caption_key, column is not None, notes)
        if found is not None:
            return _one_each(
                listing, [_merged(values, file) for values, file in zip(found, listing.files, strict=True)]
            )
    texts = [file.with_suffix(".txt") for file in listing.files]
    if not any(text.exists() for text in texts):
        raise UserError(
            f"{key}: {listing.root} has no captions, which this teacher's images need; write NAME.txt beside each "
            "picture, or metadata.jsonl with file_name and text"
        )
    captions = [read_text(text).strip() if text.exists() else None for text in texts]
    return _one_each(listing, captions)


def _merged(values: list, file: Path) -> str | None:
    """What several rows of metadata say of one picture."""
    captions = [as_caption(value, str(file)) for value in values]
    each = [text for caption in captions if caption for text in getattr(caption, "every", (caption,))]
    return Captions(each) if len(each) > 1 else each[0] if each else None


def _one_each(listing: Listing, captions: list[str | None]) -> list[str]:
    without = [str(file) for file, caption in zip(listing.files, captions, strict=True) if caption is None]
    if without:
        raise UserError(
            f"{len(without):,} of {len(captions):,} pictures have no caption: {listed(without)}; write one for each, "
            "or move these away"
        )
    return captions


# -- metadata ----------------------------------------------------------------------------------------------


def _of_metadata(
    listing: Listing, column: str | None, key: str, required: bool, notes: list[str] | None = None
) -> list[list] | None:
    """What the metadata says of each picture in a column, a value a row; None where no file has the column.

    Args:
        column: None: the first of the usual names of texts.
        required: whether a file without the column is an error.
    """
    if not listing.metadata:
        raise UserError(f"{key} = {column}: {listing.root} has no {METADATA[0]} or {METADATA[1]} to read it from")
    values: dict[Path, list] = {}
    for file in listing.metadata:
        twins = [other for other in listing.metadata if other.parent == file.parent]
        if len(twins) > 1:
            raise UserError(f"{file.parent}: {twins[0].name} and {twins[1].name}; keep one of them")
        rows = read_rows(file)
        if FILE_NAME not in rows.columns:
            raise UserError(f"{file}: no column {FILE_NAME!r}; it has {listed(rows.columns, 8) or 'none'}")
        columns = [name for name in rows.columns if name != FILE_NAME]
        if not required and not (text_columns(columns) if column is None else column in columns):
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
        raise UserError(f"{listing.metadata[0]}: {len(gone):,} of its pictures are not there: {listed(gone)}")
    return [values.get(Path(os.path.normpath(file)), []) for file in listing.files]
