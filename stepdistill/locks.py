"""Locks: one writer of a folder at a time."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path
from typing import IO, NoReturn

from .errors import UserError, writing
from .files import LOCK


class Lock:
    """One writer of a folder: held by a process until it ends, however it ends.

    ``with Lock(folder): ...``; the file ``.lock`` is removed at the end, and means nothing where a killed process left
    it.  Folders that are created for it are removed too if nothing else was written there.

    Args:
        wait: seconds to wait for another holder.
        remedy: what else a user can do, after "wait for it, or stop it".
        file: the lock file; by default ``.lock`` in the folder.
    """

    def __init__(self, folder: str | Path, wait: float = 0.0, remedy: str = "", file: Path | None = None):
        self.folder, self.file = Path(folder), file or Path(folder) / LOCK
        self.wait, self.remedy = wait, remedy
        self._held: IO[str] | None = None
        self._created: list[Path] = []

    def __enter__(self) -> Lock:
        """Take the lock.

        Raises:
            UserError: another process holds it, or the folder cannot be written.
        """
        self._created = [p for p in self.file.parents if not p.exists()]
        deadline = time.monotonic() + self.wait
        try:
            while not self._try_to_hold():
                if time.monotonic() >= deadline:
                    self._refuse()
                time.sleep(0.1)
        except BaseException:
            self._remove_created()
            raise
        return self

    def _try_to_hold(self) -> bool:
        """Whether the lock is held now."""
        try:
            import fcntl
        except ImportError:  # Windows: no lock
            return True
        with writing(self.folder):
            self.file.parent.mkdir(parents=True, exist_ok=True)
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
            file = os.fdopen(os.open(self.file, flags, 0o666), "r+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            return False
        except OSError:  # a file system without locks
            file.close()
            return True
        if not _is_same(file, self.file):  # its holder removed it in between
            file.close()
            return False
        self._held = file
        with contextlib.suppress(OSError):  # a full disk: the lock holds without its text
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n")
            file.flush()
        return True

    def _refuse(self) -> NoReturn:
        holder = ""
        with contextlib.suppress(OSError, ValueError):
            holder = " ".join(self.file.read_text(encoding="utf-8")[:200].split())
        remedy = f", {self.remedy}" if self.remedy else ""
        raise UserError(
            f"{self.folder}: another process is writing here ({holder or 'unknown'}); wait for it, or stop it{remedy}"
        )

    def __exit__(self, *_: object) -> None:
        if self._held is None:
            return
        with contextlib.suppress(OSError):
            self.file.unlink()  # a process that has opened it meanwhile sees that it is no longer the folder's
        with contextlib.suppress(OSError):
            self._held.close()
        self._held = None
        self._remove_created()

    def _remove_created(self) -> None:
        """Remove the folders that were created for the lock, as far as they are empty."""
        with contextlib.suppress(OSError):
            for folder in self._created:
                folder.rmdir()


def _is_same(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False
