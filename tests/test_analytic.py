"""Closed-form denoisers against the sheets' formulas and against sampling."""

import pytest
import torch
from toys import linear_betas, zero_snr

from stepdistill.analytic import GaussianMixture
from stepdistill.denoiser import guided


def test_gaussian_posterior_mean_is_the_formula():
    schedule = linear_betas()
    mean = torch.tensor([[0.5, -0.3]], dtype=torch.float64)
    covariance = torch.tensor([[0.25, 0.1], [0.1, 0.16]], dtype=torch.float64)
    denoiser = GaussianMixture(mean, covariance).denoiser(schedule)
    x_t = torch.randn(7, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.full((7,), 400)
    alpha, sigma = (c[0] for c in schedule.alpha_sigma(t))
    inverse = torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(2, dtype=torch.float64))
    expected = mean + alpha * (x_t - alpha * mean) @ (covariance @ inverse).T
    torch.testing.assert_close(denoiser(x_t, t, {}).x0, expected)


@pytest.mark.parametrize("level", [50, 500, 950])
def test_mixture_score_is_the_gradient_of_its_log_density(level):
    mixture = GaussianMixture([[-1.0, 0.2], [0.7, 0.5], [0.1, -1.0]], 0.1, weights=[0.5, 0.3, 0.2])
    denoiser = mixture.denoiser(linear_betas())
    x_t = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    t = torch.full((6,), level)
    (gradient,) = torch.autograd.grad(denoiser.log_density(x_t, t).sum(), x_t)
    torch.testing.assert_close(denoiser(x_t, t, {}).score.detach(), gradient)


def test_labels_choose_components_and_the_null_label_is_the_whole():
    mixture = GaussianMixture([[-2.0], [2.0]], 0.1, labels=[0, 1])
    assert mixture.num_labels == 2
    denoiser = mixture.denoiser(zero_snr())
    x_t, t = torch.zeros(3, 1, dtype=torch.float64), torch.full((3,), 999)
    x0 = denoiser(x_t, t, {"label": torch.tensor([0, 1, 2])}).x0[:, 0]
    torch.testing.assert_close(x0, torch.tensor([-2.0, 2.0, 0.0], dtype=torch.float64))
    samples = mixture.sample(2000, torch.Generator().manual_seed(0), torch.ones(2000, dtype=torch.long))
    assert samples.mean().item() == pytest.approx(2.0, abs=0.03)
    assert samples.std().item() == pytest.approx(0.1**0.5, abs=0.02)


def test_guidance_is_null_plus_scale_times_difference_and_one_is_none():
    mixture = GaussianMixture([[-2.0], [2.0]], 0.5, labels=[0, 1])
    denoiser = mixture.denoiser(linear_betas())
    x_t = torch.randn(4, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([20, 300, 700, 999])
    label, null = {"label": torch.tensor([0, 1, 0, 1])}, {"label": torch.full((4,), 2)}
    cond, uncond = denoiser(x_t, t, label), denoiser(x_t, t, null)
    for scale in (0.0, 1.75, 4.5):
        expected = uncond.x0 + scale * (cond.x0 - uncond.x0)
        torch.testing.assert_close(guided(denoiser, x_t, t, label, null, scale).x0, expected)
        eps = uncond.eps + scale * (cond.eps - uncond.eps)
        torch.testing.assert_close(guided(denoiser, x_t, t, label, null, scale).eps, eps)
    torch.testing.assert_close(guided(denoiser, x_t, t, label, None, 1.0).x0, cond.x0, rtol=0, atol=0)
    per_sample = torch.tensor([0.0, 1.0, 2.0, 3.0], dtype=torch.float64)
    result = guided(denoiser, x_t, t, label, null, per_sample).x0
    torch.testing.assert_close(result, uncond.x0 + per_sample[:, None] * (cond.x0 - uncond.x0))
