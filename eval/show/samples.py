"""Pictures of one pipeline for the command line."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stepdistill import assets
from stepdistill.conditions import label_ranges
from stepdistill.devices import best_device
from stepdistill.errors import UserError
from stepdistill.eval.stock_pipeline import StockPipeline, is_pipeline
from stepdistill.pipelines import NegativePrompts
from stepdistill.seeds import generator as seeded

STEPS = 25
"""Of a pipeline that does not say its number."""


@dataclass(frozen=True)
class SampleOptions:
    """What is to be drawn; None: as the pipeline does by default.

    Attributes:
        negative_prompt: what to lead away from inside the attention, by ``negative_scale``.
    """

    count: int
    steps: int | None = None
    prompts: list[str] | None = None
    labels: list[int] | None = None
    guidance_scale: float | None = None
    negative_prompt: str | None = None
    negative_scale: float = 0.2
    seed: int = 0


def draw_samples(pipeline: str, options: SampleOptions, variant: str | None = None) -> torch.Tensor:
    """Pictures (N, C, H, W) in [0, 1] of an exported student, of a run's student, or of any diffusers folder.

    Raises:
        UserError: no such pipeline, or it does not take the options.
    """
    path = assets.resolve(pipeline)
    if is_pipeline(Path(path) / "student"):
        path = str(Path(path) / "student")
    stock = StockPipeline.load(path, best_device(), variant=variant)
    conditions = _conditions(stock, options)
    generator = seeded(options.seed)
    noise = torch.randn(options.count, *stock.noise_shape, generator=generator)
    steps = options.steps or stock.default_steps or STEPS
    guidance = stock.default_guidance if options.guidance_scale is None else options.guidance_scale
    return stock.generate(conditions, noise, steps, generator, guidance, **_steering(stock, options))


def _steering(stock: StockPipeline, options: SampleOptions) -> dict[str, Any]:
    """The arguments of a call that lead away from the negative prompt."""
    if options.negative_prompt is None:
        return {}
    if stock.pipeline is not stock.first:
        raise UserError("--negative-prompt: give the folder of one student, such as student/student-0")
    return NegativePrompts(stock.first)(options.negative_prompt, options.negative_scale)


def _conditions(stock: StockPipeline, options: SampleOptions) -> list | None:
    """A prompt or label for each picture, in turn; None: the pipeline takes neither."""
    if stock.condition_kind == "prompt":
        if not options.prompts:
            raise UserError("this pipeline takes prompts: add --prompt 'a photo of a cat'")
        return [options.prompts[i % len(options.prompts)] for i in range(options.count)]
    if options.prompts:
        raise UserError("--prompt: this pipeline takes no prompts")
    if stock.condition_kind == "none":
        if options.labels:
            raise UserError("--label: this pipeline takes no labels")
        return None
    for label in options.labels or []:
        if label not in stock.labels:
            raise UserError(f"--label {label}: outside {label_ranges(stock.labels)}")
    labels = options.labels or stock.labels
    return [labels[i % len(labels)] for i in range(options.count)]
