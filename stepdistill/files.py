"""Files and folders that are whole or absent.

Everything is written next to its place under a temporary name and then renamed.  A reader therefore never sees half a
file, and a process that is killed leaves the old content and at most a temporary name, which the next writer of the
same place removes.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import itertools
import json
import os
import re
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import first_line, writing

if TYPE_CHECKING:
    from torch import Tensor

LOCK = ".lock"
TEMPORARY = ".tmp"
PREVIOUS = ".previous"
TEMPORARY_NAME = re.compile(r"\..*\.(\w+)-(\d+)-[0-9a-f]{8}\.tmp", re.DOTALL)
"""``.NAME.HOST-PID-RANDOM.tmp``."""
_writing: set[str] = set()
"""Temporary names that this process is writing now."""


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk; file systems that cannot are passed over."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    """A new name next to ``path`` that tells who writes it; what has that name at the end is deleted."""
    temporary = path.with_name(f"{_prefix(path)}{_host()}-{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY}")
    _writing.add(temporary.name)
    try:
        yield temporary
    finally:
        _delete(temporary)
        _writing.discard(temporary.name)


def _prefix(path: Path) -> str:
    """How temporary names of ``path`` begin; a long name is cut, because file systems allow 255 bytes."""
    return f".{os.fsencode(path.name)[:100].decode(errors='ignore')}."


def _host() -> str:
    return "".join(c for c in socket.gethostname() if c.isalnum())[:32] or "host"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def is_internal(path: Path) -> bool:
    """Whether a name is one of this module's: a lock, a temporary name, or what was moved aside."""
    aside = path.name.startswith(".") and path.name.endswith(PREVIOUS)
    return path.name.startswith(LOCK) or aside or TEMPORARY_NAME.fullmatch(path.name) is not None


def _is_abandoned(path: Path) -> bool:
    """Whether a name is a temporary one whose writer is gone: a process of this machine, or any after a day."""
    parts = TEMPORARY_NAME.fullmatch(path.name)
    if parts is None or path.name in _writing:
        return False
    host, pid = parts[1], int(parts[2])
    if host == _host() and (pid == os.getpid() or not _alive(pid)):
        return True
    return time.time() - path.lstat().st_mtime > 86_400


def remove_leftovers(path: Path) -> None:
    """Delete what stands under temporary names of ``path`` whose writers are gone."""
    _remove_abandoned(path.parent, _prefix(path))


def tidy(folder: Path) -> None:
    """Delete what stands under temporary names in a folder whose writers are gone, and bring back what was moved
    aside."""
    _remove_abandoned(folder, ".")
    with contextlib.suppress(OSError):
        for path in folder.glob(f".*{PREVIOUS}"):
            recover(path.with_name(path.name[1 : -len(PREVIOUS)]))


def _remove_abandoned(folder: Path, prefix: str) -> None:
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if path.name.startswith(prefix) and _is_abandoned(path):
                _delete(path)


def _delete(path: Path) -> None:
    """Delete a file or folder, as far as that is possible; a link is removed, not followed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary path to write one file to; it becomes ``path`` when the block ends well, and is deleted otherwise.

    The folder is created.  The file gets the rights that the umask gives any new file.

    Raises:
        UserError: it cannot be written (see :func:`stepdistill.errors.writing`).
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path)
        with _temporary(path) as temporary:
            yield temporary
            _usual_rights(temporary)
            sync(temporary)
            os.replace(temporary, path)
        sync(path.parent)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: object) -> None:
    """Write a JSON file, whole or not at all; NaN and infinities, which JSON does not have, become null.

    Raises:
        UserError: it cannot be written.
    """
    write_text(path, json.dumps(replace_non_finite(value), indent=1, allow_nan=False) + "\n")


def write_tensors(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """Write a safetensors file, whole or not at all, with a digest that :func:`stepdistill.readers.read_tensors`
    compares.

    Raises:
        UserError: it cannot be written.
    """
    from safetensors.torch import save_file

    from .readers import DIGEST, digest_tensors

    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    metadata = metadata or {}
    with replacing(path) as temporary:
        save_file(whole, temporary, {**metadata, DIGEST: digest_tensors(whole, metadata)})
    return Path(path)


def replace_non_finite(value: object) -> object:
    """``value`` with every number that is not finite as None."""
    if isinstance(value, float):
        return value if abs(value) < float("inf") else None
    if isinstance(value, dict):
        return {k: replace_non_finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [replace_non_finite(v) for v in value]
    return value


@contextlib.contextmanager
def replacing_folder(path: str | Path) -> Iterator[Path]:
    """An empty folder to fill; it becomes ``path`` when the block ends well, and is deleted otherwise.

    An earlier folder at ``path`` stays whole until the new one is: both change places in one step where the system can
    (Linux); elsewhere the old one is moved aside first, and :func:`recover` brings it back if the process is killed
    in between.

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        recover(path)
        remove_leftovers(path)
        with _temporary(path) as temporary:
            temporary.mkdir()
            yield temporary
            for part in [temporary, *temporary.rglob("*")]:
                _usual_rights(part)
                sync(part)
            _put_in_place(temporary, path)
            sync(path.parent)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename a folder to ``path``; an earlier folder at ``path`` gets the temporary name, or is deleted."""
    if not os.path.lexists(path):
        temporary.rename(path)
        return
    if _exchange(temporary, path):
        return
    previous = path.with_name(f".{path.name}{PREVIOUS}")
    _delete(previous)
    path.rename(previous)
    try:
        temporary.rename(path)
    except BaseException:
        recover(path)
        raise
    _delete(previous)


def recover(path: Path) -> None:
    """Bring back the folder that a killed process had moved aside for a new one; nothing where there is none."""
    previous = path.with_name(f".{path.name}{PREVIOUS}")
    if not previous.is_dir():
        return
    with contextlib.suppress(OSError):
        if os.path.lexists(path):
            _delete(previous)
        else:
            previous.rename(path)


def _exchange(a: Path, b: Path) -> bool:
    """Let two names change places in one step; False where the system or the file system cannot."""
    if not sys.platform.startswith("linux"):
        return False
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_working_folder, exchange = -100, 2
    return renameat2(at_working_folder, os.fsencode(a), at_working_folder, os.fsencode(b), exchange) == 0


def remove_folder(path: Path) -> str | None:
    """Delete a folder so that no part of it is ever seen under its name; returns why it could not be deleted.

    It is renamed first: a killed process leaves the rest under a temporary name, for :func:`remove_leftovers`.
    """
    with _temporary(path) as temporary:
        try:
            path.rename(temporary)
            shutil.rmtree(temporary)
        except OSError as error:
            return first_line(error)
    return None


def _usual_rights(path: Path) -> None:
    """The rights that a new file has under the umask: some writers (safetensors) leave 0600."""
    if path.is_symlink():
        return
    umask = os.umask(0)
    os.umask(umask)
    with contextlib.suppress(OSError):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)


def digest(path: str | Path) -> str:
    """SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def free_name(path: Path) -> Path:
    """``path``, or ``path-2``, ``path-3``, ...: the first that does not exist."""
    names = (path if n == 1 else path.with_name(f"{path.name}-{n}") for n in itertools.count(1))
    return next(name for name in names if not os.path.lexists(name))
