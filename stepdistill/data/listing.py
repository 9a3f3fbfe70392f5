"""Which files of a folder are its pictures, and which say more of them."""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from PIL import Image

from stepdistill.conditions import list_first
from stepdistill.errors import UserError, first_line

from .pictures import IMAGE_SUFFIXES

HIDDEN = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
"""Folders that systems leave among pictures, besides those that begin with a dot."""
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")


@dataclass
class Listing:
    """The content of a folder, links followed.

    Attributes:
        files: the pictures, sorted.
        folders: the folders right in it, those without a picture too.
        metadata: the files that say more of the pictures next to and below them.
        hidden: pictures and folders that were passed over as hidden or left by a system.
        unread: suffixes of pictures that are not read, with their numbers.
    """

    root: Path
    files: list[Path] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    metadata: list[Path] = field(default_factory=list)
    hidden: list[str] = field(default_factory=list)
    unread: Counter[str] = field(default_factory=Counter)

    @property
    def notes(self) -> list[str]:
        """A line on each kind of thing that was passed over."""
        notes = [f"passed over: {list_first(self.hidden)}"] if self.hidden else []
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
            names = sorted(entry.name for entry in entries)
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be read ({first_line(error)}); change its rights") from None
    if (place.st_dev, place.st_ino) in above:
        raise UserError(f"{folder}: a link back to a folder that it lies in; remove it")
    above = (*above, (place.st_dev, place.st_ino))
    for name in names:
        path, suffix = folder / name, Path(name).suffix.lower()
        hidden = name.startswith(".") or name in HIDDEN
        kind = _kind(path)
        if hidden:
            if kind == "folder" or suffix in IMAGE_SUFFIXES:
                listing.hidden.append(str(path.relative_to(listing.root)))
        elif kind == "nothing":
            raise UserError(f"{path}: a link to nothing; mend or remove it")
        elif kind == "folder":
            if folder == listing.root:
                listing.folders.append(name)
            _walk(path, listing, above)
        elif kind == "file" and name in METADATA:
            listing.metadata.append(path)
        elif kind == "file" and suffix in IMAGE_SUFFIXES:
            listing.files.append(path)
        elif Image.registered_extensions().get(suffix) in Image.OPEN:
            listing.unread[suffix] += 1


def _kind(path: Path) -> Literal["folder", "file", "nothing", "other"]:
    """What stands under a path, links followed."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return "nothing"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "nothing"
        raise UserError(f"{path}: cannot be looked at ({first_line(error)}); change its rights") from None
    return "folder" if stat.S_ISDIR(mode) else "file" if stat.S_ISREG(mode) else "other"
