"""The average of a role's weights over its updates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from .role import Role


class EMA:
    """An exponential moving average of a role's trained parameters, float32.

    ``shadow <- d shadow + (1 - d) parameter`` after each update n = 1, 2, ..., with
    ``d = min(decay, (1 + n) / (10 + n))``: 2/11, 3/12, ...

    Why not diffusers' ``EMAModel``: its d is 0 after the first update, so the weights that training starts from (the
    teacher's) have no share in the average, and it keeps a list without names in the parameters' dtype, where a
    checkpoint needs names and bfloat16 would lose what a decay of 0.999 adds.
    """

    def __init__(self, role: Role, decay: float):
        self.role, self.decay, self.updates = role, decay, 0
        self.shadow = {k: p.detach().float().clone() for k, p in role.parameters().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Count an update, and move the average towards the parameters as they are now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        parameters = [p.detach().float() for p in self.role.parameters().values()]
        torch._foreach_lerp_(list(self.shadow.values()), parameters, 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """The role computes with the averaged weights within the block."""
        parameters = self.role.parameters()
        trained = {k: p.detach().clone() for k, p in parameters.items()}
        _copy_into(parameters, self.shadow)
        try:
            yield
        finally:
            _copy_into(parameters, trained)


@torch.no_grad()
def _copy_into(parameters: dict[str, nn.Parameter], values: dict[str, Tensor]) -> None:
    for key, parameter in parameters.items():
        parameter.copy_(values[key])
