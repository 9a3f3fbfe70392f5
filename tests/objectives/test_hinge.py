"""The reward losses: hand-worked numbers, gradients by value, float64."""

import math

import pytest
import torch

from stepdistill.objectives.feedback import hinge_loss

F64 = torch.float64


def gradient(values, hinge):
    reward = torch.tensor(values, dtype=F64, requires_grad=True)
    loss = hinge_loss(reward, hinge)
    return loss.item(), torch.autograd.grad(loss, reward)[0].tolist()


def test_hinge_is_per_sample_before_the_mean():
    loss, slope = gradient([0.5, 3.0, -1.0, 1.25], 2.0)
    assert loss == pytest.approx((1.5 + 0 + 3.0 + 0.75) / 4, rel=1e-15)  # clamped after the mean it would be 1.0625
    assert slope == [-0.25, 0.0, -0.25, -0.25]


def test_gradient_is_exactly_zero_at_the_hinge_and_above():
    above = math.nextafter(2.0, 3.0)
    below = math.nextafter(2.0, 1.0)
    assert gradient([2.0, above, 100.0, below], 2.0)[1] == [0.0, 0.0, 0.0, -0.25]


def test_a_batch_above_the_hinge_has_loss_zero():
    assert gradient([0.0, 0.5], -1.0) == (0.0, [0.0, 0.0])


def test_without_a_hinge_the_reward_is_maximised():
    loss, slope = gradient([0.5, 3.0, -1.0], None)
    assert loss == pytest.approx(-2.5 / 3, rel=1e-15)
    assert slope == pytest.approx([-1 / 3] * 3, rel=1e-15)


def test_a_hinge_of_zero_is_a_hinge():
    assert gradient([-1.0, 1.0], 0.0) == (0.5, [-0.5, 0.0])


@pytest.mark.parametrize("reward", [math.inf, -math.inf, math.nan])
def test_a_reward_that_is_not_finite_is_never_good_enough(reward):
    loss, _ = gradient([0.5, reward], 2.0)
    assert math.isnan(loss) or math.isinf(loss)
