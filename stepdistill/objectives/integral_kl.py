"""The gradient of the integral KL divergence (Diff-Instruct, 2305.18455)."""

from typing import Literal

from torch import Tensor

Weight = Literal["x0", "sigma2", "one"]
"""w(t) of the scores: ``sigma^2 / alpha^2``, ``sigma^2``, or 1."""


def integral_kl_gradient(
    teacher_x0: Tensor, fake_score_x0: Tensor, alpha: Tensor, sigma: Tensor, weight: Weight
) -> Tensor:
    """``w(t) (s_fake(x_t) - s_teacher(x_t)) dx_t/dx0``, each prediction and the result (B, ...), alpha and sigma (B,).

    2305.18455: the gradient in the student of ``int w(t) KL(p_student,t || p_teacher,t) dt`` at one noise level.  With
    ``x_t = alpha x0 + sigma eps`` and ``s = (alpha m - x_t) / sigma^2`` it is
    ``w(t) alpha^2 / sigma^2 (m_fake - m_teacher)``.  ``x0``: ``w = sigma^2 / alpha^2``, so the difference of the
    predictions of x0 itself, which DMD divides by a distance besides; ``sigma2``: ``w = sigma^2``; ``one``: ``w = 1``,
    the plain sum over levels, which grows without bound towards t = 0.
    """
    factor = {"x0": alpha * 0 + 1, "sigma2": alpha**2, "one": alpha**2 / sigma**2}[weight]
    difference = fake_score_x0 - teacher_x0
    return factor.to(difference.dtype).reshape(-1, *[1] * (difference.ndim - 1)) * difference
