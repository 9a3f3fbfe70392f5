"""What the main process does alone while the others wait, and what all of them learn of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from stepdistill.errors import UserError
from stepdistill.locks import Lock

Result = TypeVar("Result")


def on_main(accelerator: Accelerator, work: Callable[[], Result]) -> Result:
    """What ``work()`` gives in the main process, which alone does it; a UserError of it is raised by all.

    Raises:
        UserError: what ``work`` raised.
    """
    result: Any = None
    message: str | None = None
    if accelerator.is_main_process:
        try:
            result = work()
        except UserError as error:
            message = str(error)
    if accelerator.num_processes > 1:
        result, message = broadcast_object_list([result, message])
    if message is not None:
        raise UserError(message)
    return result


@contextlib.contextmanager
def locked(accelerator: Accelerator, lock: Lock) -> Iterator[None]:
    """A lock that the main process holds for all.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """

    def take() -> None:
        lock.__enter__()

    on_main(accelerator, take)
    try:
        yield
    finally:
        if accelerator.is_main_process:
            lock.__exit__()
