"""Files of rows: comma- or tab-separated, JSON, JSON lines, Parquet.  One reader for prompts and captions."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepdistill.conditions import list_first
from stepdistill.errors import UserError, reading
from stepdistill.plain_files import read_bytes, regular

TEXT_COLUMNS = ("text", "prompt", "caption", "prompts", "captions")
"""Where texts are, by the names that people give the column, in this order."""
ROW_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet")


@dataclass(frozen=True)
class Rows:
    """A file of rows: the names of its columns, and how one is read, a value a row (None where a row has none)."""

    columns: list[str]
    column: Callable[[str], list[Any]]


def read_text(path: Path, remedy: str = "save it as UTF-8 text") -> str:
    """A UTF-8 text file; a byte order mark is passed over.

    Raises:
        UserError: no such file, not readable, or in another encoding.
    """
    with reading(path, remedy, "not a readable text file"):
        raw = read_bytes(path)
        if raw[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in raw[:1000]:
            raise ValueError("it is UTF-16, or no text")
        return raw.decode("utf-8-sig")


def split_lines(text: str) -> list[str]:
    """The lines of a text, by line feeds and carriage returns alone: other separators are parts of a line."""
    return re.split(r"\r\n|\r|\n", text)


def read_rows(path: Path) -> Rows:
    """The rows of a file, by its suffix.

    Raises:
        UserError: not readable, or not what its suffix says.
    """
    match path.suffix.lower():
        case ".csv" | ".tsv":
            return _read_table(path)
        case ".parquet":
            return _read_parquet(path)
        case ".json":
            return _read_json(path)
        case _:
            return _rows_of_objects(_json_lines(path, read_text(path)), path)


def find_text_columns(columns: Iterable[str]) -> list[str]:
    """The columns with a usual name of columns of texts, in the order of :data:`TEXT_COLUMNS`."""
    columns = list(columns)
    return [column for name in TEXT_COLUMNS for column in columns if column.lower() == name]


def choose_column(columns: Iterable[str], column: str | None, where: str, key: str) -> tuple[str, str | None]:
    """The column of texts, and a note where several columns could be meant.

    Args:
        column: as the config says; None: the first of :data:`TEXT_COLUMNS` that is there, in any case.
        key: the config's, for errors.

    Raises:
        UserError: there is none.
    """
    columns = list(columns)
    if column is not None:
        if column not in columns:
            raise UserError(f"{where}: no column {column!r}; it has {', '.join(columns) or 'none'}")
        return column, None
    usual = find_text_columns(columns)
    if not usual:
        raise UserError(
            f"{where}: no column is called {', '.join(TEXT_COLUMNS[:3])}; it has {list_first(columns, 8) or 'none'}: "
            f"name one with {key}"
        )
    note = f"{where}: texts are read from column {usual[0]!r}, not {list_first(usual[1:])}; {key} names another"
    return usual[0], note if len(usual) > 1 else None


def _read_table(path: Path) -> Rows:
    """Comma-, semicolon- or tab-separated, the first line names the columns."""
    text = read_text(path)
    header = next((line for line in split_lines(text) if line.strip()), "")
    delimiter = "\t" if path.suffix.lower() == ".tsv" or ("\t" in header and "," not in header) else ","
    if delimiter == "," and ";" in header and "," not in header:
        delimiter = ";"
    csv.field_size_limit(2**31 - 1)
    with reading(path, "write it with a header, quote what holds separators, and double the quotes inside"):
        reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True, restkey="")
        columns = [name.strip() for name in reader.fieldnames or []]
        reader.fieldnames = columns
        if not columns or len(set(columns)) < len(columns) or "" in columns:
            raise UserError(f"{path}: its first line must name the columns, each once; it is {header[:80]!r}")
        rows = []
        for row in reader:
            if "" in row:
                raise UserError(
                    f"{path}: line {reader.line_num} has more fields than the header's {len(columns)}; quote texts "
                    f"that hold {delimiter!r}"
                )
            rows.append(row)
    return Rows(columns, lambda column: [row[column] for row in rows])


def _json_lines(path: Path, text: str) -> list[Any]:
    values = []
    for number, line in enumerate(split_lines(text), 1):
        if line.strip():
            with reading(f"{path}: line {number}", "write one JSON value a line", "not JSON"):
                values.append(json.loads(line))
    return values


def _read_json(path: Path) -> Rows:
    """A list of texts or of objects; an object of columns; an object that has such a list under one of its keys."""
    text = read_text(path)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return _rows_of_objects(_json_lines(path, text), path)  # JSON lines by another name
    if isinstance(content, dict):
        lists = {key: value for key, value in content.items() if isinstance(value, list)}
        usual = [key for key in lists if key.lower() in (*TEXT_COLUMNS, "annotations", "data", "rows")]
        if len(usual) != 1:
            raise UserError(
                f"{path}: a JSON object without one list of texts or rows under text, prompts, captions, annotations "
                f"or data (its keys are {list_first(content, 8)}); write a list"
            )
        content = lists[usual[0]]
    return _rows_of_objects(content, path)


def _rows_of_objects(values: Any, path: Path) -> Rows:
    """Rows of JSON: objects, or texts, which are then in a column ``text``."""
    values = values if isinstance(values, list) else [values]
    if all(isinstance(value, str) for value in values):
        return Rows(["text"] if values else [], lambda _: values)
    columns: dict[str, None] = {}
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise UserError(f"{path}: row {number} is a {type(value).__name__}; rows are objects, or all of them texts")
        columns |= dict.fromkeys(value)
    return Rows(list(columns), lambda column: [value.get(column) for value in values])


def _read_parquet(path: Path) -> Rows:
    try:
        import pyarrow.parquet as parquet
    except ImportError:
        raise UserError(f"{path}: reading Parquet needs the package pyarrow: pip install pyarrow") from None
    with reading(path, "write the file again", "not a readable Parquet file"):
        file = parquet.ParquetFile(regular(path))
        columns = list(file.schema_arrow.names)

    def column(name: str) -> list[Any]:
        with reading(path, "write the file again", "not a readable Parquet file"):
            return file.read([name]).column(name).to_pylist()

    return Rows(columns, column)
