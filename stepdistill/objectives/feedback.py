"""Losses that pull pictures towards a higher reward."""

import torch
from torch import Tensor


def hinge_loss(reward: Tensor, hinge: float | None) -> Tensor:
    """``mean max(0, a - r)``, a scalar, for a reward r (B,) and a hinge a: Hyper-SD's eq. 13 (2404.13686).

    ``hinge`` None is plain maximisation, ``mean -r``.  The clamp is per sample, before the mean: a picture whose reward
    is at the hinge or above it has a gradient of exactly 0 (at the kink too), the others have ``-1/B`` each.  A reward
    that is not finite makes the loss a NaN: an infinite one is not good enough, it is broken.
    """
    return -reward.mean() if hinge is None else (torch.relu(hinge - reward) + 0 * reward).mean()
