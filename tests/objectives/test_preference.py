"""Pairwise sample optimisation's loss (2410.03190) against closed forms: one-dimensional policies, float64."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from toys import linear_betas, sigma_points

from stepdistill.objectives.preference import (
    clamp_log_ratio,
    denoising_log_ratio,
    gaussian_log_prob,
    gaussian_log_ratio,
    preference_loss,
    reduce_dims,
)

F64 = torch.float64
MU0, S, BETA = 0.2, 0.7, 3.0


def scalar(value):
    return torch.tensor([float(value)], dtype=F64)


def ratio(a, mu, mu0=MU0, s=S):
    """The log ratio of actions a (B,) under N(mu, s^2) and N(mu0, s^2), (B, 1): one step."""
    x = torch.as_tensor(a, dtype=F64).reshape(-1, 1)
    std = torch.full((len(x),), s, dtype=F64)
    mean, reference = (torch.as_tensor(m, dtype=F64).reshape(1, 1).expand(len(x), 1) for m in (mu, mu0))
    return gaussian_log_ratio(x, mean, reference, std)[:, None]


def slope(mu, winners, losers, limit=None, beta=BETA, **policy):
    """The loss and its derivative in mu over pairs of actions."""
    mu = torch.tensor(float(mu), dtype=F64, requires_grad=True)
    sides = (clamp_log_ratio(ratio(a, mu, **policy), limit) for a in (winners, losers))
    loss = preference_loss(*sides, beta)
    return loss.item(), torch.autograd.grad(loss, mu)[0].item()


def random_tensor(*shape, seed=0, dtype=F64):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def root(function, low, high):
    """Where an increasing function crosses 0, by bisection."""
    assert function(low) < 0 < function(high)
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if function(middle) < 0 else (low, middle)
    return (low + high) / 2


# -- one pair ----------------------------------------------------------------------------------------------


def test_one_pair_of_one_dimension_has_the_worked_logit_and_gradient():
    winner, loser = ratio([0.9], 0.35), ratio([-0.3], 0.35)
    assert BETA * (winner - loser).item() == pytest.approx(1.1020408, abs=5e-8)
    loss, gradient = slope(0.35, [0.9], [-0.3])
    assert gradient == pytest.approx(-1.8320158, abs=5e-8)
    z = BETA * 1.2 * 0.15 / S**2
    assert loss == pytest.approx(math.log1p(math.exp(-z)), rel=1e-14)
    assert gradient == pytest.approx(-BETA * 1.2 / S**2 / (1 + math.exp(z)), rel=1e-13)


def test_at_the_reference_the_loss_is_log_2_and_the_gradient_is_half_its_most():
    loss, gradient = slope(MU0, [0.9], [-0.3])
    assert loss == math.log(2)
    assert gradient == pytest.approx(-BETA * 1.2 / (2 * S**2), rel=1e-14)


def test_the_log_ratio_is_the_difference_of_two_log_densities():
    x, mean, reference = (random_tensor(5, 3, 4, 2, seed=seed) for seed in range(3))
    std = torch.tensor([0.1, 0.5, 1.0, 2.0, 14.6], dtype=F64)
    for reduction in ("mean", "sum"):
        result = gaussian_log_ratio(x, mean, reference, std, reduction)
        ours, other = (gaussian_log_prob(x, m, std, reduction) for m in (mean, reference))
        torch.testing.assert_close(result, ours - other, rtol=1e-11, atol=1e-11)
        normal = torch.distributions.Normal(mean, std[:, None, None, None]).log_prob(x).flatten(1)
        torch.testing.assert_close(ours, normal.mean(1) if reduction == "mean" else normal.sum(1), rtol=1e-12, atol=0)


def test_equal_means_have_log_ratio_exactly_zero():
    x, mean = random_tensor(4, 7, dtype=torch.float32), random_tensor(4, 7, seed=1, dtype=torch.float32)
    assert gaussian_log_ratio(x, mean, mean.clone(), torch.full((4,), 0.03)).tolist() == [0.0] * 4
    assert gaussian_log_ratio(x, mean + 1e-3, mean, torch.full((4,), 0.03)).abs().min() > 0


# -- dimensions --------------------------------------------------------------------------------------------


def test_the_mean_over_dimensions_divides_the_gradient_by_their_number():
    x = torch.tensor([[0.9], [-0.3]], dtype=F64)
    mu = torch.full((1, 12), 0.35, dtype=F64, requires_grad=True)
    std = torch.full((1,), S, dtype=F64)
    reference = torch.full((1, 12), MU0, dtype=F64)
    gradients = {}
    for reduction in ("mean", "sum"):
        winner, loser = (
            gaussian_log_ratio(a.expand(1, 12), mu, reference, std, reduction)[:, None] for a in (x[:1], x[1:])
        )
        z = (BETA * (winner - loser)).item()
        assert z == pytest.approx(1.1020408 * (1 if reduction == "mean" else 12), rel=1e-7)
        gradients[reduction] = torch.autograd.grad(preference_loss(winner, loser, BETA), mu)[0]
    torch.testing.assert_close(gradients["mean"], torch.full((1, 12), -1.8320158 / 12, dtype=F64), rtol=1e-7, atol=0)
    expected = -BETA * 1.2 / S**2 / (1 + math.exp(12 * 1.1020408163265305))
    torch.testing.assert_close(gradients["sum"], torch.full((1, 12), expected, dtype=F64), rtol=1e-10, atol=0)


def test_tiling_a_picture_leaves_the_means_loss_and_multiplies_the_sums_logit():
    x, other, mean, reference = (random_tensor(3, 2, 4, 4, seed=seed) for seed in range(4))
    std = torch.tensor([0.4, 1.0, 3.0], dtype=F64)

    def logit(reduction, times):
        tiled = [part.repeat(1, 1, times, times) for part in (x, other, mean, reference)]
        winner, loser = (gaussian_log_ratio(part, *tiled[2:], std, reduction)[:, None] for part in tiled[:2])
        return winner - loser, preference_loss(winner, loser, 0.7)

    (mean_1, loss_1), (mean_3, loss_3) = logit("mean", 1), logit("mean", 3)
    torch.testing.assert_close(mean_3, mean_1, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(loss_3, loss_1, rtol=1e-12, atol=0)
    torch.testing.assert_close(logit("sum", 1)[0], 32 * mean_1, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logit("sum", 3)[0], 288 * mean_1, rtol=1e-12, atol=1e-12)


# -- where it leads ----------------------------------------------------------------------------------------


def test_bradley_terry_labels_of_a_linear_reward_lead_to_the_kl_regularised_optimum():
    """``mu* = mu0 + g s^2 / beta``, the mean of p_ref exp(r / beta): the root of the gradient by Gauss-Hermite, with
    actions from the reference and from another law."""
    g = 1.1
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(24))
    each = torch.func.vmap(lambda winner, loser: preference_loss(winner[None], loser[None], BETA))
    for centre, width in ((MU0, S), (-1.0, 1.6)):
        a = centre + width * nodes
        first, second = (part.flatten() for part in torch.meshgrid(a, a, indexing="ij"))
        share = torch.outer(weights, weights).flatten() / weights.sum() ** 2
        label = torch.sigmoid(g * (first - second))

        def gradient(mu, first=first, second=second, share=share, label=label):
            mu = torch.tensor(mu, dtype=F64, requires_grad=True)
            l_1, l_2 = ratio(first, mu), ratio(second, mu)
            loss = (share * (label * each(l_1, l_2) + (1 - label) * each(l_2, l_1))).sum()
            return torch.autograd.grad(loss, mu)[0].item()

        assert root(gradient, -2.0, 2.0) == pytest.approx(MU0 + g * S**2 / BETA, abs=1e-10)
        assert abs(gradient(MU0)) > 0.05


@pytest.mark.parametrize("share", [0.6, 0.9])
def test_one_pair_with_label_noise_is_stationary_where_sigmoid_z_is_its_share(share):
    right, wrong = round(10 * share), round(10 * (1 - share))
    winners, losers = [0.9] * right + [-0.3] * wrong, [-0.3] * right + [0.9] * wrong
    result = root(lambda mu: slope(mu, winners, losers)[1], -2.0, 3.0)
    assert result == pytest.approx(MU0 + S**2 * math.log(share / (1 - share)) / (BETA * 1.2), abs=1e-10)


def test_hard_labels_have_no_optimum():
    losses = [slope(mu, [0.9], [-0.3]) for mu in np.linspace(-4, 4, 41)]
    assert all(later[0] < earlier[0] for earlier, later in pairwise(losses))
    assert all(gradient < 0 for _, gradient in losses)


# -- the clamp ---------------------------------------------------------------------------------------------


def test_the_clamp_is_that_of_the_ratio():
    values = torch.tensor([-3.0, -0.1054, -0.1053, -0.05, 0.0, 0.0953, 0.0954, 2.0], dtype=F64)
    torch.testing.assert_close(clamp_log_ratio(values, 0.1), values.exp().clamp(0.9, 1.1).log(), rtol=1e-13, atol=1e-15)
    assert clamp_log_ratio(values, 0.1)[[0, -1]].tolist() == pytest.approx([math.log(0.9), math.log(1.1)], rel=1e-15)
    assert clamp_log_ratio(values, None) is values


def test_beyond_the_clamp_on_both_sides_there_is_a_plateau_without_gradient():
    """``l_w = 2 mu - mu^2 / 2`` is above log 1.1 from mu = 0.0483 and ``l_l = -mu - mu^2 / 2`` below log 0.9 from
    mu = 0.1005; there the loss is flat, and on the wrong side too: nothing brings a fallen winner back."""
    unit = {"mu0": 0.0, "s": 1.0}
    best, worst = (math.log1p(math.exp(-z)) for z in (BETA * math.log(1.1 / 0.9), BETA * math.log(0.9 / 1.1)))
    for mu in (0.101, 0.3, 0.9):
        assert slope(mu, [2.0], [-1.0], 0.1, **unit) == (pytest.approx(best, rel=1e-12), 0.0)
    for mu in (-0.12, -0.5):
        assert slope(mu, [2.0], [-1.0], 0.1, **unit) == (pytest.approx(worst, rel=1e-12), 0.0)
    assert slope(0.3, [2.0], [-1.0], None, **unit)[1] < -0.1
    assert slope(0.095, [2.0], [-1.0], 0.1, **unit)[1] < -0.1


def test_beyond_the_clamp_on_one_side_the_other_sides_gradient_is_left():
    mu = 0.06  # l_w = 0.1182 is clamped, l_l = -0.0618 is not
    loss, gradient = slope(mu, [2.0], [-1.0], 0.1, mu0=0.0, s=1.0)
    z = BETA * (math.log(1.1) + mu + mu**2 / 2)
    assert loss == pytest.approx(math.log1p(math.exp(-z)), rel=1e-12)
    assert gradient == pytest.approx(-BETA / (1 + math.exp(z)) * (1 + mu), rel=1e-12)


def test_near_the_reference_the_clamp_does_nothing():
    assert slope(0.02, [2.0], [-1.0], 0.1, mu0=0.0, s=1.0) == slope(0.02, [2.0], [-1.0], None, mu0=0.0, s=1.0)


# -- invariants --------------------------------------------------------------------------------------------


def log_ratios(pairs=6, moves=3):
    return random_tensor(pairs, moves, seed=1), random_tensor(pairs, moves, seed=2)


@pytest.mark.parametrize("over_steps", ["step", "sum"])
def test_swapping_winner_and_loser_turns_the_logit(over_steps):
    winner, loser = log_ratios()
    logit = BETA * (winner - loser)
    expected = logit.mean() if over_steps == "step" else logit.sum(1).mean()
    swapped = preference_loss(loser, winner, BETA, over_steps)
    torch.testing.assert_close(swapped - preference_loss(winner, loser, BETA, over_steps), expected, rtol=1e-12, atol=0)


def test_swapping_at_the_reference_turns_the_gradient_so_that_random_labels_teach_nothing():
    (_, one), (_, other) = slope(MU0, [0.9], [-0.3]), slope(MU0, [-0.3], [0.9])
    assert one == -other != 0
    winners, losers = [0.9, -0.3, 2.0, 0.1], [-0.3, 0.9, 0.1, 2.0]
    assert slope(MU0, winners, losers)[1] == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("mu", [-1.0, 0.35, 2.0])
def test_a_pair_of_the_same_sample_twice_has_no_gradient(mu):
    assert slope(mu, [0.9], [0.9]) == (math.log(2), 0.0)


def test_beta_zero_is_constant_and_beta_multiplies_the_logit():
    assert slope(0.35, [0.9, 0.1], [-0.3, 0.5], beta=0.0) == (math.log(2), 0.0)
    for beta in (1.0, 4.0):
        loss, _ = slope(0.35, [0.9], [-0.3], beta=beta)
        logit = -math.log(math.expm1(loss))
        assert logit == pytest.approx(beta * 1.2 * 0.15 / S**2, rel=1e-12)


@pytest.mark.parametrize("over_steps", ["step", "sum"])
def test_the_order_of_the_moves_does_not_matter_as_long_as_it_is_shared(over_steps):
    winner, loser = log_ratios()
    loss = preference_loss(winner, loser, BETA, over_steps)
    order = [2, 0, 1]
    torch.testing.assert_close(preference_loss(winner[:, order], loser[:, order], BETA, over_steps), loss)
    if over_steps == "step":
        assert abs(preference_loss(winner[:, order], loser, BETA) - loss) > 1e-3


def test_adding_to_both_sides_changes_nothing():
    winner, loser = log_ratios()
    torch.testing.assert_close(preference_loss(winner + 0.4, loser + 0.4, BETA), preference_loss(winner, loser, BETA))


def test_by_jensen_the_moves_mean_at_m_beta_is_above_the_sums_loss():
    for seed in range(20):
        winner, loser = random_tensor(1, 3, seed=seed), random_tensor(1, 3, seed=100 + seed)
        assert preference_loss(winner, loser, 3 * BETA) > preference_loss(winner, loser, BETA, "sum")
    winner, loser = winner[:, :1].expand(1, 3), loser[:, :1].expand(1, 3)
    torch.testing.assert_close(preference_loss(winner, loser, 3 * BETA), preference_loss(winner, loser, BETA, "sum"))


def test_the_loss_of_several_moves_by_hand():
    winner, loser = (
        torch.tensor([[0.3, -0.1], [0.0, 0.2]], dtype=F64),
        torch.tensor([[0.1, 0.0], [0.4, 0.0]], dtype=F64),
    )
    each = [math.log1p(math.exp(-2 * z)) for z in (0.2, -0.1, -0.4, 0.2)]
    assert preference_loss(winner, loser, 2.0).item() == pytest.approx(sum(each) / 4, rel=1e-14)
    whole = [math.log1p(math.exp(-2 * z)) for z in (0.1, -0.2)]
    assert preference_loss(winner, loser, 2.0, "sum").item() == pytest.approx(sum(whole) / 2, rel=1e-14)


def test_large_logits_neither_overflow_nor_lose_their_gradient():
    loser = torch.tensor([[900.0]], dtype=F64, requires_grad=True)
    loss = preference_loss(torch.zeros(1, 1, dtype=F64), loser, BETA)
    assert loss.item() == 2700
    assert torch.autograd.grad(loss, loser)[0].item() == BETA


def test_ties_are_left_out_of_the_mean():
    winner, loser = log_ratios()
    counts = torch.tensor([True, False, True, True, False, True])
    winner.requires_grad_()
    for over_steps in ("step", "sum"):
        loss = preference_loss(winner, loser, BETA, over_steps, counts)
        torch.testing.assert_close(loss, preference_loss(winner[counts], loser[counts], BETA, over_steps))
        gradient = torch.autograd.grad(loss, winner)[0]
        assert gradient[~counts].abs().max() == 0
        assert gradient[counts].abs().min() > 0


def test_ties_alone_give_loss_and_gradient_zero():
    winner, loser = log_ratios()
    winner.requires_grad_()
    loss = preference_loss(winner, loser, BETA, counts=torch.zeros(6, dtype=torch.bool))
    assert loss.item() == 0
    assert torch.autograd.grad(loss, winner)[0].abs().max() == 0


# -- precision ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_worked_on_in_float32(dtype):
    x, mean, reference = (random_tensor(2, 4, 8, 8, seed=seed, dtype=torch.float32).to(dtype) for seed in range(3))
    std = torch.tensor([0.3, 0.97], dtype=F64)
    whole = [part.float() for part in (x, mean, reference)]
    for reduction in ("mean", "sum"):
        result = gaussian_log_prob(x, mean, std, reduction)
        assert result.dtype == torch.float32
        assert torch.equal(result, gaussian_log_prob(*whole[:2], std, reduction))
        result = gaussian_log_ratio(x, mean, reference, std, reduction)
        assert result.dtype == torch.float32
        assert torch.equal(result, gaussian_log_ratio(*whole, std, reduction))
        assert torch.equal(reduce_dims(x, reduction), reduce_dims(whole[0], reduction))


def test_float32_keeps_the_small_difference_of_two_large_sums():
    """65,536 dimensions whose means are 1e-5 apart: the difference of two float32 log densities is noise."""
    x, mean = random_tensor(1, 4, 128, 128), random_tensor(1, 4, 128, 128, seed=1)
    reference = mean + 1e-5 * random_tensor(1, 4, 128, 128, seed=2)
    std = torch.tensor([0.5], dtype=F64)
    singles = [part.float() for part in (x, mean, reference)]
    exact = gaussian_log_ratio(*(part.double() for part in singles), std, "sum").item()
    result = gaussian_log_ratio(*singles, std, "sum").item()
    naive = [gaussian_log_prob(singles[0], m, std, "sum").item() for m in singles[1:]]
    assert abs(result - exact) < 1e-4 * abs(exact)
    assert abs(naive[0] - naive[1] - exact) > 1e-2 * abs(exact)


# -- denoising errors --------------------------------------------------------------------------------------


def test_the_denoising_log_ratio_by_hand_and_its_factors():
    error, reference = torch.tensor([0.3, 1.0], dtype=F64), torch.tensor([0.5, 0.2], dtype=F64)
    assert denoising_log_ratio(error, reference).tolist() == pytest.approx([0.1, -0.4], rel=1e-14)
    assert denoising_log_ratio(error, reference, 1.0).tolist() == pytest.approx([0.2, -0.8], rel=1e-14)
    factor = torch.tensor([2.0, 3.0], dtype=F64)
    assert denoising_log_ratio(error, reference, factor).tolist() == pytest.approx([0.4, -2.4], rel=1e-14)
    (m_w, m_l), (r_w, r_l) = error.tolist(), reference.tolist()
    logit = BETA * (denoising_log_ratio(scalar(m_w), scalar(r_w)) - denoising_log_ratio(scalar(m_l), scalar(r_l)))
    assert logit.item() == pytest.approx(-0.5 * BETA * ((m_w - r_w) - (m_l - r_l)), rel=1e-14)  # 2311.12908


@pytest.mark.parametrize("level", [249, 499, 749, 999])
def test_eps_x0_and_v_errors_agree_after_their_weights(level):
    """``|eps|^2 = SNR |x0|^2`` and ``|v|^2 = |x0|^2 / sigma^2`` of errors at one x_t."""
    schedule = linear_betas()
    x0, eps, tuned, reference = (random_tensor(3, 2, 4, 4, seed=seed) for seed in range(4))
    t = torch.full((3,), level)
    alpha, sigma = schedule.alpha_sigma(t)
    x_t = schedule.add_noise(x0, eps, t)
    result = {}
    for kind, factor in (("eps", 0.5), ("x0", 0.5 * (alpha / sigma) ** 2), ("v", 0.5 * alpha**2)):
        target = schedule.target(x0, eps, kind, x_t, t)
        errors = [
            reduce_dims((schedule.from_x0(p, kind, x_t, t) - target).square(), "mean") for p in (tuned, reference)
        ]
        result[kind] = denoising_log_ratio(*errors, factor)
    assert result["eps"].abs().min() > 1e-5
    torch.testing.assert_close(result["x0"], result["eps"], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(result["v"], result["eps"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("t", "following"), [(999, 749), (749, 499), (499, 249)])
def test_the_denoising_ratio_with_the_snr_factor_is_the_transitions_expected_log_ratio(t, following):
    """Over ``x' = alpha' x0 + sigma' z`` the re-noising move's log ratio has the mean ``-SNR'/(2 SNR)`` times the
    difference of the eps errors; the sigma points make means of linear functions exact."""
    schedule = linear_betas()
    (alpha, sigma), (alpha_next, sigma_next) = (schedule.alpha_sigma(torch.tensor([k])) for k in (t, following))
    z = sigma_points(5)
    x0, tuned, reference = (random_tensor(1, 5, seed=seed) for seed in range(3))
    x = alpha_next * x0 + sigma_next * z
    means = [(alpha_next * p).expand_as(x) for p in (tuned, reference)]
    result = gaussian_log_ratio(x, *means, sigma_next.expand(len(z)), "sum")
    errors = [reduce_dims((alpha / sigma * (x0 - p)).square(), "sum") for p in (tuned, reference)]
    snr, snr_next = (alpha / sigma) ** 2, (alpha_next / sigma_next) ** 2
    expected = denoising_log_ratio(*errors, snr_next / (2 * snr))
    assert result.std() > 0.1
    torch.testing.assert_close(result.mean(0, keepdim=True), expected, rtol=1e-9, atol=1e-12)


# -- the score ---------------------------------------------------------------------------------------------


def test_the_expected_score_is_zero_and_its_square_the_fisher_information():
    """Over ``x' ~ p_theta`` by Gauss-Hermite, for a mean that is not linear in theta."""
    nodes, weights = (torch.from_numpy(part) for part in np.polynomial.hermite_e.hermegauss(16))
    weights = weights / weights.sum()
    theta, std = 0.6, 0.3
    x = math.sin(theta) + std * nodes[:, None]
    scores = torch.func.vmap(
        torch.func.grad(
            lambda parameter, x: gaussian_log_prob(
                x[None], parameter.sin().reshape(1, 1), torch.tensor([std], dtype=F64)
            )[0]
        ),
        in_dims=(None, 0),
    )(torch.tensor(theta, dtype=F64), x)
    assert (weights * scores).sum().item() == pytest.approx(0, abs=1e-12)
    assert (weights * scores**2).sum().item() == pytest.approx((math.cos(theta) / std) ** 2, rel=1e-12)
