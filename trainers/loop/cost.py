"""What a student update costs over its floor.

The floor is the sum of the network passes that the update itself made (same networks, shapes and modes), each timed
alone in the same run; what is above it is noise draws, losses, optimizers, clipping and the loop.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from stepdistill.denoiser import Condition, Prediction
from stepdistill.devices import DTYPES
from stepdistill.errors import UserError
from stepdistill.families.random_sizes import RANDOM_SIZES, random_family
from stepdistill.roles.role import Role
from stepdistill.trainers.plans.build import Fit, build_trainer
from stepdistill.trainers.plans.job import Job

from .trainer import Trainer

How = Literal["__call__", "signal", "features", "feature_maps"]
"""The methods of a role that call its network."""

PROMPTS = ["a photo of a cat", "a red bus", "two dogs in the snow", "a bowl of fruit"]
"""What a teacher of random weights is asked for."""


@dataclass
class Call:
    """One recorded network pass: the role, what it was called with, and which backward followed."""

    role: Role
    x: Tensor
    time: Tensor
    condition: Condition
    how: How
    to_weights: bool
    to_input: bool

    @property
    def name(self) -> str:
        backward = "+backward" if self.to_weights else "+backward to input" if self.to_input else ""
        return f"{self.role.name}{' (encoder)' if self.how == 'features' else ''} forward{backward}"

    def replay(self) -> None:
        """The pass alone."""
        x = self.x.detach().requires_grad_(self.to_input)
        with torch.set_grad_enabled(self.to_weights or self.to_input):
            result = getattr(self.role, self.how)(x, self.time, self.condition)
        if isinstance(result, list):
            outputs = result
        else:
            outputs = [result.output if isinstance(result, Prediction) else result]
        ones = [torch.ones_like(output) for output in outputs]
        if self.to_weights:
            torch.autograd.backward(outputs, ones)
            for parameter in self.role.parameters().values():
                parameter.grad = None
        elif self.to_input:
            torch.autograd.grad(outputs, x, ones)


def record(trainer: Trainer, run: Callable[[], None]) -> list[Call]:
    """The network passes that ``run`` makes."""
    calls: list[Call] = []
    methods = {how: getattr(Role, how) for how in get_args(How)}

    def recording(how: How) -> Callable:
        def call(role: Role, x: Tensor, t: Tensor, condition: Condition) -> Any:
            to_input = torch.is_grad_enabled() and x.requires_grad
            to_weights = torch.is_grad_enabled() and role.trains and not to_input
            calls.append(Call(role, x.detach(), t, condition, how, to_weights, to_input))
            return methods[how](role, x, t, condition)

        return call

    for how in methods:
        setattr(Role, how, recording(how))
    try:
        run()
    finally:
        for how, method in methods.items():
            setattr(Role, how, method)
    return calls


def _timed(run: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure_step(job: Job, seconds: float, random_size: str | None = None) -> str:
    """Measure for about ``seconds`` and say it as a table.

    Args:
        random_size: a teacher of prompts with random weights in place of the config's, and prompts in place of its
            data; see ``RANDOM_SIZES``.

    Raises:
        UserError: an unknown size.
    """
    family, fit = None, None
    if random_size is not None:
        if random_size not in RANDOM_SIZES:
            raise UserError(f"--random-size {random_size}: sizes are {', '.join(RANDOM_SIZES)}")
        family = random_family(random_size, DTYPES[job.config.teacher.dtype])
        fit = Fit(PROMPTS, PROMPTS)
    trainer = build_trainer(job, None, family=family, fit=fit)
    trainer.use_attention()
    device, iterations = trainer.family.device, job.method.passes(job.config).iterations

    def update() -> None:
        """One student update with all the fake-score updates that belong to it."""
        before = trainer.counters["student"]
        for _ in range(iterations):
            trainer.iteration()
        trainer.parts.journal.values.clear()
        assert trainer.counters["student"] == before + 1

    update()
    calls = record(trainer, update)
    groups: dict[str, list[Call]] = defaultdict(list)
    for call in calls:
        groups[call.name].append(call)
    whole: list[float] = []
    parts: dict[str, list[float]] = defaultdict(list)
    started = time.perf_counter()
    while len(whole) < 3 or time.perf_counter() - started < seconds:
        whole.append(_timed(update, device))
        for name, group in groups.items():
            parts[name].append(_timed(partial(_replay, group), device))
    return _table(trainer, whole, parts, groups, device)


def _replay(calls: list[Call]) -> None:
    for call in calls:
        call.replay()


def _table(
    trainer: Trainer,
    whole: list[float],
    parts: dict[str, list[float]],
    groups: dict[str, list[Call]],
    device: torch.device,
) -> str:
    median = {name: statistics.median(times) for name, times in parts.items()}
    floor, update = sum(median.values()), statistics.median(whole)
    ratio = statistics.median(w / sum(p[i] for p in parts.values()) for i, w in enumerate(whole))
    train, roles = trainer.config.train, trainer.config.roles
    parameters = sum(p.numel() for p in trainer.family.network.parameters())
    lines = [
        f"{trainer.name}, {type(trainer.family.network).__name__} of {parameters / 1e6:.1f}M, weights {roles.weights}, "
        f"batch {train.batch_size} x {train.gradient_accumulation}, {train.precision}, attention {trainer.attention}, "
        f"{device}, {torch.get_num_threads()} threads",
        f"{'network passes, alone':44s} {'count':>5s} {'ms':>10s}",
    ]
    for name, value in median.items():
        lines.append(f"{name:44s} {len(groups[name]):5d} {1000 * value:10.1f}")
    lines.append(f"{'floor: their sum':44s} {sum(map(len, groups.values())):5d} {1000 * floor:10.1f}")
    lines.append(f"{'one student update, all of it':44s} {'':5s} {1000 * update:10.1f}")
    lines.append(f"update / floor = {ratio:.3f} (median of {len(whole)} pairs); {1 / update:.3g} updates/s")
    if device.type == "cuda":
        lines.append(f"peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GiB")
    return "\n".join(lines)
