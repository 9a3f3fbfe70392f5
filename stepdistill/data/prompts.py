"""Prompts from the files and folders that people have them in, by their kind; a file of no known kind is refused."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from stepdistill import assets
from stepdistill.conditions import Conditions, as_caption, quote_line
from stepdistill.errors import UserError

from .columns import is_saved, read_texts
from .folders import read_folder
from .rows import ROW_SUFFIXES, choose_column, read_rows, read_text, split_lines

LINE_SUFFIXES = ("", ".txt", ".text", ".lst", ".prompt", ".prompts")
"""Of files with one prompt a line."""


def read_prompts(
    path: str | Path,
    key: str = "data.prompts",
    column: str | None = None,
    column_key: str = "data.prompt_column",
    notes: list[str] | None = None,
) -> list[str]:
    """The prompts of a file or asset, by its suffix, or of a folder.

    ``.txt``: one a line.  ``.csv``, ``.tsv``, ``.jsonl``, ``.json``, ``.parquet``: a column.  A folder: a dataset's (of
    ``save_to_disk``), or pictures with captions.  Empty ones are passed over.

    Args:
        key, column_key: the config's, for errors.
        column: of the texts; None: the first of the usual names that is there.
        notes: gets a line on each thing that a user should know of the file.

    Raises:
        UserError: not there, not readable, of another kind, or without a prompt.
    """
    file, notes = Path(assets.resolve(str(path))), [] if notes is None else notes
    suffix = file.suffix.lower()
    if not file.exists():
        raise UserError(f"{path}: no such file; set {key} to a text file, one prompt a line")
    texts: Sequence[str | None]
    if file.is_dir():
        texts = _read_folder(file, key, column, column_key, notes)
    elif suffix in ROW_SUFFIXES:
        texts = _read_rows(file, column, column_key, notes)
    elif suffix in LINE_SUFFIXES:
        if column is not None:
            raise UserError(f"{column_key} = {column}: {path} has lines, no columns; remove the key")
        texts = _read_lines(file)
    else:
        raise UserError(
            f"{key} = {path}: files of {suffix} are not read; write one prompt a line into a .txt file, or a column "
            f"into one of {', '.join(ROW_SUFFIXES)}"
        )
    return drop_empty(texts, str(path), notes, "write one a line" if suffix in LINE_SUFFIXES else "name another column")


def drop_empty(
    texts: Sequence[str | None], source: str, notes: list[str], remedy: str = "name another column"
) -> list[str]:
    """The texts that are not empty; the others are counted in ``notes``.

    Raises:
        UserError: there is none.
    """
    prompts = [text for text in texts if text]
    if not prompts:
        raise UserError(f"{source}: no prompts in it; {remedy}")
    if len(prompts) < len(texts):
        notes.append(f"{len(texts) - len(prompts):,} of {len(texts):,} rows are empty and are passed over")
    return prompts


def content_notes(prompts: Iterable[str]) -> list[str]:
    """What a user should know of prompts as they are: those that look like comments, and repeated ones."""
    prompts, notes = list(prompts), []
    comments = [prompt for prompt in prompts if prompt.startswith("#")]
    if comments:
        notes.append(
            f"{len(comments):,} begin with '#' and are prompts like all others, such as {quote_line(comments[0])}"
        )
    repeated = len(prompts) - len(set(prompts))
    if repeated:
        notes.append(f"{repeated:,} are repeated")
    return notes


def _read_lines(file: Path) -> list[str]:
    lines = [line.strip() for line in split_lines(read_text(file, "save it as UTF-8, one prompt a line"))]
    lines = [line for line in lines if line]
    if lines and _is_object(lines[0]):
        raise UserError(f"{file}: its lines are JSON; call it {file.stem}.jsonl, and its column is read")
    return lines


def _is_object(line: str) -> bool:
    try:
        return line.startswith("{") and isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_rows(file: Path, column: str | None, column_key: str, notes: list[str]) -> list[str | None]:
    rows = read_rows(file)
    name, note = choose_column(rows.columns, column, str(file), column_key)
    notes += [note] if note else []
    return [as_caption(value, f"{file}: row {number}") for number, value in enumerate(rows.column(name), 1)]


def _read_folder(folder: Path, key: str, column: str | None, column_key: str, notes: list[str]) -> list[str | None]:
    """A dataset's column, or the captions of pictures."""
    if is_saved(folder):
        return read_texts(str(folder), column, "train", None, column_key, notes)
    images = read_folder(folder, None, conditions=Conditions("prompt"), column=column, key=key)
    notes += images.notes
    return images.captions
