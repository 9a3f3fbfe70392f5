"""A score's hinge and weight."""

import pytest
import torch
from rewards import F64, some_pixels

from stepdistill.errors import UserError
from stepdistill.judges.rewards import Reward


def test_loss_is_weight_times_the_hinge():
    reward = Reward("mean", 0.5, 2.0, lambda pixels, items: 3 * pixels.mean((1, 2, 3)))
    pixels = torch.tensor([0.0, 0.5, 2 / 3, 1.0], dtype=F64)[:, None, None, None].expand(4, 1, 2, 2)
    pixels = pixels.clone().requires_grad_()
    loss = reward.loss(pixels, [])
    assert loss.item() == pytest.approx(0.5 * (2 + 0.5 + 0 + 0) / 4)
    (slope,) = torch.autograd.grad(loss, pixels)
    below = -0.5 * 3 / 4 / 4
    assert slope[:, 0, 0, 0].tolist() == pytest.approx([below, below, 0, 0])
    assert (slope[2:] == 0).all()


def test_without_a_hinge_every_picture_is_pushed():
    reward = Reward("mean", 2.0, None, lambda pixels, items: pixels.sum((1, 2, 3)))
    pixels = torch.full((2, 1, 1, 1), 100.0, requires_grad=True)
    reward.loss(pixels, []).backward()
    assert pixels.grad.flatten().tolist() == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda p, i: p.mean((1, 2)), "gave torch.float32 of shape (3, 4) for 3 pictures"),
        (lambda p, i: p.mean(), "gave torch.float32 of shape () for 3 pictures"),
        (lambda p, i: 0.5, "gave a float for 3 pictures"),
    ],
)
def test_a_score_of_another_shape_is_one_line(score, message):
    with pytest.raises(UserError, match="reward mine: ") as error:
        Reward("mine", 1.0, None, score).loss(some_pixels(), [])
    assert message in str(error.value)
