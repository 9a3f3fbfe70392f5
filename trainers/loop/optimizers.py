"""AdamW for each trained group: rates, clipping, the mean of gradients over processes."""

from __future__ import annotations

import math
from collections.abc import ItemsView, Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from stepdistill.settings import OptimizerSettings, OptimizersSettings


class Optimizers:
    """One AdamW a group.

    Args:
        trained: parameters by optimizer and name.
        settings: a section for each optimizer's name.
    """

    def __init__(self, trained: dict[str, dict[str, nn.Parameter]], settings: OptimizersSettings, world: int = 1):
        self.trained, self.world = trained, world
        self.settings: dict[str, OptimizerSettings] = {name: getattr(settings, name) for name in trained}
        self.adamw = {name: self._make(name, list(group.values())) for name, group in trained.items()}

    def _make(self, name: str, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        settings = self.settings[name]
        return torch.optim.AdamW(
            parameters,
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            weight_decay=settings.weight_decay,
            fused=True,
        )

    def __getitem__(self, name: str) -> torch.optim.AdamW:
        return self.adamw[name]

    def items(self) -> ItemsView[str, torch.optim.AdamW]:
        return self.adamw.items()

    def step(self, name: str, done: int) -> Tensor | None:
        """A step from the gradients that have gathered, after ``done`` steps of the same optimizer.

        Returns the gradient's norm before clipping; None, and no step, where it is not finite.  No gradient is left.
        """
        parameters = [p for p in self.trained[name].values() if p.grad is not None]
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.world > 1:
            _average(gradients, self.world)
        norm = nn.utils.get_total_norm(gradients)
        finite = math.isfinite(norm.item())
        if finite:
            nn.utils.clip_grads_with_norm_(parameters, self.settings[name].clip, norm)
            for group in self.adamw[name].param_groups:
                group["lr"] = learning_rate(self.settings[name], done)
            self.adamw[name].step()
        for parameter in self.trained[name].values():
            parameter.grad = None
        return norm if finite else None

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """The averages of each, by parameter's index and name."""
        for name, optimizer in self.adamw.items():
            yield (
                name,
                {
                    f"{index}.{key}": torch.as_tensor(value)
                    for index, state in optimizer.state_dict()["state"].items()
                    for key, value in state.items()
                },
            )

    def load(self, name: str, flat: dict[str, Tensor]) -> None:
        """Take over the averages of :meth:`state`."""
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in flat.items():
            index, part = key.split(".", 1)
            state.setdefault(int(index), {})[part] = value
        optimizer = self.adamw[name]
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def learning_rate(settings: OptimizerSettings, done: int) -> float:
    """The rate of the next update after ``done`` of the same role: warm-up, then constant or linear decay.

    Warm-up is ``lr (done + 1) / warmup``: from ``lr / warmup`` at the first update to ``lr`` at update ``warmup``.
    diffusers' and transformers' schedulers are one update behind, with a rate of 0 at the first.
    The rate never falls below 1 % of ``lr``, so a run that is resumed past ``decay`` still moves.
    """
    rate = settings.lr
    if settings.warmup:
        rate *= min(1.0, (done + 1) / settings.warmup)
    if settings.decay:
        rate *= max(0.01, 1 - done / settings.decay)
    return rate


def _average(gradients: list[Tensor], world: int) -> None:
    """Mean over processes, as one message."""
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))
