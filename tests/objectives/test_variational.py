"""SwiftBrush's objectives against Gaussian closed forms, float64."""

import pytest
import torch

from stepdistill.objectives.alignment import clamped_cosine_loss
from stepdistill.objectives.denoising import denoising_loss
from stepdistill.objectives.surrogate import surrogate_loss
from stepdistill.objectives.variational import variational_score_gradient

F64 = torch.float64


def predictions(g):
    x0 = (g.z @ g.B.T + g.a).detach()
    x_t = g.schedule.add_noise(x0, g.n, g.t)
    return x0, g.teacher(x_t, g.t, {}), g.fake_score(x_t, g.t, {})


def test_expected_gradient_is_the_sheets(gaussians):
    """w sigma alpha Q^-1 (a - m) and w sigma alpha (Q^-1 - P^-1) B with w = sigma^2."""
    g = gaussians
    _, teacher, fake = predictions(g)
    gradient = variational_score_gradient(teacher.eps, fake.eps, g.sigma.expand(len(g.z)))
    factor = g.sigma**3 * g.alpha
    # the linear map multiplies a difference of two predictions, so the tolerance is absolute in its size
    torch.testing.assert_close(gradient.mean(0), factor * g.Q_inverse @ g.delta / g.alpha, rtol=1e-6, atol=1e-9)
    with_z = (gradient[:, :, None] * g.z[:, None]).mean(0)
    expected = factor * (g.Q_inverse - g.P_inverse) @ g.B.detach()
    torch.testing.assert_close(with_z, expected, rtol=1e-6, atol=1e-9)


def test_it_is_sigma_cubed_times_the_score_difference(gaussians):
    g = gaussians
    _, teacher, fake = predictions(g)
    gradient = variational_score_gradient(teacher.eps, fake.eps, g.sigma.expand(len(g.z)))
    torch.testing.assert_close(gradient, g.sigma**3 * (fake.score - teacher.score), rtol=1e-6, atol=1e-9)


def test_fake_scores_optimum_is_the_students_exact_eps(gaussians):
    """e = sigma P^-1 (x - alpha a): stationary in every affine direction, with or without the alpha^2 weight."""
    g = gaussians
    x0, _, fake = predictions(g)
    x_t = g.schedule.add_noise(x0, g.n, g.t)
    torch.testing.assert_close(fake.eps, g.sigma * (x_t - g.alpha * g.a.detach()) @ g.P_inverse, rtol=1e-6, atol=1e-9)
    weight = (g.alpha**2).expand(len(x0))
    plain = denoising_loss(fake, x0, g.n, "eps")
    torch.testing.assert_close(denoising_loss(fake, x0, g.n, "eps", weight), g.alpha**2 * plain)


def test_weight_is_one_number_a_sample():
    sigma = torch.tensor([0.5, 2.0], dtype=F64)
    one = torch.ones(2, 3, dtype=F64)
    torch.testing.assert_close(variational_score_gradient(2 * one, one, sigma), sigma[:, None] ** 2 * one)


def test_loss_is_half_the_mean_square_of_the_gradient():
    x0, g = torch.randn(2, 4, 2, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(0))
    leaf = x0.clone().requires_grad_()
    loss = surrogate_loss(leaf, g)
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(gradient, g / g.numel())
    torch.testing.assert_close(loss.detach(), 0.5 * g.square().mean())


def test_clip_loss_is_clamped_per_sample_before_the_mean():
    cosine = torch.tensor([0.5, 0.1, -0.2], dtype=F64, requires_grad=True)
    loss = clamped_cosine_loss(cosine, 0.35)
    assert loss.item() == pytest.approx((0 + 0.25 + 0.55) / 3)
    (gradient,) = torch.autograd.grad(loss, cosine)
    assert gradient.tolist() == pytest.approx([0, -1 / 3, -1 / 3])
    clamped_mean = (0.35 - cosine.mean()).clamp(min=0)  # the wrong order: the first sample would be pushed too
    assert clamped_mean.item() != pytest.approx(loss.item())
