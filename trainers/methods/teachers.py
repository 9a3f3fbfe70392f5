"""Which teacher a score method asks, and at which guidance scale."""

from __future__ import annotations

from dataclasses import dataclass

from stepdistill.denoiser import Denoiser


@dataclass
class AskedTeacher:
    """What stands in place of the run's teacher, and of the method's guidance scale; None leaves those."""

    denoiser: Denoiser | None = None
    guidance_scale: float | None = None
