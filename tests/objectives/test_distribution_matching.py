"""DMD2's objectives against Gaussian closed forms, float64.  Expectations over sigma points are exact, not sampled."""

import math

import pytest
import torch
from toys import linear_betas, sigma_points

from stepdistill.analytic import GaussianMixture
from stepdistill.denoiser import Prediction
from stepdistill.objectives.adversarial import discriminator_loss, generator_loss
from stepdistill.objectives.denoising import denoising_loss
from stepdistill.objectives.distribution_matching import distribution_matching_gradient
from stepdistill.objectives.surrogate import surrogate_loss
from stepdistill.schedule import EDMSchedule

D = 3


@pytest.fixture(params=[20, 249, 749, 980])
def gaussian(request):
    """Data N(mu, S), a linear student G(z) = A z + b, and the sheet's P and Q at one time."""
    generator = torch.Generator().manual_seed(request.param)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    schedule = linear_betas()
    mu, root, A, b = draw(D), draw(D, D), draw(D, D), draw(D)
    S = root @ root.T + 0.1 * torch.eye(D)
    t = torch.full((4 * D,), request.param)
    alpha, sigma = (c[0] for c in schedule.alpha_sigma(t))
    eye = torch.eye(D, dtype=torch.float64)
    P = torch.linalg.inv(alpha**2 * S + sigma**2 * eye)
    Q = torch.linalg.inv(alpha**2 * A @ A.T + sigma**2 * eye)
    points = sigma_points(2 * D)  # z and the noise n together
    z, n = points[:, :D], points[:, D:]
    x0 = z @ A.T + b
    x_t = schedule.add_noise(x0, n, t)
    names = "schedule mu S A b t alpha sigma P Q z n x0 x_t"
    return dict(zip(names.split(), (schedule, mu, S, A, b, t, alpha, sigma, P, Q, z, n, x0, x_t), strict=True))


def exact(g, mean, covariance):
    return GaussianMixture(mean[None], covariance).denoiser(g["schedule"])(g["x_t"], g["t"], {})


def test_expected_x0_difference_is_the_sheets(gaussian):
    g = gaussian
    difference = exact(g, g["b"], g["A"] @ g["A"].T).x0 - exact(g, g["mu"], g["S"]).x0
    torch.testing.assert_close(difference.mean(0), g["sigma"] ** 2 * g["P"] @ (g["b"] - g["mu"]))
    with_z = (difference[:, :, None] * g["z"][:, None]).mean(0)
    torch.testing.assert_close(with_z, g["sigma"] ** 2 * (g["P"] - g["Q"]) @ g["A"])


def test_score_form_is_the_gradient_of_the_kl(gaussian):
    g = gaussian
    A, b = g["A"].clone().requires_grad_(), g["b"].clone().requires_grad_()
    eye = torch.eye(D, dtype=torch.float64)
    covariance = g["alpha"] ** 2 * A @ A.T + g["sigma"] ** 2 * eye
    kl = torch.distributions.kl_divergence(
        torch.distributions.MultivariateNormal(g["alpha"] * b, covariance),
        torch.distributions.MultivariateNormal(g["alpha"] * g["mu"], torch.linalg.inv(g["P"])),
    )
    grad_A, grad_b = torch.autograd.grad(kl, (A, b))
    scores = exact(g, g["b"], g["A"] @ g["A"].T).score - exact(g, g["mu"], g["S"]).score
    difference = g["alpha"] * scores
    torch.testing.assert_close(difference.mean(0), grad_b)
    torch.testing.assert_close((difference[:, :, None] * g["z"][:, None]).mean(0), grad_A)


def test_a_stale_fake_score_shifts_the_gradient_as_derived(gaussian):
    g = gaussian
    stale_b, stale_F = g["b"] + 0.3, 0.5 * g["S"]
    eye = torch.eye(D, dtype=torch.float64)
    stale_Q = torch.linalg.inv(g["alpha"] ** 2 * stale_F + g["sigma"] ** 2 * eye)
    difference = g["alpha"] * (exact(g, stale_b, stale_F).score - exact(g, g["mu"], g["S"]).score)
    expected = g["alpha"] ** 2 * (g["P"] @ (g["b"] - g["mu"]) - stale_Q @ (g["b"] - stale_b))
    torch.testing.assert_close(difference.mean(0), expected)


@pytest.mark.parametrize("target", ["x0", "eps"])
def test_fake_score_loss_has_the_exact_denoiser_as_its_minimum_and_floor(gaussian, target):
    g = gaussian
    F = g["A"] @ g["A"].T
    prediction = exact(g, g["b"], F)
    floor = g["sigma"] ** 2 * (F @ g["Q"]).trace() / D if target == "x0" else g["alpha"] ** 2 * (F @ g["Q"]).trace() / D
    loss = denoising_loss(prediction, g["x0"], g["n"], target)
    torch.testing.assert_close(loss, floor)
    gain = torch.eye(D, dtype=torch.float64).requires_grad_()
    shift = torch.zeros(D, dtype=torch.float64, requires_grad=True)
    moved = Prediction(g["schedule"], g["x_t"], g["t"], prediction.x0 @ gain.T + shift, "x0")
    gradients = torch.autograd.grad(denoising_loss(moved, g["x0"], g["n"], target), (gain, shift))
    for gradient in gradients:  # stationary in every affine direction
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-8)


def test_eps_error_is_the_snr_weighted_x0_error(gaussian):
    g = gaussian
    prediction = exact(g, g["mu"], g["S"])
    snr = g["alpha"] ** 2 / g["sigma"] ** 2
    torch.testing.assert_close(
        denoising_loss(prediction, g["x0"], g["n"], "eps"), snr * denoising_loss(prediction, g["x0"], g["n"], "x0")
    )


def test_v_error_is_the_eps_error_over_alpha_squared(gaussian):
    g = gaussian
    prediction = exact(g, g["mu"], g["S"])
    eps = denoising_loss(prediction, g["x0"], g["n"], "eps")
    torch.testing.assert_close(denoising_loss(prediction, g["x0"], g["n"], "v"), eps / g["alpha"] ** 2)


def test_edm_weights_the_x0_error():
    schedule = EDMSchedule()
    t = torch.tensor([0.5, 2.0], dtype=torch.float64)
    x0, n = torch.randn(2, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    prediction = Prediction(schedule, x0 + t[:, None] * n, t, torch.zeros_like(x0), "x0")
    weight = t**-2 + 4
    torch.testing.assert_close(denoising_loss(prediction, x0, n, "edm"), (weight[:, None] * x0**2).mean())


# -- the normalised gradient ---------------------------------------------------------------------------------


def three(batch=4, seed=0):
    return torch.randn(3, batch, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_loss_gradient_is_g_over_its_elements_and_its_value_half_the_mean_square():
    x0, teacher, fake = three()
    g = distribution_matching_gradient(x0, teacher, fake)
    leaf = x0.clone().requires_grad_()
    loss = surrogate_loss(leaf, g)
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(gradient, g / g.numel(), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(loss.detach(), 0.5 * g.square().mean())


def test_normaliser_is_one_number_a_sample():
    x0, teacher, fake = three()
    g = distribution_matching_gradient(x0, teacher, fake)
    for i in range(len(x0)):
        torch.testing.assert_close(g[i], (fake[i] - teacher[i]) / (x0[i] - teacher[i]).abs().mean())
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(distribution_matching_gradient(x0[order], teacher[order], fake[order]), g[order])
    scaled = [7.0 * a for a in (x0, teacher, fake)]
    torch.testing.assert_close(distribution_matching_gradient(*scaled), g)


def test_zero_distance_gives_zero_and_not_nan():
    x0, _, fake = three()
    assert (distribution_matching_gradient(x0, x0.clone(), fake) == 0).all()
    mixed = torch.cat([x0[:1], x0[1:] + 1])
    g = distribution_matching_gradient(x0, mixed, fake)
    assert (g[0] == 0).all()
    assert (g[1:] != 0).all()


def test_fake_score_equal_to_the_teacher_gives_exactly_zero():
    x0, teacher, _ = three()
    assert (distribution_matching_gradient(x0, teacher, teacher.clone()) == 0).all()


@pytest.mark.parametrize(("level", "expected"), [(20, 0.109), (249, 0.437), (749, 0.697)])
def test_size_of_the_normaliser_at_the_optimum(level, expected):
    """Mean |x0 - m| at the optimum with variance 0.8 is sqrt(2/pi) times the posterior's deviation."""
    schedule = linear_betas()
    alpha, sigma = (c[0].item() for c in schedule.alpha_sigma(torch.tensor([level])))
    variance = 0.8 * sigma**2 / (alpha**2 * 0.8 + sigma**2)
    assert math.sqrt(2 / math.pi * variance) == pytest.approx(expected, abs=1e-3)
    generator = torch.Generator().manual_seed(0)
    x0, n = torch.randn(2, 200_000, 1, dtype=torch.float64, generator=generator)
    x0 = x0 * 0.8**0.5
    t = torch.full((len(x0),), level)
    teacher = GaussianMixture([[0.0]], 0.8).denoiser(schedule)(schedule.add_noise(x0, n, t), t, {}).x0
    assert (x0 - teacher).abs().mean().item() == pytest.approx(expected, rel=0.01)


# -- adversarial ---------------------------------------------------------------------------------------------


def test_generator_gradient_through_the_optimal_discriminator_is_a_score_difference(gaussian):
    """2405.14867: with l = log q_teacher - log q_student, grad softplus(-l) = sigmoid(-l) (s_fake - s_teacher)."""
    g = gaussian
    real = GaussianMixture(g["mu"][None], g["S"]).denoiser(g["schedule"])
    fake = GaussianMixture(g["b"][None], g["A"] @ g["A"].T).denoiser(g["schedule"])
    x_t = g["x_t"].clone().requires_grad_()
    logit = real.log_density(x_t, g["t"]) - fake.log_density(x_t, g["t"])
    (gradient,) = torch.autograd.grad(generator_loss(logit) * len(x_t), x_t)
    scores = fake(x_t, g["t"], {}).score - real(x_t, g["t"], {}).score
    torch.testing.assert_close(gradient, (torch.sigmoid(-logit)[:, None] * scores).detach())


def test_losses_of_a_discriminator_that_knows_nothing():
    zeros = torch.zeros(8, 1, dtype=torch.float64)
    assert discriminator_loss(zeros, zeros).item() == pytest.approx(2 * math.log(2))
    assert generator_loss(zeros).item() == pytest.approx(math.log(2))


def test_discriminator_loss_falls_when_real_logits_rise_and_fake_ones_fall():
    real, fake = torch.tensor([[0.5]], requires_grad=True), torch.tensor([[0.5]], requires_grad=True)
    discriminator_loss(real, fake).backward()
    assert real.grad < 0 < fake.grad


def test_hinge_losses_by_hand_and_of_a_discriminator_that_knows_nothing():
    real, fake = torch.tensor([[2.0], [0.5], [-1.0]]), torch.tensor([[-2.0], [-0.5], [1.0], [0.0]])
    # real: 0, 0.5, 2; fake: 0, 0.5, 2, 1
    assert discriminator_loss(real, fake, "hinge").item() == pytest.approx(2.5 / 3 + 3.5 / 4)
    # the generator's: 3, 1.5, 0, 1
    assert generator_loss(fake, "hinge").item() == pytest.approx(5.5 / 4)
    zeros = torch.zeros(8, 1)
    assert discriminator_loss(zeros, zeros, "hinge").item() == 2
    assert generator_loss(zeros, "hinge").item() == 1


@pytest.mark.parametrize("kind", ["softplus", "hinge"])
def test_several_heads_count_alike_whatever_the_size_of_their_maps(kind):
    generator = torch.Generator().manual_seed(0)
    real, fake = ([torch.randn(4, 1, n, n, generator=generator) for n in (1, 2, 8)] for _ in range(2))
    alone = [discriminator_loss(*pair, kind) for pair in zip(real, fake, strict=True)]
    torch.testing.assert_close(discriminator_loss(real, fake, kind), sum(alone) / 3)
    torch.testing.assert_close(generator_loss(fake, kind), sum(generator_loss(one, kind) for one in fake) / 3)


def test_a_teacher_that_is_no_number_gives_no_gradient_of_zero():
    x0, teacher, fake = (torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(i)) for i in range(3))
    teacher[0] = math.nan
    teacher[1, 0, 0, 0] = math.inf
    gradient = distribution_matching_gradient(x0, teacher, fake)
    assert not gradient[0].isfinite().any()
    assert not gradient[1].isfinite().all()
    torch.testing.assert_close(gradient[2:], distribution_matching_gradient(x0[2:], teacher[2:], fake[2:]))


def test_a_sample_that_is_the_teachers_word_already_has_a_gradient_of_zero():
    x0, fake = torch.ones(2, 1, 2, 2), torch.zeros(2, 1, 2, 2)
    assert torch.equal(distribution_matching_gradient(x0, x0.clone(), fake), torch.zeros_like(x0))
