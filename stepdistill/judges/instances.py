"""The loss of an instance-segmentation network on a grid: SOLO's (1912.04488, eq. 1), one number a picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from stepdistill.errors import UserError
from stepdistill.objectives.segmentation import dice_loss


@dataclass
class Instances:
    """What is in one picture: classes ``labels`` (n,) int64, and ``masks`` (n, H, W) bool; n may be 0."""

    labels: Tensor
    masks: Tensor


def find_cells(masks: Tensor, grid: int) -> Tensor:
    """The cell of each mask's centre of mass, (n,) in 0 .. grid^2 - 1, row by row; masks (n, H, W) bool, none empty."""
    height, width = masks.shape[-2:]
    weight = masks.double()
    mass = weight.sum((1, 2))
    rows = torch.arange(height, device=masks.device, dtype=torch.float64) + 0.5  # a pixel's middle
    columns = torch.arange(width, device=masks.device, dtype=torch.float64) + 0.5
    y, x = (weight.sum(2) @ rows) / mass, (weight.sum(1) @ columns) / mass
    return (y * grid / height).long() * grid + (x * grid / width).long()


def instance_loss(categories: Tensor, masks: Tensor, truth: list[Instances], mask_weight: float = 3.0) -> Tensor:
    """``L_cate + mask_weight L_mask`` of each picture, (B,): SOLO's eq. 1, with its weight of 3.

    An instance belongs to the cell of its mask's centre of mass; of several in one cell the last counts; one with an
    empty mask is left out.  L_cate: the focal loss over all classes and cells, over the number of such cells and 1, as
    in SOLO's code.  L_mask: the mean dice loss of those cells' masks, 0 without any.

    Args:
        categories: logits (B, K, S, S); masks: logits (B, S*S, H, W), channel i S + j for the cell in row i, column j.

    Raises:
        UserError: a label outside 0 .. K - 1, or masks that are not (n, H, W).
    """
    _check_instances(truth, categories, masks)
    grid = categories.shape[-1]
    # at least float32, under autocast too
    logits = categories.to(torch.promote_types(categories.dtype, torch.float32)).flatten(2)
    labels, shapes = (torch.cat([getattr(t, name) for t in truth]).to(logits.device) for name in ("labels", "masks"))
    picture = torch.tensor([n for n, t in enumerate(truth) for _ in t.labels], dtype=torch.long, device=labels.device)
    filled = shapes.flatten(1).any(1)
    picture, labels, shapes = picture[filled], labels[filled], shapes[filled]
    cell = find_cells(shapes, grid)
    last = {place: n for n, place in enumerate((picture * grid**2 + cell).tolist())}  # of several in one cell
    chosen = torch.tensor(list(last.values()), dtype=torch.long, device=labels.device)
    picture, cell, labels, shapes = picture[chosen], cell[chosen], labels[chosen], shapes[chosen]

    target = torch.zeros_like(logits)
    target[picture, labels, cell] = 1
    dice = dice_loss(masks[picture, cell].to(logits.dtype).sigmoid(), shapes.to(logits.dtype))
    none = logits.new_zeros(len(truth))
    count = none.index_add(0, picture, torch.ones_like(dice))
    category_loss = sigmoid_focal_loss(logits, target).sum((1, 2)) / (count + 1)
    return category_loss + mask_weight * none.index_add(0, picture, dice) / count.clamp(min=1)


def _check_instances(truth: list[Instances], categories: Tensor, masks: Tensor) -> None:
    if len(truth) != len(masks):
        raise UserError(f"instances: of {len(truth)} pictures, for {len(masks)}")
    classes, size = categories.shape[1], masks.shape[-2:]
    for instances in truth:
        if instances.masks.shape != (len(instances.labels), *size):
            needed = (len(instances.labels), *size)
            raise UserError(f"instances: masks of shape {tuple(instances.masks.shape)}, for {needed} (n, H, W)")
        if len(instances.labels) and not 0 <= instances.labels.min() <= instances.labels.max() < classes:
            raise UserError(f"instances: labels {instances.labels.tolist()} are not all in 0..{classes - 1}")
