"""A scalar whose gradient in the sample is a given one: how a method that states a gradient becomes a loss."""

from torch import Tensor


def surrogate_loss(x0: Tensor, gradient: Tensor) -> Tensor:
    """``1/2 mean (x0 - stopgrad(x0 - g))^2``: a scalar whose gradient in x0 is exactly ``g / (B D)``.

    x0, gradient: (B, ...) with D elements a sample; mean over batch and elements (2311.18828 eq. 7; 2312.05239).  Its
    value, ``1/2 mean g^2``, is a diagnostic and not an objective: it starts near zero (the fake score is the teacher)
    and rises first.
    """
    return 0.5 * (x0 - (x0 - gradient).detach()).square().mean()
