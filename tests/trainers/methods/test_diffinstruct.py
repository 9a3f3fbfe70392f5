"""Diff-Instruct's gradient is that of the KL divergence at one noise level, and DMD's but for the normaliser."""

from __future__ import annotations

import pytest
import torch
from toys import linear_betas, sigma_points, toy_family, toy_trainer

from stepdistill.analytic import GaussianMixture
from stepdistill.objectives.distribution_matching import distribution_matching_gradient
from stepdistill.objectives.integral_kl import integral_kl_gradient

F64 = torch.float64
WEIGHTS = {"one": lambda a, s: 1.0, "sigma2": lambda a, s: s**2, "x0": lambda a, s: s**2 / a**2}


def kl(mean, deviation, other_mean, other_variance, alpha, sigma):
    """KL of two noised Gaussians of one dimension."""
    p, q = alpha**2 * deviation**2 + sigma**2, alpha**2 * other_variance + sigma**2
    return 0.5 * (p / q + alpha**2 * (mean - other_mean) ** 2 / q - 1 - (p / q).log())


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("level", [50, 400, 900])
def test_it_is_the_gradient_of_the_kl_at_one_level(weight, level):
    """x0 = mean + deviation z; sigma points make the means of quadratics exact."""
    schedule = linear_betas()
    points = sigma_points(2)
    z, noise = (points[:, i].reshape(-1, 1, 1, 1) for i in (0, 1))
    t = torch.full((len(points),), level)
    alpha, sigma = schedule.alpha_sigma(t)
    mean, deviation = torch.tensor(0.7, dtype=F64).requires_grad_(), torch.tensor(0.4, dtype=F64).requires_grad_()
    x0 = mean + deviation * z
    x_t = schedule.add_noise(x0.detach(), noise, t)
    teacher = GaussianMixture([[-0.3]], 0.09).denoiser(schedule)(x_t, t, {})
    fake_score = GaussianMixture([[0.7]], 0.16).denoiser(schedule)(x_t, t, {})
    gradient = integral_kl_gradient(teacher.x0, fake_score.x0, alpha, sigma, weight)
    result = torch.autograd.grad((gradient * x0).mean(), (mean, deviation))
    a, s = alpha[0].double(), sigma[0].double()
    divergence = WEIGHTS[weight](a, s) * kl(mean, deviation, -0.3, torch.tensor(0.09), a, s)
    expected = torch.autograd.grad(divergence, (mean, deviation))
    torch.testing.assert_close(torch.stack(result), torch.stack(expected), rtol=1e-5, atol=1e-7)


def test_it_is_dmds_gradient_times_the_normaliser():
    x0, teacher, fake_score = torch.randn(3, 4, 2, 2, 2).unbind()
    alpha, sigma = torch.rand(2, 4)
    distance = (x0 - teacher).abs().flatten(1).mean(1).reshape(-1, 1, 1, 1)
    ours = integral_kl_gradient(teacher, fake_score, alpha, sigma, "x0")
    torch.testing.assert_close(ours, distance * distribution_matching_gradient(x0, teacher, fake_score))


def test_the_student_is_led_by_it_and_rests_where_the_fake_score_is_the_teacher():
    trainer = toy_trainer(toy_family(), method="diffinstruct")
    batch = trainer.method.next_batch()
    x0 = trainer.method.make_sample(batch).detach()
    state = trainer.noise.get_state()
    gradient = 2 * 8 * trainer.method.sample_gradient(x0, batch)
    trainer.noise.set_state(state)
    pair = trainer.method.predict_both(x0.detach(), batch.condition)
    alpha, sigma = trainer.family.schedule.alpha_sigma(pair.t)
    expected = integral_kl_gradient(pair.teacher.x0, pair.fake_score.x0, alpha, sigma, "sigma2")
    torch.testing.assert_close(gradient, expected)
    assert gradient.abs().max() > 0
    trainer.noise.set_state(state)
    same = integral_kl_gradient(pair.teacher.x0, pair.teacher.x0, alpha, sigma, "one")
    assert (same == 0).all()


def test_the_fake_score_is_updated_first():
    trainer = toy_trainer(toy_family(), method="diffinstruct")
    assert [name for name, _ in trainer.method.updates()] == ["fake_score", "student"]
