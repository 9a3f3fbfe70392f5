"""The pipelines to measure, and how each is called."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch

from stepdistill import assets
from stepdistill.errors import UserError
from stepdistill.eval.stock_pipeline import StockPipeline


@dataclass(frozen=True)
class Target:
    """A pipeline to measure: its name in tables, its folder, and how it is called.

    ``steps`` and ``guidance_scale`` None mean what the folder's provenance says, ``null_label`` None its network's;
    ``variant`` is of the weights.
    """

    name: str
    path: str | Path
    steps: int | None = None
    guidance_scale: float | None = None
    null_label: int | None = None
    variant: str | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        """``[NAME=]PATH[@STEPS[@GUIDANCE]]``; by default called as its folder says.

        Raises:
            UserError: steps or a guidance scale that are no numbers, or an asset that is not shipped.
        """
        name, _, place = text.rpartition("=")
        path, *call = place.rsplit("@", 2)
        if len(call) == 2 and not call[0].isdigit():  # an @ of the path
            path, call = f"{path}@{call[0]}", call[1:]
        steps, guidance = [*call, None, None][:2]
        if steps is not None and not re.fullmatch("[1-9][0-9]*", steps):
            raise UserError(f"{text}: what follows @ is a number of steps, at least 1")
        if guidance is not None and not re.fullmatch(r"\d+(\.\d+)?", guidance):
            raise UserError(f"{text}: what follows the second @ is a guidance scale")
        return cls(
            name or Path(path).name,
            assets.resolve(os.path.expanduser(path)),
            None if steps is None else int(steps),
            None if guidance is None else float(guidance),
        )

    def load(self, device: str | torch.device, dtype: torch.dtype = torch.float32) -> StockPipeline:
        """The pipeline on ``device``.

        Raises:
            UserError: no such folder, or one that diffusers cannot load.
        """
        return StockPipeline.load(self.path, device, dtype, null_label=self.null_label, variant=self.variant)

    def resolve_call(self, stock: StockPipeline) -> tuple[int, float | None]:
        """The steps and guidance scale that the pipeline is called with.

        Raises:
            UserError: neither the target nor the folder says how many steps.
        """
        steps = self.steps if self.steps is not None else stock.default_steps
        if steps is None:
            raise UserError(f"{self.name} ({self.path}): says nothing of its steps; give their number")
        guidance = self.guidance_scale if self.guidance_scale is not None else stock.default_guidance
        return steps, guidance


def count_steps(steps: int) -> str:
    """``1 step``, ``25 steps``."""
    return f"{steps} step" if steps == 1 else f"{steps} steps"
