"""The training loop of the small teachers: AdamW, an average of the weights, saves to resume from."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from stepdistill.config import Section
from stepdistill.errors import UserError, reading
from stepdistill.files import write_tensors
from stepdistill.finiteness import is_finite
from stepdistill.precision import computing
from stepdistill.readers import read_tensors

NON_FINITE_LIMIT = 10
"""Skipped steps in a row that end a training."""
Channels = Annotated[int, Field(ge=8, le=4096)]


class LoopSettings(Section):
    """AdamW with a warm-up and a cosine, an average of the weights, and saves to go on from."""

    steps: int = Field(
        20000, ge=1, le=10**9, description="optimizer steps; fewer than are done already ends the training"
    )
    batch_size: int = Field(64, ge=1, le=65_536)
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    warmup: int = Field(500, ge=0, le=10**9)
    final_lr: float = Field(1e-5, ge=0, description="the cosine ends here")
    weight_decay: float = Field(0.0, ge=0)
    ema_decay: float = Field(0.9995, ge=0, lt=1)
    clip: float = Field(1.0, gt=0)
    save_every: int = Field(2000, ge=1, le=10**9, description="steps between resumable saves")


def check_multiples(key: str, channels: list[int], factor: int) -> None:
    """Refuse channels that are no multiples of ``factor``.

    Raises:
        ValueError: it names the first; ``key`` is the config's.
    """
    odd = [c for c in channels if c < factor or c % factor]
    if odd:
        raise ValueError(f"{key}: {odd[0]} is not a multiple of {factor}")


def autocast(bf16: bool, device: str) -> contextlib.AbstractContextManager[Any]:
    """A context for the forward passes of training: bfloat16, or nothing; weights stay float32."""
    return computing(torch.device(device), torch.bfloat16 if bf16 else None)


def _learning_rate(config: LoopSettings, step: int) -> float:
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1 + torch.cos(torch.tensor(progress * torch.pi)).item())
    return config.final_lr + (config.lr - config.final_lr) * cosine


def fit(
    network: nn.Module,
    loss_at: Callable[[int], Tensor],
    settings: LoopSettings,
    partial: Path,
    generator: torch.Generator,
    title: str,
    at_save: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> int:
    """Minimise ``loss_at(step)``; ``network`` ends with the averaged weights, in eval mode.

    A step whose gradient is not finite is skipped.

    Args:
        partial: the file of saves; training goes on from it if it exists.
        generator: ``loss_at`` draws from it, and from nothing else that changes between steps.
        title: of the progress bar and in errors.
        at_save: called at every save but the last with the step and the average.

    Returns:
        The steps done.

    Raises:
        UserError: too many steps in a row were skipped.
    """
    network.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    ema = {name: p.detach().clone() for name, p in network.named_parameters()}
    start = _resume(partial, network, ema, optimizer, generator)
    bar = tqdm(range(start, settings.steps), initial=start, total=settings.steps, desc=title, unit="step")
    running: float | None = None
    in_a_row = 0
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(settings, step)
        loss = loss_at(step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
        in_a_row = 0 if is_finite(norm) else in_a_row + 1
        if in_a_row:
            optimizer.zero_grad()
            if in_a_row == NON_FINITE_LIMIT:
                raise UserError(
                    f"{title}: stopped at step {step}: {in_a_row} non-finite gradients in a row; lower lr, or look at "
                    f"the data; what was saved last is in {partial}"
                )
            continue
        optimizer.step()
        optimizer.zero_grad()
        decay = min(settings.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in network.parameters()], 1 - decay)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            _save_partial(partial, step + 1, network, ema, optimizer, generator)
            if at_save is not None and step + 1 < settings.steps:
                at_save(step + 1, ema)
    network.load_state_dict(ema, strict=False)
    network.eval().requires_grad_(False)
    return max(start, settings.steps)


def _save_partial(
    path: Path,
    step: int,
    network: nn.Module,
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> None:
    """All that resuming needs, in one safetensors file."""
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
    tensors["generator"] = generator.get_state()
    write_tensors(path, tensors, {"step": json.dumps(step)})


def _resume(
    path: Path,
    network: nn.Module,
    ema: dict[str, Tensor],
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
) -> int:
    """Restore what :func:`_save_partial` wrote; the step to go on with.

    Raises:
        UserError: the file is damaged, or of another network.
    """
    if not path.exists():
        return 0
    remedy = "remove it to start again, or set another output"
    with reading(path, remedy, "cannot be resumed from"):
        tensors, metadata = read_tensors(path)
        step = int(metadata["step"])
        weights = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
        try:
            network.load_state_dict(weights)
        except RuntimeError:
            raise UserError(f"{path}: saved by a training of another network; {remedy}") from None
        for name in ema:
            ema[name].copy_(tensors[f"ema.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        generator.set_state(tensors["generator"])
    return step
