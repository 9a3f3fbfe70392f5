"""What a run shows of itself: rows of metrics, sample grids, trackers.

An error of the disk does not end the training at once: it is remembered in ``failure``, and the loop ends the run with
it as soon as the run is saved.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from stepdistill.data.grid import save_grid
from stepdistill.errors import UserError, first_line
from stepdistill.noise import Noise

from .progress import Progress


class Recorder:
    """Writes rows and sample grids of one run, in its main process."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.unwritten: list[dict[str, Any]] = []  # rows of metrics that the disk has not taken
        self.failure: UserError | None = None  # what could not be written

    @property
    def writes(self) -> bool:
        """Whether this process writes anything."""
        return self.progress.run is not None and self.progress.accelerator.is_main_process

    @property
    def values(self) -> dict[str, list[Tensor | float]]:
        """What was logged since the last row."""
        return self.progress.parts.journal.values

    # -- rows ----------------------------------------------------------------------------------------------

    def write_row(self, bar: tqdm) -> None:
        """What was logged since the last row, as one row of means over what is finite."""
        run = self.progress
        row: dict[str, Any] = {
            "iteration": run.counters["iteration"],
            **{f"updates/{role}": run.counters[role] for role in run.trained},
            "seconds": round(run.seconds, 3),
            "passes": run.passes,
        }
        for name, values in self.values.items():
            row[name] = _finite_mean(values)
        row |= {f"skipped/{role}": count for role, count in run.skipped.items() if count}
        row |= {f"not_finite/{name}": count for name, count in run.not_finite.items()}
        if unreadable := sum(len(images.unreadable) for _, images in run.parts.image_sets()):
            row["unreadable"] = unreadable
        self.values.clear()
        losses = {k.removeprefix("loss/"): v for k, v in row.items() if k.startswith("loss/")}
        shown = {k: "nan" if v is None else f"{v:.3g}" for k, v in losses.items()}
        bar.set_postfix(shown, refresh=False)
        if self.writes:
            self.unwritten.append(row)
            self.write_rows()
            if run.accelerator.trackers:
                self._track(row)

    def write_rows(self) -> None:
        """Append the rows that are not written yet."""
        run = self.progress.run
        if run is None:
            return
        try:
            while self.unwritten:
                run.append(self.unwritten[0])
                del self.unwritten[0]
        except UserError as error:
            self.failure = self.failure or error

    def _track(self, row: dict[str, Any]) -> None:
        """A row for the trackers; the run goes on without them where they fail."""
        shown = {k: v for k, v in row.items() if k != "iteration" and v is not None}
        try:
            self.progress.accelerator.log(shown, step=row["iteration"])
        except Exception as error:  # of any kind: trackers are other people's
            print(f"note: train.trackers: no more rows for them ({first_line(error)})")
            self.progress.accelerator.trackers = []

    def raise_failure(self, remedy: str) -> None:
        """
        Raises:
            UserError: what could not be written, and where all else is saved.
        """
        if self.failure is not None:
            raise UserError(f"{self.failure}{remedy}")

    # -- sample grids --------------------------------------------------------------------------------------

    @property
    def samples_file(self) -> Path | None:
        """The grid of this update; None without a run folder."""
        run = self.progress.run
        return None if run is None else run.samples / f"{self.progress.counters['student']:06d}.png"

    def has_samples(self) -> bool:
        """Whether the grid of this update exists; a run that was stopped may lack it."""
        return self.samples_file is None or self.samples_file.exists()

    @torch.no_grad()
    def save_samples(self) -> None:
        """A grid of the student's pictures on noise and conditions that stay the same over the run."""
        file = self.samples_file
        if not self.writes or file is None:
            return
        parts = self.progress.parts
        family, data = parts.family, parts.config.data
        count = parts.config.train.sample_count
        fixed = Noise(parts.config.seed + 1, family.device)
        noise = fixed.randn(count, *family.sample_shape)
        items = parts.conditions.items if data.part is not None else data.shown or parts.conditions.items
        condition = family.encode_conditions([items[i % len(items)] for i in range(count)]) if items else {}
        with parts.roles.meter.paused(), self.progress.exported():
            samples = parts.sampler.sample(parts.roles.student, noise, condition, fixed.randn_like)
        try:
            save_grid(family.decode(samples), file)
        except UserError as error:
            self.failure = self.failure or error


def stacked(values: list[Tensor | float]) -> Tensor:
    """Logged scalars as one float32 tensor (N,) on the CPU."""
    return torch.stack([torch.as_tensor(v, dtype=torch.float32).cpu() for v in values])


def _finite_mean(values: list[Tensor | float]) -> float | None:
    """The mean of the values that are finite, None where none is; how many were skipped is counted elsewhere."""
    whole = stacked(values)
    mean = whole[whole.isfinite()].mean().item()
    return mean if math.isfinite(mean) else None
