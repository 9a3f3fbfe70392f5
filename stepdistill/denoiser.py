"""A denoiser: (x_t, t, condition) -> a prediction that can be asked for x0, eps, v, flow or score.

A network with its schedule is one (:class:`NetworkDenoiser`); so is any function with a schedule
(``stepdistill.analytic``), so every method can be run against a teacher that is known in closed form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .schedule import PredictionType, Schedule, expand

Condition = dict[str, Tensor]
"""What a network is conditioned on besides x_t and t: named tensors, each with the batch first; {} for nothing."""


def cat_conditions(*conditions: Condition) -> Condition:
    """Join conditions along the batch; all must have the same names."""
    return {key: torch.cat([c[key] for c in conditions]) for key in conditions[0]}


def select_rows(condition: Condition, index: Tensor | slice) -> Condition:
    """The rows ``index`` of a condition."""
    return {key: value[index] for key, value in condition.items()}


Combine = Callable[[Tensor, Tensor, float | Tensor], Tensor]
"""Outputs under the null condition and under the condition, (B, ...) each, and the guidance scale, a number or
(B, 1, ..., 1), to the guided output."""


def combine_linearly(output_null: Tensor, output_cond: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """Classifier-free guidance (2207.12598): ``null + w (cond - null)``."""
    return output_null + guidance_scale * (output_cond - output_null)


@dataclass(frozen=True)
class Prediction:
    """What a denoiser predicts at ``x_t`` (B, ...), ``t`` (B,): ``output`` is of type ``kind``, at least float32;
    ``combine`` is how outputs of its network are guided."""

    schedule: Schedule
    x_t: Tensor
    t: Tensor
    output: Tensor
    kind: PredictionType
    combine: Combine = combine_linearly

    @property
    def x0(self) -> Tensor:
        return self.schedule.to_x0(self.output, self.kind, self.x_t, self.t)

    def of(self, kind: PredictionType) -> Tensor:
        """The prediction as ``kind``; the network's output itself if that is its kind."""
        if kind == self.kind:
            return self.output
        return self.schedule.from_x0(self.x0, kind, self.x_t, self.t)

    @property
    def eps(self) -> Tensor:
        return self.of("eps")

    @property
    def v(self) -> Tensor:
        return self.of("v")

    @property
    def flow(self) -> Tensor:
        return self.of("flow")

    @property
    def score(self) -> Tensor:
        return self.schedule.score(self.x0, self.x_t, self.t)


class Denoiser(Protocol):
    """Anything that predicts: a network, or a closed form."""

    schedule: Schedule

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction: ...


class NetworkDenoiser:
    """A network as a denoiser.

    ``forward(network_input, network_time, condition) -> output`` calls the network as it was trained;
    ``kind`` is what the output means, ``combine`` how it is guided.
    """

    def __init__(
        self,
        forward: Callable[[Tensor, Tensor, Condition], Tensor],
        schedule: Schedule,
        kind: PredictionType,
        combine: Combine = combine_linearly,
    ):
        self.forward, self.schedule, self.kind, self.combine = forward, schedule, kind, combine

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        output = self.forward(self.schedule.network_input(x_t, t), self.schedule.network_time(t), condition)
        output = output.to(torch.promote_types(output.dtype, x_t.dtype))
        return Prediction(self.schedule, x_t, t, output, self.kind, self.combine)


def guided(
    denoiser: Denoiser,
    x_t: Tensor,
    t: Tensor,
    condition: Condition,
    null: Condition | None,
    guidance_scale: float | Tensor,
) -> Prediction:
    """Classifier-free guidance (2207.12598): ``x0_null + w (x0_cond - x0_null)``; w = 1 is no guidance.

    Applied to the network's output, which is affine in x0 at fixed (x_t, t), so the result is the same; a family whose
    pipeline combines the outputs in another way says so by ``Prediction.combine``.  Both branches run as one batch of
    2B.  ``guidance_scale``: a number, or one a sample, shape (B,).  At exactly
    1 the null branch is not run.
    """
    if not isinstance(guidance_scale, Tensor) and guidance_scale == 1:
        return denoiser(x_t, t, condition)
    if null is None:
        raise ValueError("guidance needs the null condition")
    both = denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), cat_conditions(null, condition))
    output_null, output_cond = both.output.chunk(2)
    if isinstance(guidance_scale, Tensor):
        guidance_scale = expand(guidance_scale, output_cond)
    output = both.combine(output_null, output_cond, guidance_scale)
    return Prediction(denoiser.schedule, x_t, t, output, both.kind, both.combine)
