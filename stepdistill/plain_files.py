"""Reading users' files of text and JSON: plain files only, of a size that such a file can have.

What is wrong is raised as :class:`ValueError` or :class:`OSError` in a few words; ``with errors.reading(...)`` around
the call makes the user's line of it.  Nothing here imports torch: a config that cannot be read is answered at once.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

MOST_TEXT = 64 * 2**20
"""Bytes of a text or JSON file that is read whole."""


def regular(path: str | Path) -> Path:
    """``path``, a plain file: reading a pipe or a device may never end.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a folder, pipe, socket or device.
    """
    path = Path(path)
    mode = path.stat().st_mode
    if stat.S_ISDIR(mode):
        raise ValueError("it is a folder, not a file")
    if not stat.S_ISREG(mode):
        raise ValueError("it is a pipe or a device, not a file")
    return path


def read_text(path: str | Path, most: int = MOST_TEXT) -> str:
    """A UTF-8 text file of at most ``most`` bytes, without a byte order mark.

    Raises:
        OSError: as :func:`regular`, or it cannot be read.
        ValueError: as :func:`regular`, larger, or not UTF-8.
    """
    raw = read_bytes(path, most)
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text, from byte {error.start} on") from None


def read_bytes(path: str | Path, most: int | None = None) -> bytes:
    """A file of at most ``most`` bytes, by default as many as there is memory for.

    Raises:
        OSError, ValueError: as :func:`regular`, or larger.
        MemoryError: larger than the memory.
    """
    path = regular(path)
    require_memory(path.stat().st_size if most is None else 0)
    with path.open("rb") as file:
        raw = file.read() if most is None else file.read(most + 1)
    if most is not None and len(raw) > most:
        raise ValueError(f"it is larger than {most:,} bytes")
    return raw


def read_json(path: str | Path, kind: type = dict) -> Any:
    """A JSON file that holds a ``kind``.

    Raises:
        OSError: as :func:`read_text`.
        ValueError: as :func:`read_text`, not JSON, or another kind of value.
    """
    value = parse_json(read_text(path))
    if not isinstance(value, kind):
        raise ValueError(f"it holds {_kind(type(value))}, not {_kind(kind)}")
    return value


def _kind(kind: type) -> str:
    words = {dict: "a mapping", list: "a list", str: "a text", type(None): "null", bool: "true or false"}
    return words.get(kind, "a number")


def parse_json(text: str) -> Any:
    """A JSON text's value.

    Raises:
        ValueError: not JSON, or lists in lists deeper than anyone writes them.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not valid JSON, line {error.lineno}: {error.msg}") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def memory_available() -> int | None:
    """Bytes of main memory that are free without swapping; None where the system does not say."""
    try:
        information = Path("/proc/meminfo").read_text(encoding="ascii")
        return 1024 * int(information.partition("MemAvailable:")[2].split()[0])
    except (OSError, ValueError, IndexError):
        return None


def require_memory(size: int) -> None:
    """Refuse to read more than fits.

    Raises:
        MemoryError: ``size`` bytes are more than the memory that is available.
    """
    available = memory_available()
    if available is not None and size > available:
        raise MemoryError(f"it needs {size / 2**30:,.1f} GiB of memory, {available / 2**30:,.1f} are available")
