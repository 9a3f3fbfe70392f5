"""The distance of consistency distillation."""

from torch import Tensor


def consistency_distance(a: Tensor, b: Tensor, huber_c: float | None = None) -> Tensor:
    """Mean squared error, or with ``huber_c`` the mean of ``sqrt((a - b)^2 + c^2) - c``, as latent-consistency and
    phased-consistency training use it (c = 1e-3).  a, b: one shape; a scalar."""
    squared = (a - b).square()
    if huber_c is None:
        return squared.mean()
    return ((squared + huber_c**2).sqrt() - huber_c).mean()
