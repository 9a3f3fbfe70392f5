"""A run as tensors and a JSON object, and back: roles, networks, averages, optimizers, noise, counters, what the method
registered (:attr:`Method.frozen`, :attr:`Method.memory`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from stepdistill.digests import check_same
from stepdistill.errors import UserError, first_line

from .progress import Progress
from .recorder import stacked


def take(trainer: Progress) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Everything needed to go on: groups of tensors, and a JSON object."""
    method, journal = trainer.method, trainer.parts.journal
    tensors = {role.name: role.state_dict() for role in trainer.roles.trained()}
    tensors |= {name: module.state_dict() for name, module in method.networks.items()}
    tensors |= {name: role.state_dict() for name, role in method.frozen.items()}
    if trainer.ema is not None:
        tensors["ema"] = trainer.ema.shadow
    for name, state in trainer.optimizers.state():
        tensors[f"optimizer-{name}"] = state
    tensors["noise"] = {"generator": trainer.noise.get_state()}
    if journal.values:  # towards the next row
        tensors["logged"] = {name: stacked(values) for name, values in journal.values.items()}
    meta = {
        "method": method.name,
        "teacher": trainer.teacher_digests,
        "counters": trainer.counters,
        "skipped": trainer.skipped,
        "skipped_in_a_row": trainer.skipped_in_a_row,
        "not_finite": trainer.not_finite,
        "seconds": trainer.seconds,
        "passes": trainer.passes,
        "ema_updates": trainer.ema.updates if trainer.ema else 0,
        "attention": trainer.attention,
        "unwritten": trainer.recorder.unwritten,
        "memory": method.memory,
    }
    return tensors, meta


@torch.no_grad()
def restore(trainer: Progress, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any], where: str) -> None:
    """Go on from :func:`take`.

    Raises:
        UserError: the checkpoint is of another method or teacher, or does not fit the networks.
    """
    method = trainer.method
    if meta.get("method") != method.name:
        raise UserError(f"checkpoint {where}: written by method {meta.get('method')!r}, not {method.name!r}")
    check_same(meta.get("teacher"), trainer.teacher_digests, trainer.config.teacher.path)
    try:
        for role in trainer.roles.trained():
            role.load_state_dict(tensors[role.name])
        for name, module in method.networks.items():
            module.load_state_dict(tensors[name])
        for name, role in method.frozen.items():
            role.load_state_dict(tensors[name])
        if trainer.ema is not None:
            for key, value in trainer.ema.shadow.items():
                value.copy_(tensors["ema"][key])
            trainer.ema.updates = meta["ema_updates"]
        for name in trainer.trained:
            trainer.optimizers.load(name, tensors[f"optimizer-{name}"])
        trainer.noise.set_state(tensors["noise"]["generator"])
        for name in ("counters", "skipped", "skipped_in_a_row", "not_finite"):
            getattr(trainer, name).update(_counts(meta[name]))
        trainer.seconds = float(meta["seconds"])
        trainer.attention = trainer.attention or meta.get("attention")
        values: dict[str, list[Tensor | float]] = {
            name: [*rows.unbind()] for name, rows in tensors.get("logged", {}).items()
        }
        trainer.parts.journal.values = values
        trainer.recorder.unwritten = list(meta.get("unwritten") or [])
        trainer.passes_before_resume = passes_of(meta)
        trainer.roles.meter.forward = trainer.roles.meter.backward = 0
        method.memory = dict(meta["memory"])
    except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"checkpoint {where}: does not fit this run ({first_line(error)}); was the teacher changed?"
        ) from None


def passes_of(meta: dict[str, Any]) -> int:
    """Network passes of all processes, by a checkpoint's meta data.

    Raises:
        ValueError: no such number.
    """
    passes = meta["passes"]
    if not isinstance(passes, int):
        raise ValueError("its passes are no count")
    return passes


def _counts(counts: dict[str, Any]) -> dict[str, int]:
    """
    Raises:
        ValueError: not numbers of something, by name.
    """
    if not all(isinstance(count, int) and count >= 0 for count in counts.values()):
        raise ValueError("its counters are no counts")
    return counts
