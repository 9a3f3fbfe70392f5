"""Denoising score matching: the loss of fake scores and of teachers."""

from torch import Tensor

from stepdistill.denoiser import Prediction
from stepdistill.schedule import PredictionType, Schedule, expand


def denoising_loss(
    prediction: Prediction, x0: Tensor, eps: Tensor, target: PredictionType, weight: Tensor | None = None
) -> Tensor:
    """Mean squared error of ``prediction`` to the sample and noise in its x_t, measured as ``target``.  A scalar.

    x0, eps: (B, ...), the sample and the noise in ``x_t = alpha x0 + sigma eps``; weight: (B,), 1 by default.

    - eps: ``mean |eps_hat - eps|^2`` (2006.11239 eq. 14), DMD2's fake-score loss for Stable Diffusion and SDXL; equal
      to the SNR-weighted x0 error.
    - v, flow: the same of those targets; v on VP is ``1/alpha^2`` times the eps error, so the highest noise levels
      (where alpha is near 0) are trained too.
    - x0, edm: the x0 error; on an EDM schedule weighted by ``sigma^-2 + sigma_data^-2`` (2206.00364, table 1, up to a
      constant), DMD2's choice for ImageNet.
    """
    schedule, x_t, t = prediction.schedule, prediction.x_t, prediction.t
    if target in ("x0", "edm"):
        error = (prediction.x0 - x0).square()
        x0_weight = schedule.x0_weight(t)
        if x0_weight is not None:
            error = error * expand(x0_weight, error)
    else:
        error = (prediction.of(target) - schedule.target(x0, eps, target, x_t, t)).square()
    return (error if weight is None else error * expand(weight, error)).mean()


def capped_snr_weight(schedule: Schedule, t: Tensor, cap: float) -> Tensor:
    """``min(1, (cap + 1) / (SNR + 1))`` (B,), a weight for v's error: as min-SNR weighting (2303.09556) where the noise
    is small, but 1 and not 0 where it is all, which one-step students start from."""
    alpha, sigma = schedule.alpha_sigma(t)
    return ((cap + 1) * sigma**2 / (alpha**2 + sigma**2)).clamp(max=1).float()
