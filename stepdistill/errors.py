"""The exception for what a user can correct, and how other libraries' errors become it."""

from __future__ import annotations

import contextlib
import errno
import traceback
from collections.abc import Iterator
from pathlib import Path


class UserError(Exception):
    """Something that a user provided is wrong: a config, a file, a teacher, a folder.

    The message is one line that names the thing, what is wrong with it, and the remedy.  The command
    line prints it without a traceback and exits with code 2.
    """


def first_line(error: BaseException, limit: int = 200) -> str:
    """The first line of an exception's message, at most ``limit`` characters; its type's name where it has none.

    An :class:`OSError` gives the system's own words without its number and path.
    """
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, KeyError):
        return f"{error.args[0] if error.args else 'a key'} is missing"[:limit]
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    line = next((line for line in lines if line), "")
    if not line:
        return type(error).__name__
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def show_value(value: object, limit: int = 80) -> str:
    """A user's value as errors show it: its ``repr``, cut where it is long."""
    try:
        text = " ".join(repr(value).splitlines())
    except ValueError:  # an integer of thousands of digits
        text = f"a {type(value).__name__} of very many digits"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def printable(text: str) -> str:
    """``text`` in one line; characters that would steer a terminal are written as escapes."""
    text = " ".join(text.splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


@contextlib.contextmanager
def reading(what: str | Path, remedy: str, problem: str = "cannot be read") -> Iterator[None]:
    """Whatever reading a user's file raises becomes one line: ``WHAT: PROBLEM (reason); REMEDY``.

    Libraries raise many kinds for damaged files (and a file may say that it needs more memory than there is), so every
    :class:`Exception` is caught: put nothing into the block but the reading and the first checks of what was read.
    A :class:`UserError` passes through.

    Args:
        what: the config key and its value, or the path.

    Raises:
        UserError: anything was raised inside.
    """
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{what}: no such file; {remedy}") from None
    except Exception as error:
        raise UserError(f"{what}: {problem} ({first_line(error)}); {remedy}") from None


def raised_at(error: BaseException) -> str:
    """``file.py:12``: where an exception was raised, in the last code outside of installed libraries."""
    every = traceback.extract_tb(error.__traceback__)
    frames = [frame for frame in every if "site-packages" not in frame.filename] or list(every)
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "no file"


def describe_value(value: object) -> str:
    """What a value is, in errors: ``a dict``, or a tensor's dtype and shape."""
    shape, dtype = getattr(value, "shape", None), getattr(value, "dtype", None)
    return f"a {type(value).__name__}" if shape is None else f"{dtype} of shape {tuple(shape)}"


@contextlib.contextmanager
def running(what: str, remedy: str = "correct it, or name another") -> Iterator[None]:
    """Whatever a user's code raises, ``SystemExit`` included, becomes one line that says where it was raised.

    Raises:
        UserError: anything was raised inside.
    """
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{what} failed at {raised_at(error)} ({reason}); {remedy}") from None


def is_full(error: BaseException) -> bool:
    """Whether an error says that the disk, or the user's share of it, is full."""
    code = getattr(error, "errno", None)
    return code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or any(
        text in str(error) for text in ("No space left", "os error 28", "Disk quota", "os error 122")
    )


@contextlib.contextmanager
def writing(what: str | Path, remedy: str = "choose another place, or its rights") -> Iterator[None]:
    """What writing raises (disk full, read-only, no right, a failing disk) becomes one line.

    Raises:
        UserError: an :class:`OSError`, or a library's error for one, was raised inside.
    """
    from safetensors import SafetensorError

    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError | SafetensorError) and "(os error " not in str(error):  # as Rust writes it
            raise
        remedy = "free some space and try again" if is_full(error) else remedy
        raise UserError(f"{what}: cannot be written ({first_line(error)}); {remedy}") from None
