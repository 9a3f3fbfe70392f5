"""Score Implicit Matching (2410.16794): divergences of scores, and their exact gradient without the student's score.

For a distance d with d(y) = 0 only at y = 0, ``D = E_t w(t) E_x d(y_t(x))`` with ``y_t = s_fake - s_teacher``, the
expectation over x_t from the student with its law held fixed.  The score-projection identity turns the derivative of
the student's unknown score into a pathwise one (restated with proof in eqs. 13-21 of the same group's later paper):

    dD/dtheta = d/dtheta E[ -w(t) d'(y_t(x_t))^T (s_fake(x_t) - grad log q(x_t | x0)) ].

Teacher and fake score are *functions* here: their parameters are frozen, but the dependence on x_t, the normaliser in
d' included, must stay differentiable.  Detached networks give another method (the scaled gradient of the KL divergence,
which is DMD's and VSD's direction).

In x0 both factors are differences of predictions, ``y = (alpha/sigma^2) (m_fake - m_teacher)`` and
``residual = (alpha/sigma^2) (m_fake - x0)``; both may be taken without the factor (space ``x0``), which is the same
theorem for the distance ``y -> d(sigma^2/alpha y)`` and has no variance that explodes as sigma goes to 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from stepdistill.denoiser import Prediction
from stepdistill.schedule import SIGMA_MIN, expand

Space = Literal["x0", "score"]


class Distance(Protocol):
    """d: a differentiable function of one sample's difference, zero only at zero."""

    def value(self, y: Tensor) -> Tensor:
        """d(y), (B,), for y (B, ...)."""

    def gradient(self, y: Tensor) -> Tensor:
        """d'(y), (B, ...), differentiable in y."""


@dataclass(frozen=True)
class SquaredL2:
    """``d(y) = ||y||^2`` over all elements of a sample, ``d' = 2 y``."""

    def value(self, y: Tensor) -> Tensor:
        return y.square().flatten(1).sum(1)

    def gradient(self, y: Tensor) -> Tensor:
        return 2 * y


@dataclass(frozen=True)
class PseudoHuber:
    """``d(y) = sqrt(||y||^2 + c^2) - c`` with one norm a sample, ``d' = y / sqrt(||y||^2 + c^2)``; c > 0.

    c is in the unit of y, so it means another thing in each space.  At c = 0 the gradient where y = 0 (fake score =
    teacher, as at the start) is not a number.
    """

    c: float

    def _root(self, y: Tensor) -> Tensor:
        return (y.square().flatten(1).sum(1) + self.c**2).sqrt()

    def value(self, y: Tensor) -> Tensor:
        return self._root(y) - self.c

    def gradient(self, y: Tensor) -> Tensor:
        return y / expand(self._root(y), y)


def score_terms(teacher: Prediction, fake_score: Prediction, x0: Tensor, space: Space) -> tuple[Tensor, Tensor]:
    """``y`` and ``residual``, (B, ...) each, of the sample x0 (B, ...) at the predictions' x_t and t.

    ``score``: ``y = s_fake - s_teacher``, ``residual = s_fake + eps/sigma``; ``x0``: both times sigma^2/alpha, that is
    ``m_fake - m_teacher`` and ``m_fake - x0``.
    """
    difference, residual = fake_score.x0 - teacher.x0, fake_score.x0 - x0
    if space == "x0":
        return difference, residual
    alpha, sigma = (expand(c, x0) for c in teacher.schedule.alpha_sigma(teacher.t))
    scale = alpha / sigma.clamp(min=SIGMA_MIN) ** 2
    return scale * difference, scale * residual


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).flatten(1).sum(1)


def sim_loss(y: Tensor, residual: Tensor, distance: Distance) -> Tensor:
    """``-d'(y)^T residual``, one number a sample, (B,): SIM's loss (2410.16794) before weight and mean.

    Its value is signed and stays near 0: it does not measure progress.
    """
    return -_dot(distance.gradient(y), residual)


def full_loss(y: Tensor, residual: Tensor, distance: Distance) -> Tensor:
    """``d(y) - d'(y)^T residual``, (B,): the divergence's gradient with the sampling law followed too.

    The ``+ d(y)`` is the later papers' of the same group; whether 2410.16794 ever keeps it could not be verified.
    """
    return distance.value(y) + sim_loss(y, residual, distance)


def sid_loss(y: Tensor, residual: Tensor, alpha: float) -> Tensor:
    """``(1 - alpha) ||y||^2 - y^T residual``, (B,): score identity distillation (SiD, 2404.04057).

    alpha = 1 is half of SIM with the squared distance, alpha = 1/2 half of its full form; the authors' 1.2 is neither.
    """
    return (1 - alpha) * _dot(y, y) - _dot(y, residual)


def sid_weight(x0: Tensor, teacher_x0: Tensor) -> Tensor:
    """``1 / stopgrad(mean_CHW |x0 - m_teacher|)``, (B,), the mean at least 1e-5 (SiD's released code)."""
    return 1 / (x0 - teacher_x0).detach().abs().flatten(1).mean(1).clamp(min=1e-5)
