"""Focal and dice losses: hand-worked numbers, gradients by value, float64."""

import math

import pytest
import torch

from stepdistill.objectives.segmentation import dice_loss, focal_loss

F64 = torch.float64


def tensor(*values):
    return torch.tensor(values, dtype=F64, requires_grad=True)


def test_focal_loss_by_hand():
    """p = 1/2: 1/4 1/4 ln 2 and 3/4 1/4 ln 2; p = 3/4: 1/4 1/16 ln 4/3 and 3/4 9/16 ln 4."""
    logits = tensor(0.0, 0.0, math.log(3), math.log(3))
    found = focal_loss(logits, torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=F64))
    expected = [math.log(2) / 16, 3 * math.log(2) / 16, math.log(4 / 3) / 64, 27 * math.log(4) / 64]
    assert found.tolist() == pytest.approx(expected, rel=1e-14)


def test_focal_gradient_by_hand():
    """d/dx of -a (1 - p)^2 log p is a (1 - p)^2 (2 p log p + p - 1); for target 0 the mirror image."""
    logits = tensor(0.0, 0.0, 1.3)
    (found,) = torch.autograd.grad(focal_loss(logits, torch.tensor([1.0, 0.0, 1.0], dtype=F64)).sum(), logits)
    p = 1 / (1 + math.exp(-1.3))
    third = 0.25 * (1 - p) ** 2 * (2 * p * math.log(p) + p - 1)
    half = (math.log(0.5) - 0.5) / 4
    assert found.tolist() == pytest.approx([0.25 * half, -0.75 * half, third], rel=1e-14)


def test_without_focus_it_is_half_the_cross_entropy():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, dtype=F64, generator=generator)
    target = (torch.rand(3, 4, 5, generator=generator) < 0.3).to(F64)
    entropy = torch.nn.functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    torch.testing.assert_close(focal_loss(logits, target, alpha=0.5, gamma=0.0), entropy / 2)


def test_focal_loss_is_torchvisions():
    from torchvision.ops import sigmoid_focal_loss

    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(50, dtype=F64, generator=generator)
    target = (torch.rand(50, generator=generator) < 0.5).to(F64)
    torch.testing.assert_close(focal_loss(logits, target), sigmoid_focal_loss(logits, target))


def test_saturated_logits_stay_finite():
    logits = tensor(-200.0, 200.0, 200.0)
    loss = focal_loss(logits, torch.tensor([1.0, 0.0, 1.0], dtype=F64))
    assert loss.tolist() == pytest.approx([50.0, 150.0, 0.0])
    (slope,) = torch.autograd.grad(loss.sum(), logits)
    assert slope.tolist() == pytest.approx([-0.25, 0.75, 0.0])


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
