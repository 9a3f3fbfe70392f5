"""A self-contained HTML page of sections and blocks: it holds everything that it shows and fetches nothing.

The templates in the folder next to this file write the HTML; everything else only says what a page shows.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, FileSystemLoader

from stepdistill import files
from stepdistill.errors import UserError, first_line, reading

GENERATOR = '<meta name="generator" content="stepdistill">'
"""What says that a file is a page of stepdistill's."""
TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)


@dataclass(frozen=True)
class Table:
    """Rows of cells, the first one is the header where ``header`` is true; ``style`` is ``wide`` or ``facts``."""

    rows: list[list[Any]]
    header: bool = True
    style: str = "wide"
    kind: ClassVar[str] = "table"


@dataclass(frozen=True)
class Note:
    """A small line of text."""

    text: str
    kind: ClassVar[str] = "note"


@dataclass(frozen=True)
class Picture:
    """A PNG's bytes, what it shows for readers who do not see it, and a caption."""

    data: bytes
    text: str
    caption: str = ""
    kind: ClassVar[str] = "picture"

    @property
    def base64(self) -> str:
        return base64.b64encode(self.data).decode()


@dataclass(frozen=True)
class Plot:
    """A figure as an ``<svg>`` element; "" where there is nothing to draw, and the caption says why."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Plots:
    """Figures in as many columns as the page has room for."""

    plots: list[Plot]
    kind: ClassVar[str] = "plots"


@dataclass(frozen=True)
class Details:
    """Text that is folded away under its summary."""

    summary: str
    text: str
    kind: ClassVar[str] = "details"


Block = Table | Note | Picture | Plots | Details


@dataclass(frozen=True)
class Section:
    """A heading and what stands under it."""

    title: str
    blocks: list[Block]


def write_page(path: Path, name: str, sections: list[Section]) -> Path:
    """Write a page called ``name``.

    Raises:
        UserError: it cannot be written, or another program's file is in its place.
    """
    check_page(path)
    page = TEMPLATES.get_template("page.html").render(name=name, sections=sections, generator=GENERATOR)
    files.write_text(path, page.lstrip())
    return path


def check_page(path: Path) -> None:
    """Refuse to write a page over a file of something else.

    Raises:
        UserError: it is one, or cannot be read.
    """
    if not path.is_file():
        return
    with reading(path, "name another place for the page"):
        text = path.read_text(encoding="utf-8", errors="replace")
    if GENERATOR not in text:
        raise UserError(f"{path}: is no page of stepdistill's, so it is not written over; name another place for it")


def note_missing(what: str) -> Note:
    """A line that says what the page would show if it existed."""
    return Note(f"Not there: {what}.")


def build_or_note(what: str, build: Callable[[], list[Block]]) -> list[Block]:
    """The blocks that ``build`` gives; where a file of the run is not what it should be, a note that says so.

    Raises:
        UserError: ``build`` raised one.
    """
    try:
        return build()
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes of tables and figures
        return [Note(f"{what} cannot be shown: {first_line(error)}.")]
