"""When a run is to stop before its end: signals and wall time."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator


class Interrupted(Exception):
    """A signal, or the wall-time limit: everything is saved, the run can be resumed."""

    def __init__(self, reason: str, exit_code: int):
        super().__init__(reason)
        self.exit_code = exit_code


class Stopping:
    """Remembers that a stop was requested, and why: (reason, exit code)."""

    def __init__(self, max_minutes: float | None = None):
        self.max_minutes = max_minutes
        self.reason: tuple[str, int] | None = None

    @contextlib.contextmanager
    def signals(self) -> Iterator[None]:
        """SIGTERM and the first Ctrl-C request a stop after this iteration; a second Ctrl-C stops at once."""

        def request(number: int, _frame: object) -> None:
            if self.reason is not None:
                raise KeyboardInterrupt
            self.reason = ("interrupted" if number == signal.SIGINT else "terminated", 128 + number)

        try:
            previous = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread
            previous = {}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def requested(self, seconds: float) -> bool:
        """Whether to stop, ``seconds`` after this process began to train."""
        limit = self.max_minutes
        if self.reason is None and limit is not None and seconds > 60 * limit:
            self.reason = (f"train.max_minutes = {limit} reached", 0)
        return self.reason is not None
