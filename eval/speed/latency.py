"""How long a pipeline takes, and which part of it takes the time."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.pipelines.msd import MSDPipeline

PARTS = ("text_encoder", "denoiser", "decoder", "rest")


@dataclass(frozen=True)
class Latency:
    """Attributes:
    seconds: the median of one call's wall time.
    images_per_second: batch_size / seconds.
    shares: the parts of a call's time, by name in ``PARTS``; they sum to 1.
    passes: network passes a picture; guidance with a null branch counts two.
    batch_size, steps, device: what was timed.
    """

    seconds: float
    images_per_second: float
    shares: dict[str, float]
    passes: float
    batch_size: int
    steps: int
    device: str

    def as_dict(self) -> dict:
        return asdict(self)


class Clock:
    """Adds up the time inside modules of each part; the device is waited for at both ends."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._started: dict[int, float] = {}

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def watch(self, parts: dict[str, list[nn.Module]]) -> Iterator[None]:
        """Hooks on every module of ``parts`` while the block runs."""
        handles = []
        for part, modules in parts.items():
            for module in modules:
                handles.append(module.register_forward_pre_hook(self._start))
                handles.append(module.register_forward_hook(lambda m, _, __, part=part: self._stop(m, part)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _start(self, module: nn.Module, _inputs: tuple) -> None:
        self._started[id(module)] = self.now()

    def _stop(self, module: nn.Module, part: str) -> None:
        self.seconds[part] += self.now() - self._started.pop(id(module))


def find_parts(stock: StockPipeline) -> dict[str, list[nn.Module]]:
    """The pipeline's modules by part.  A VAE is entered through ``decode``, so its decoder is the one watched."""
    encoders = stock.calls.text_encoders
    if isinstance(stock.pipeline, MSDPipeline):
        encoders = stock.pipeline.text_encoders
    decoder = getattr(stock.calls.vae, "decoder", None)
    return {
        "text_encoder": encoders,
        "denoiser": stock.denoisers,
        "decoder": [] if decoder is None else [decoder],
    }


@contextlib.contextmanager
def count_passes(stock: StockPipeline) -> Iterator[list[int]]:
    """A list whose one number is how many pictures have gone through the pipeline's networks since the start."""
    passed = [0]

    def count(_module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if args:
            passed[0] += len(args[0])
        else:
            passed[0] += len(kwargs["sample"] if "sample" in kwargs else kwargs["hidden_states"])

    handles = [network.register_forward_pre_hook(count, with_kwargs=True) for network in stock.denoisers]
    try:
        yield passed
    finally:
        for handle in handles:
            handle.remove()


def measure_latency(
    stock: StockPipeline,
    steps: int,
    batch_size: int = 1,
    guidance_scale: float | None = None,
    repeats: int = 5,
    warmup: int = 1,
) -> Latency:
    """Median wall time of ``repeats`` calls after ``warmup`` ones; shares from as many further, watched calls.

    Watching makes the device wait at each module, so the timed calls run without it.
    """
    device = stock.device
    noise = torch.randn(batch_size, *stock.noise_shape, generator=torch.Generator().manual_seed(0))
    kind = stock.condition_kind
    conditions = None if kind == "none" else (["a picture"] if kind == "prompt" else stock.labels[:1]) * batch_size
    clock = Clock(device)

    def call() -> float:
        generator = torch.Generator().manual_seed(0)
        started = clock.now()
        stock.generate(conditions, noise, steps, generator, guidance_scale)
        return clock.now() - started

    for _ in range(warmup):
        call()
    seconds = statistics.median(call() for _ in range(repeats))
    with clock.watch(find_parts(stock)), count_passes(stock) as passed:
        watched = sum(call() for _ in range(repeats))
    inside = sum(clock.seconds.values())
    clock.seconds["rest"] = max(0.0, watched - inside)
    total = sum(clock.seconds.values())
    return Latency(
        seconds=seconds,
        images_per_second=batch_size / seconds,
        shares={part: clock.seconds[part] / total for part in PARTS},
        passes=passed[0] / (repeats * batch_size),
        batch_size=batch_size,
        steps=steps,
        device=device_name(device),
    )


def device_name(device: torch.device | str) -> str:
    """``cpu``, or the accelerator's own name."""
    device = torch.device(device)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
