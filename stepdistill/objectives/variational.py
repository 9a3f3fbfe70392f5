"""Variational score distillation as SwiftBrush takes it (2312.05239), from ProlificDreamer (2305.16213)."""

from torch import Tensor

from stepdistill.schedule import expand


def variational_score_gradient(teacher_eps: Tensor, fake_score_eps: Tensor, sigma: Tensor) -> Tensor:
    """``g = sigma_t^2 (eps_teacher - eps_fake)``, (B, ...); sigma (B,) of the level of both predictions.

    The released code has w(t) = sigma_t^2.  In scores it is ``sigma_t^3 (s_fake - s_teacher)``: the direction of the
    gradient of KL(student || teacher) at one level.  As in both papers the factor dx_t/dx0 = alpha_t is dropped.
    """
    return expand(sigma, teacher_eps) ** 2 * (teacher_eps - fake_score_eps)
