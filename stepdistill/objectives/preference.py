"""Pairwise sample optimisation's loss (PSO, 2410.03190): a preferred sample against another, relative to the frozen
student.

    L = -E log sigmoid( beta sum_n [l_n(winner) - l_n(loser)] ),   l_n = log p(x_(n-1) | x_n) - log p_ref(x_(n-1) | x_n)

``l_n`` of a sampler's move is :func:`gaussian_log_ratio`, the tuned model's log density less the frozen one's; of a
picture that was not sampled it is :func:`denoising_log_ratio` (Diffusion-DPO, 2311.12908, at the student's own times).
``reduction``: ``sum`` over a sample's D = C H W dimensions gives nats, ``mean`` divides by D, so that beta counts
``beta / D`` per nat: PSO's released code has the mean and beta = 50, which at 4x64x64 latents is 0.003 per nat.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from stepdistill.schedule import expand

Reduction = Literal["mean", "sum"]
OverSteps = Literal["step", "sum"]


def reduce_dims(values: Tensor, reduction: Reduction) -> Tensor:
    """(B, ...) to (B,): the mean or the sum over a sample's dimensions, in float32 or better."""
    flat = values.to(torch.promote_types(values.dtype, torch.float32)).flatten(1)
    return flat.mean(1) if reduction == "mean" else flat.sum(1)


def gaussian_log_prob(x: Tensor, mean: Tensor, std: Tensor, reduction: Reduction = "mean") -> Tensor:
    """``log N(x; mean, std^2 I)``, (B,), in float32 or better whatever comes in.

    x, mean: (B, ...); std: (B,), above 0: a deterministic move has no density.  The gradient in ``mean`` is
    ``(x - mean) / std^2`` (over D with ``mean``).
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, mean.dtype), torch.float32)
    std = expand(std, x.to(dtype))
    error = (x.to(dtype) - mean.to(dtype)) / std
    return reduce_dims(-0.5 * error.square() - std.log() - 0.5 * math.log(2 * math.pi), reduction)


def gaussian_log_ratio(
    x: Tensor, mean: Tensor, reference_mean: Tensor, std: Tensor, reduction: Reduction = "mean"
) -> Tensor:
    """``log N(x; mean, std^2 I) - log N(x; reference_mean, std^2 I)``, (B,).

    As ``(mean - reference_mean) . (x - (mean + reference_mean) / 2) / std^2``: the difference of two log densities
    without subtracting them, so float32 does not lose it between two sums over 65,536 dimensions, and equal means give
    exactly 0.
    Shapes as in :func:`gaussian_log_prob`.
    """
    dtype = torch.promote_types(torch.promote_types(x.dtype, mean.dtype), torch.float32)
    x, mean, reference_mean = (part.to(dtype) for part in (x, mean, reference_mean))
    product = (mean - reference_mean) * (x - (mean + reference_mean) / 2)
    return reduce_dims(product / expand(std, x) ** 2, reduction)


def denoising_log_ratio(error: Tensor, reference_error: Tensor, factor: float | Tensor = 0.5) -> Tensor:
    """``-factor (|e - e_theta|^2 - |e - e_ref|^2)``, (B,): the bound's log ratio of a noised picture.

    error, reference_error: (B,), squared errors of the tuned and the frozen model, reduced alike.  ``factor``: 1/2 for
    pairs of pictures, which makes ``beta (l_w - l_l)`` Diffusion-DPO's logit; 1 as PSO prints the target's side against
    the model's own samples; ``SNR(t_(n-1)) / (2 SNR(t_n))`` makes an eps error the transition's expected log ratio.
    """
    return -factor * (error - reference_error)


def clamp_log_ratio(log_ratio: Tensor, limit: float | None) -> Tensor:
    """``log clamp(exp(l), 1 - limit, 1 + limit)``: beyond it the gradient is exactly 0; None leaves it alone.

    D3PO's and PSO's clamp (limit 0.1).  It acts on either side, so also on a winner that has fallen below 1 - limit.
    """
    return log_ratio if limit is None else log_ratio.clamp(math.log(1 - limit), math.log(1 + limit))


def preference_loss(
    winner: Tensor, loser: Tensor, beta: float, over_steps: OverSteps = "step", counts: Tensor | None = None
) -> Tensor:
    """The mean of ``-log sigmoid(beta (l_w - l_l))`` over pairs, a scalar.

    winner, loser: log ratios (B, M) of M moves, clamped if they are to be.  ``step``: a sigmoid for each move and the
    mean over moves, as the released code has it; ``sum``: the paper's one sigmoid of the summed logit.  By Jensen
    ``softplus(-beta sum_n z_n) <= mean_n softplus(-M beta z_n)``.

    counts: (B,), False for a tie.  A tie is no preference and is left out of the mean; with ties alone the loss is 0,
    with a gradient of 0.
    """
    logit = beta * (winner - loser)
    if over_steps == "sum":
        logit = logit.sum(1, keepdim=True)
    loss = torch.nn.functional.softplus(-logit).mean(1)
    if counts is None:
        return loss.mean()
    counts = counts.to(loss.dtype)
    return (loss * counts).sum() / counts.sum().clamp(min=1)
