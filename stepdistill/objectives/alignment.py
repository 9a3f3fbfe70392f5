"""Losses that pull pictures towards their prompts."""

from torch import Tensor


def clamped_cosine_loss(cosine: Tensor, tau: float) -> Tensor:
    """``mean max(0, tau - cosine)``, a scalar; cosine (B,) of each picture's embedding with its prompt's.

    SwiftBrush v2's clamped CLIP loss (2408.14176 section 4.3).  The clamp is per sample: a picture that already fits
    its prompt has no gradient, whatever the others in its batch do.
    """
    return (tau - cosine).clamp(min=0).mean()
