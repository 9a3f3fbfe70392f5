"""The dice loss: hand-worked numbers, float64."""

import pytest
import torch

from stepdistill.objectives.segmentation import dice_loss

F64 = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=F64, requires_grad=True)


def test_dice_by_hand():
    """p = (1/2, 1/2), q = (1, 0): 1 - 2 1/2 / (1/2 + 1) = 1/3; the gradient is -(2 q T - 4 p sum pq) / T^2."""
    p = torch.tensor([[0.5, 0.5], [0.0, 0.0]], dtype=F64, requires_grad=True)
    q = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=F64)
    loss = dice_loss(p, q)
    assert loss.item() == pytest.approx(1 / 3, rel=1e-14)
    (slope,) = torch.autograd.grad(loss, p)
    assert slope.flatten().tolist() == pytest.approx([-2 / 2.25, 1 / 2.25, 0.0, 0.0], rel=1e-14, abs=1e-15)


def test_dice_is_one_number_a_mask():
    masks = torch.zeros(2, 2, 3, 3, dtype=F64)
    masks[0, 0, :, 0] = masks[0, 1, 1] = masks[1, 0] = 1.0
    other = torch.zeros_like(masks)
    other[0, 0, :, 0] = other[0, 1, 0] = other[1, 0, 0] = 1.0
    # the same; apart; 9 pixels against 3 of them, 1 - 6/12; both empty
    assert dice_loss(masks, other).tolist() == [[0.0, 1.0], [0.5, 1.0]]


def test_dice_has_squares_on_both_sides():
    """1 - 2 (1/2 1/2 + 1/4) / (1/4 + 1 + 1/4 + 1/16)."""
    p, q = torch.tensor([[0.5, 1.0]], dtype=F64), torch.tensor([[0.5, 0.25]], dtype=F64)
    assert dice_loss(p, q).item() == pytest.approx(1 - 1 / 1.5625, rel=1e-14)
