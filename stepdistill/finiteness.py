"""Where numbers that are not finite come from.

A NaN or an infinity that reaches a gradient has a first place where it came from.  :class:`Watch` remembers, without
waiting for the device, whether each prediction was finite, so that a skipped update can name the network and the
timestep; :func:`check_module` refuses weights that are not finite when they are loaded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .errors import UserError

REMEMBERED = 10_000
"""Predictions that a :class:`Watch` remembers: more than an update has."""


def finite_rows(values: Tensor) -> Tensor:
    """Whether each row of ``values`` (B, ...) is finite, (B,) bool, on its device; no wait for it."""
    rows = values.detach().reshape(len(values), -1)
    if not rows.numel() or not rows.is_floating_point():
        return torch.ones(len(values), dtype=torch.bool, device=values.device)
    return rows.amin(1).isfinite() & rows.amax(1).isfinite()  # both keep a NaN; no tensor of the size of ``values``


def is_finite(values: Tensor) -> bool:
    """Whether every element is finite."""
    values = values.detach()
    if not values.numel() or not values.is_floating_point():
        return True
    low, high = values.aminmax()  # as in :func:`finite_rows`, and faster
    return bool(low.isfinite() & high.isfinite())


def first_not_finite(tensors: Iterable[tuple[str, Tensor]]) -> str | None:
    """The name of the first tensor with an element that is not finite; None where all are."""
    return next((name for name, value in tensors if not is_finite(value)), None)


def check_module(module: nn.Module, what: str, remedy: str) -> None:
    """Refuse a network with weights that are not finite.

    Args:
        what: the network, as the error begins.

    Raises:
        UserError: it names the first such tensor.
    """
    if (name := first_not_finite(module.state_dict().items())) is not None:
        raise UserError(f"{what} has weights that are not finite ({name} holds a NaN or an infinity); {remedy}")


@dataclass(frozen=True)
class NotFinite:
    """The first prediction that is not finite: the role's name, and the timesteps."""

    name: str
    timesteps: tuple[float, ...] = ()

    @property
    def when(self) -> str:
        """`` at timestep 999``, `` at timesteps 700 to 999``, or nothing."""
        if not self.timesteps:
            return ""
        low, high = min(self.timesteps), max(self.timesteps)
        return f" at timestep {low:g}" if low == high else f" at timesteps {low:g} to {high:g}"


class Watch:
    """Whether each of the last predictions was finite; looked up only when a gradient is not."""

    def __init__(self) -> None:
        self._notes: deque[tuple[str, Tensor, Tensor | None]] = deque(maxlen=REMEMBERED)

    def note(self, name: str, values: Tensor, timestep: Tensor | None = None) -> None:
        """Remember whether ``values`` (B, ...), predicted by ``name`` at ``timestep`` (B,), are finite."""
        self._notes.append((name, finite_rows(values), timestep))

    def clear(self) -> None:
        self._notes.clear()

    def first(self) -> NotFinite | None:
        """The first prediction that was not finite: later ones may follow from it.  None where all were finite."""
        for name, finite, timestep in self._notes:
            wrong = ~finite.cpu()
            if wrong.any():
                at = () if timestep is None else tuple(timestep.detach().cpu().double()[wrong].tolist())
                return NotFinite(name, at)
        return None
