"""SIM's and SiD's gradients against Gaussian closed forms, float64.

The data are N(m, S), the student x0 = a + B z; P = alpha^2 B B^T + sigma^2 and Q = alpha^2 S + sigma^2 are the noised
covariances, and both scores are exact.  Every check takes the implementation as an argument, so that the wrong ones
(detached networks, a detached normaliser) can be shown to fail it.
"""

from __future__ import annotations

import pytest
import torch
from toys import Gaussians

from stepdistill.denoiser import Prediction
from stepdistill.objectives.distribution_matching import distribution_matching_gradient
from stepdistill.objectives.score_divergence import (
    PseudoHuber,
    SquaredL2,
    full_loss,
    score_terms,
    sid_loss,
    sid_weight,
    sim_loss,
)
from stepdistill.schedule import EDMSchedule

F64 = torch.float64


class DetachedHuber(PseudoHuber):
    """The wrong d': its normaliser does not follow x_t."""

    def gradient(self, y):
        return y / self._root(y).detach()[:, None]


def assert_gradient(got, expected, rtol=1e-7):
    for name, a, b in zip("aB", got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-9 * float(b.abs().max()), msg=lambda m, n=name: f"{n}: {m}")


def sid_closed_form(g, kappa):
    P, Q, B = g.P_inverse, g.Q_inverse, g.B.detach()
    M = Q - P
    d_a = g.alpha * (2 * (1 - kappa) * Q + (2 * kappa - 1) * P) @ Q @ g.delta
    return d_a, 2 * (1 - kappa) * g.alpha**2 * M @ M @ B + g.alpha**2 * (M @ P + P @ M) @ B


# -- matrices, exact expectations ----------------------------------------------------------------------------


def test_squared_l2_is_the_frozen_law_fisher_gradient(gaussians):
    g = gaussians
    y, residual, *_ = g.terms()
    expected = [2 * part for part in sid_closed_form(g, 1.0)]
    assert_gradient(g.gradient(sim_loss(y, residual, SquaredL2())), expected)


@pytest.mark.parametrize("kappa", [1.2, 1.0, 0.5, 0.0])
def test_sid_at_every_alpha(gaussians, kappa):
    g = gaussians
    y, residual, *_ = g.terms()
    assert_gradient(g.gradient(sid_loss(y, residual, kappa)), sid_closed_form(g, kappa))


def test_full_is_twice_sid_at_a_half(gaussians):
    g = gaussians
    y, residual, *_ = g.terms()
    expected = [2 * part for part in sid_closed_form(g, 0.5)]
    assert_gradient(g.gradient(full_loss(y, residual, SquaredL2())), expected)


def test_squared_l2_is_twice_sid_at_one_on_the_same_draws(gaussians):
    y, residual, *_ = gaussians.terms()
    sim, sid = sim_loss(y, residual, SquaredL2()), 2 * sid_loss(y, residual, 1.0)
    torch.testing.assert_close(sim, sid, rtol=4e-16, atol=1e-300)


def test_detached_networks_give_the_kl_gradient_times_two_over_sigma_squared(gaussians):
    """What "SIM with teacher and fake score under no_grad" really is, and that the check above refuses it."""
    g = gaussians
    y, residual, *_ = g.terms(detach=True)
    got = g.gradient(sim_loss(y, residual, SquaredL2()))
    kl = g.alpha * g.Q_inverse @ g.delta, g.alpha**2 * (g.Q_inverse - g.P_inverse) @ g.B.detach()
    # residual's own x0 is what is left: 2 y^T (alpha/sigma^2) dx0, and d KL = y^T alpha dx0
    assert_gradient(got, [2 / g.sigma**2 * part for part in kl])
    with pytest.raises(AssertionError):
        assert_gradient(got, [2 * part for part in sid_closed_form(g, 1.0)])


def test_x0_space_is_score_space_times_the_level_factor(gaussians):
    g = gaussians
    y, residual, *_ = g.terms("score")
    y0, residual0, *_ = g.terms("x0")
    factor = g.sigma**2 / g.alpha
    torch.testing.assert_close(y0, factor * y)
    torch.testing.assert_close(residual0, factor * residual)
    c = 0.3
    torch.testing.assert_close(
        sim_loss(y0, residual0, PseudoHuber(c)), factor * sim_loss(y, residual, PseudoHuber(c / float(factor)))
    )


def test_residual_is_fake_score_plus_noise_over_sigma(gaussians):
    g = gaussians
    _, residual, x0, _ = g.terms()
    x_t = g.schedule.add_noise(x0, g.n, g.t)
    torch.testing.assert_close(residual, g.fake_score(x_t, g.t, {}).score + g.n / g.sigma)


# -- one dimension, by quadrature: the sheet's vectors -------------------------------------------------------


def one_dimension(span=7.0, points=1001):
    """alpha = sigma = 1, a = 0.7, b = 0.5, m = 0, s = 1: P = 1.25, Q = 2; the trapezoid rule on (z, n)."""
    axis = torch.linspace(-span, span, points, dtype=F64)
    grid = torch.cartesian_prod(axis, axis)
    weights = torch.exp(-0.5 * grid.square().sum(1))
    one = lambda value: torch.tensor([value], dtype=F64)  # noqa: E731
    return Gaussians(
        EDMSchedule(), 1.0, one(0.0), one(1.0)[None], one(0.7), one(0.5)[None], grid, weights / weights.sum()
    )


@pytest.fixture(scope="module")
def line():
    g = one_dimension()
    return g, g.terms()


def vector(g, loss):
    d_a, d_b = torch.autograd.grad((g.weights * loss).sum(), (g.a, g.B), retain_graph=True)
    return d_a.item(), d_b.item()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda y, r: sim_loss(y, r, SquaredL2()), (0.56, -0.48)),
        (lambda y, r: full_loss(y, r, SquaredL2()), (0.35, -0.39)),
        (lambda y, r: sid_loss(y, r, 1.2), (0.322, -0.258)),
        (lambda y, r: sid_loss(y, r, 1.0), (0.28, -0.24)),
        (lambda y, r: sid_loss(y, r, 0.5), (0.175, -0.195)),
        (lambda y, r: sid_loss(y, r, 0.0), (0.07, -0.15)),
        (lambda y, r: sim_loss(y, r, PseudoHuber(0.01)), (0.561944, -0.331212)),
        (lambda y, r: sim_loss(y, r, PseudoHuber(0.1)), (0.533248, -0.327307)),
        (lambda y, r: sim_loss(y, r, PseudoHuber(1.0)), (0.236282, -0.187642)),
        (lambda y, r: sim_loss(y, r, PseudoHuber(10.0)), (0.027936, -0.023916)),
    ],
    ids=["l2", "full", "sid1.2", "sid1", "sid.5", "sid0", "huber.01", "huber.1", "huber1", "huber10"],
)
def test_vectors(line, make, expected):
    g, (y, residual, *_) = line
    assert vector(g, make(y, residual)) == pytest.approx(expected, abs=2e-6)


def test_kl_direction_is_the_other_vector(line):
    """DMD's and VSD's gradient on the same draws, (0.35, -0.15): none of the above."""
    g, _ = line
    y, _, x0, _ = g.terms(detach=True)
    got = vector(g, (y.detach() * x0).sum(1))
    assert got == pytest.approx((0.35, -0.15), abs=2e-6)


@pytest.mark.parametrize("distance", [SquaredL2(), PseudoHuber(0.1), PseudoHuber(1.0)], ids=str)
def test_gradient_theorem(line, distance):
    """The pathwise derivative is E[d'(y)^T ds_p/dtheta] at fixed x; a detached normaliser is not."""
    g, (y, residual, *_) = line
    x_t = (g.z @ g.B.T + g.a + g.n).detach()
    variance = g.B[0, 0] ** 2 + 1
    score = -(x_t - g.a) / variance  # the student's own score, as a function of its parameters
    expected = vector(g, (distance.gradient(y).detach() * score).sum(1))
    assert vector(g, sim_loss(y, residual, distance)) == pytest.approx(expected, rel=1e-6)
    if isinstance(distance, PseudoHuber):
        wrong = vector(g, sim_loss(y, residual, DetachedHuber(distance.c)))
        assert wrong != pytest.approx(expected, rel=1e-2)


# -- invariants ----------------------------------------------------------------------------------------------


def pair(batch=4, seed=0):
    return torch.randn(2, batch, 2, 3, 3, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("make", [sim_loss, full_loss], ids=["sim", "full"])
@pytest.mark.parametrize("distance", [SquaredL2(), PseudoHuber(0.1)], ids=str)
def test_fake_score_equal_to_the_teacher_is_zero_with_zero_gradient(make, distance):
    y, residual = pair()
    y = torch.zeros_like(y).requires_grad_()
    loss = make(y, residual.requires_grad_(), distance)
    assert (loss == 0).all()
    (gradient,) = torch.autograd.grad(loss.sum(), residual)
    assert (gradient == 0).all()


def test_huber_at_c_zero_has_no_gradient_where_it_starts():
    """Why c must be above 0."""
    y = torch.zeros(1, 3, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(sim_loss(y, torch.ones(1, 3, dtype=F64), PseudoHuber(0.0)).sum(), y)
    assert gradient.isnan().all()


def test_huber_limits():
    y, residual = pair()
    wide = 2e6 * sim_loss(y, residual, PseudoHuber(1e6))
    torch.testing.assert_close(wide, sim_loss(y, residual, SquaredL2()), rtol=1e-9, atol=1e-9)
    narrow = [sim_loss(scale * y, residual, PseudoHuber(1e-9)) for scale in (1.0, 7.0)]
    torch.testing.assert_close(*narrow)


def test_one_norm_a_sample_over_all_its_elements():
    y, residual = pair()
    distance = PseudoHuber(0.5)
    whole = sim_loss(y, residual, distance)
    for i in range(len(y)):
        norm = (y[i].square().sum() + 0.25).sqrt()
        torch.testing.assert_close(whole[i], -(y[i] * residual[i]).sum() / norm)
        torch.testing.assert_close(distance.value(y)[i], norm - 0.5)


def test_sid_weight_is_over_a_detached_mean_with_a_floor():
    x0, teacher_x0 = pair()
    weight = sid_weight(x0.requires_grad_(), teacher_x0)
    assert not weight.requires_grad
    torch.testing.assert_close(weight, 1 / (x0 - teacher_x0).detach().abs().mean((1, 2, 3)))
    torch.testing.assert_close(sid_weight(x0, x0), torch.full((4,), 1e5, dtype=F64))


def test_detached_huber_sim_is_dmd_with_another_normaliser():
    """-d'(y) in x0 space without the graph: DMD's direction over ||m_fake - m_teacher|| in place of mean |x0 - m|."""
    x0, teacher = pair()
    fake, _ = pair(seed=1)
    leaf = x0.clone().requires_grad_()
    (got,) = torch.autograd.grad(sim_loss(fake - teacher, fake - leaf, PseudoHuber(1e-12)).sum(), leaf)
    g = distribution_matching_gradient(x0, teacher, fake)
    cosine = torch.nn.functional.cosine_similarity(got.flatten(1), g.flatten(1))
    torch.testing.assert_close(cosine, torch.ones_like(cosine))
    torch.testing.assert_close(got.flatten(1).norm(dim=1), torch.ones(len(x0), dtype=F64))


def test_score_space_scales_by_alpha_over_sigma_squared():
    schedule, t = EDMSchedule(), torch.tensor([0.5, 2.0], dtype=F64)
    x_t, m = pair(2)
    teacher, fake = Prediction(schedule, x_t, t, m, "x0"), Prediction(schedule, x_t, t, m + 1, "x0")
    y, residual = score_terms(teacher, fake, m, "score")
    torch.testing.assert_close(y, torch.ones_like(y) / t[:, None, None, None] ** 2)
    torch.testing.assert_close(residual, y)


@pytest.mark.parametrize("alpha", [1.2, 1.0, 0.5])
def test_sid_is_the_form_that_its_authors_compute(alpha):
    """(m_T - m_F) ((m_T - x0) - alpha (m_T - m_F)) over the mean |x0 - m_T|, summed over a sample."""
    x0, teacher = pair()
    fake, _ = pair(seed=1)
    t = torch.ones(len(x0), dtype=F64)
    predictions = [Prediction(EDMSchedule(), x0, t, m, "x0") for m in (teacher, fake)]
    ours = sid_loss(*score_terms(*predictions, x0, "x0"), alpha) * sid_weight(x0, teacher)
    formula = (teacher - fake) * ((teacher - x0) - alpha * (teacher - fake))
    formula = formula / (x0 - teacher).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(ours, formula.sum((1, 2, 3)))
