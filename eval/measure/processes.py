"""Which part of the work is this process's, where several share one evaluation (torchrun, accelerate launch)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from stepdistill.errors import UserError
from stepdistill.locks import Lock

LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a launcher sets in a process's environment."""
PATIENCE = timedelta(days=2)
"""How long processes wait for the first one, which alone makes references and numbers."""


@dataclass(frozen=True)
class Processes:
    """Process ``rank`` of ``world``, on ``device``."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @classmethod
    def join(cls) -> Processes:
        """As the environment has it; joins the group where there are several."""
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return cls(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        state = PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def main(self) -> bool:
        return self.rank == 0

    def agree(self, error: UserError | None = None) -> None:
        """Wait for all; where one of them has an error, all raise it.

        Raises:
            UserError: the first process's that has one.
        """
        messages = [None if error is None else str(error)]
        if self.world > 1:
            messages = gather_object(messages)
        first = next((message for message in messages if message is not None), None)
        if first is not None:
            raise UserError(first)

    def broadcast(self, value: Any) -> Any:
        """The first process's value, in all."""
        return value if self.world == 1 else broadcast_object_list([value])[0]

    @contextlib.contextmanager
    def hold(self, lock: Lock) -> Iterator[None]:
        """A folder's lock, which the first process holds for all.

        Raises:
            UserError: another holds it, or the folder cannot be written.
        """
        error = None
        if self.main:
            try:
                lock.__enter__()
            except UserError as user_error:
                error = user_error
        self.agree(error)
        try:
            yield
        finally:
            if self.main:
                lock.__exit__()

    def leave(self) -> None:
        """Leave the group, so that the interpreter ends without a warning."""
        if self.world > 1 and dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()


def environment_without_launcher() -> dict[str, str]:
    """This process's environment for a child that is not to take part in the group."""
    return {name: value for name, value in os.environ.items() if name not in LAUNCHED}
