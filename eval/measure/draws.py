"""What every target is drawn from: the same noise, labels and prompts, each a function of seed and batch alone."""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from stepdistill.errors import UserError
from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.seeds import DistinctSeeds, generator

STREAMS = 2
"""Generators for each batch: where samples start, and noise between steps."""


def unit_noise(seed: int, batch: int, count: int, shape: tuple[int, ...]) -> Tensor:
    """Unit normal noise (count, *shape), float32, a function of its arguments alone, drawn on the CPU."""
    return torch.randn(count, *shape, generator=step_generator(seed, batch, stream=0))


def step_generator(seed: int, batch: int, stream: int = 1) -> torch.Generator:
    """A CPU generator of (seed, batch, stream): stream 0 starts samples, 1 is for noise between steps.

    No two of one seed are alike.
    """
    return generator(_batch_seeds(seed)[STREAMS * batch + stream])


@functools.lru_cache
def _batch_seeds(seed: int) -> DistinctSeeds:
    def hash_index(index: int) -> int:
        state = np.random.SeedSequence((seed, *divmod(index, STREAMS))).generate_state(1, np.uint64)[0]
        return int(state >> np.uint64(1))

    return DistinctSeeds(hash_index)


def split_into_batches(samples: int, batch_size: int) -> list[range]:
    """The indices of the samples of each batch."""
    return [range(start, min(start + batch_size, samples)) for start in range(0, samples, batch_size)]


def select_conditions(
    stock: StockPipeline,
    indices: range,
    prompts: list[str] | None = None,
    labels: Literal["uniform"] | list[int] = "uniform",
) -> list | None:
    """The conditions of samples ``indices``: labels or prompts in turn, None for an unconditional pipeline.

    Raises:
        UserError: a prompt pipeline without prompts.
    """
    match stock.condition_kind:
        case "none":
            return None
        case "label":
            choices = stock.labels if labels == "uniform" else labels
            return [choices[index % len(choices)] for index in indices]
    if not prompts:
        raise UserError(f"pipeline {stock.path}: draws from prompts; set prompts to a file with one a line")
    return [prompts[index % len(prompts)] for index in indices]


def draw_batch(
    stock: StockPipeline,
    steps: int,
    guidance: float | None,
    conditions: list | None,
    count: int,
    seed: int,
    batch: int,
) -> Tensor:
    """Pixels (count, C, H, W) in [0, 1] on the CPU, of the noise of (seed, batch)."""
    noise = unit_noise(seed, batch, count, stock.noise_shape)
    return stock.generate(conditions, noise, steps, step_generator(seed, batch), guidance).cpu()
