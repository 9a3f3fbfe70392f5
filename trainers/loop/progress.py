"""What the parts of the loop know of the trainer that holds them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from accelerate import Accelerator

from stepdistill.digests import Digests
from stepdistill.noise import Noise
from stepdistill.roles.ema import EMA
from stepdistill.roles.roles import Roles
from stepdistill.run import RunFolder
from stepdistill.settings import RunSettings
from stepdistill.trainers.methods.base import Method, Parts

from .optimizers import Optimizers


class Progress(Protocol):
    """What the recorder and the snapshots ask of a trainer."""

    parts: Parts
    method: Method
    run: RunFolder | None
    accelerator: Accelerator
    counters: dict[str, int]
    skipped: dict[str, int]
    not_finite: dict[str, int]
    trained: dict[str, Any]
    skipped_in_a_row: dict[str, int]
    optimizers: Optimizers
    ema: EMA | None
    roles: Roles
    noise: Noise
    config: RunSettings
    teacher_digests: Digests
    attention: str | None
    seconds: float
    passes_before_resume: int
    recorder: Any

    @property
    def passes(self) -> int:
        """Network passes of all processes."""
        ...

    def exported(self, average: bool = True) -> AbstractContextManager:
        """The student as it is exported, within the block."""
        ...
