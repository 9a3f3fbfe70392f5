"""BOOT's losses on the signal of a trajectory (2306.05544): ``y_t = (x_t - sigma_t eps) / alpha_t``, eps the noise that
the trajectory started from."""

from torch import Tensor

from stepdistill.schedule import expand


def signal_target(y_t: Tensor, x0: Tensor, weight: Tensor) -> Tensor:
    """``y_t + w (f(x_t, t) - y_t)``: the signal one DDIM step on.  y_t, x0 (the teacher's): (B, ...); weight: (B,).

    With ``w = 1 - alpha_t sigma_s / (sigma_t alpha_s)`` (``Schedule.signal_weight``) this is exactly that step; the
    paper's Euler form has ``(t - s) lambda'_t`` in its place, its limit, which overshoots on coarse steps near t = 0.
    """
    return y_t + expand(weight, y_t) * (x0 - y_t)


def bootstrap_loss(y_s: Tensor, target: Tensor, weight: Tensor, floor: float) -> Tensor:
    """Mean of ``|y_s - target|^2 / max(w^2, floor)``, a scalar; y_s, target: (B, ...), weight w: (B,).

    Without the division the loss is of order w^2 and the times with the shortest steps would not be trained; the floor
    keeps them from drowning the others.  The target's gradient is the caller's to stop.
    """
    return ((y_s - target).square() / expand(weight.square().clamp(min=floor), y_s)).mean()
