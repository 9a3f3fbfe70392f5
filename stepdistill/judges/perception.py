"""Instance segmentation as a perceptual loss: L_percep = L_instance(m_I(x0'), GT(x0)) (Hyper-SD, 2404.13686, eq. 14).

A frozen network m_I looks at the prediction x0', and its own training loss says how far what it sees is from the
instances that the real picture x0 is known to have.  The paper's m_I is SOLO (1912.04488) with COCO's annotations:
neither is shipped, so bring yours as ``module:attribute`` (:class:`PerceptualModel`).  :class:`GridInstanceNet` is a
small SOLO of our own for tests and small data; what it leaves out is said there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from stepdistill import assets
from stepdistill.data.arrays import read_npz
from stepdistill.data.order import Order
from stepdistill.errors import UserError, described, running
from stepdistill.objectives.segmentation import dice_loss, focal_loss
from stepdistill.plugins import import_attribute, made_by


class PerceptualModel(Protocol):
    """What the perceptual loss needs: a frozen network with its training loss."""

    def loss(self, pixels: Tensor, real: Tensor, indices: list[int]) -> Tensor:
        """(B,), differentiable in ``pixels``.

        Args:
            pixels: (B, C, H, W) about [-1, 1], the prediction x0', decoded; real: the same shape, the real pictures x0
                that it came from; indices: their B places in the run's data, for a table of annotations.
        """
        ...


@dataclass
class Instances:
    """What is in one picture: classes ``labels`` (n,) int64, and ``masks`` (n, H, W) bool; n may be 0."""

    labels: Tensor
    masks: Tensor


@dataclass
class OneInstance:
    """Ground truth of pictures of one thing on a dark ground: its label, and where it is brighter than the ground.

    ``labels``: of each picture in the data; ``threshold``: in [-1, 1], above which a pixel in any channel is the thing.
    """

    labels: list[int]
    threshold: float = -0.8

    def __call__(self, real: Tensor, indices: list[int]) -> list[Instances]:
        masks = real.amax(1, keepdim=True) > self.threshold
        labels = torch.tensor([[self.labels[i]] for i in indices], device=real.device)
        return [Instances(label, mask) for label, mask in zip(labels, masks, strict=True)]


def cells(masks: Tensor, grid: int) -> Tensor:
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

    An instance belongs to the cell of its mask's centre of mass; the last keeps a cell that several claim; one with an
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
    there = shapes.flatten(1).any(1)
    picture, labels, shapes = picture[there], labels[there], shapes[there]
    cell = cells(shapes, grid)
    keeper = {place: n for n, place in enumerate((picture * grid**2 + cell).tolist())}  # the last one
    kept = torch.tensor(list(keeper.values()), dtype=torch.long, device=labels.device)
    picture, cell, labels, shapes = picture[kept], cell[kept], labels[kept], shapes[kept]

    target = torch.zeros_like(logits)
    target[picture, labels, cell] = 1
    dice = dice_loss(masks[picture, cell].to(logits.dtype).sigmoid(), shapes.to(logits.dtype))
    none = logits.new_zeros(len(truth))
    count = none.index_add(0, picture, torch.ones_like(dice))
    category_loss = focal_loss(logits, target).sum((1, 2)) / (count + 1)
    return category_loss + mask_weight * none.index_add(0, picture, dice) / count.clamp(min=1)


def _check_instances(truth: list[Instances], categories: Tensor, masks: Tensor) -> None:
    if len(truth) != len(masks):
        raise UserError(f"instances: of {len(truth)} pictures, for {len(masks)}")
    known, size = categories.shape[1], masks.shape[-2:]
    for instances in truth:
        if instances.masks.shape != (len(instances.labels), *size):
            wanted = (len(instances.labels), *size)
            raise UserError(f"instances: masks of shape {tuple(instances.masks.shape)}, for {wanted} (n, H, W)")
        if len(instances.labels) and not 0 <= instances.labels.min() <= instances.labels.max() < known:
            raise UserError(f"instances: labels {instances.labels.tolist()} are not all in 0..{known - 1}")


def _convolution(inside: int, outside: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inside, outside, 3, stride, 1), nn.GroupNorm(8, outside), nn.SiLU())


class GridInstanceNet(nn.Module):
    """A minimal SOLO: pixels (B, C, H, W) to category logits (B, K, S, S) and mask logits (B, S*S, H, W).

    Of SOLO it has the S x S grid, the two branches and the coordinates as channels of the mask branch; it leaves out
    the pyramid (one grid for all sizes), the cells around a centre, and all of inference.

    Args:
        channels: C; num_classes: K; grid: S; width: channels of the first convolution, a multiple of 8.
        instances: what is in the real pictures, from them (B, C, H, W) and from their places in the data.
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        instances: Callable[[Tensor, list[int]], list[Instances]],
        grid: int = 4,
        width: int = 16,
    ):
        super().__init__()
        self.grid, self.instances = grid, instances
        self.body = nn.Sequential(
            _convolution(channels, width), _convolution(width, 2 * width, 2), _convolution(2 * width, 2 * width)
        )
        self.category = nn.Sequential(_convolution(2 * width, 2 * width), nn.Conv2d(2 * width, num_classes, 1))
        nn.init.constant_(self.category[-1].bias, -4.6)  # p = 0.01 to start with, as in 1708.02002
        self.mask = _convolution(2 * width + 2, width)
        self.mask_out = nn.Conv2d(width, grid * grid, 1)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(pixels)
        categories = self.category(adaptive_avg_pool2d(features, self.grid))
        count, _, height, width = features.shape
        across = torch.linspace(-1, 1, width, device=pixels.device, dtype=features.dtype)
        down = torch.linspace(-1, 1, height, device=pixels.device, dtype=features.dtype)
        places = torch.stack(torch.meshgrid(down, across, indexing="ij")).expand(count, -1, -1, -1)
        mask = self.mask(torch.cat([features, places], 1))
        return categories, self.mask_out(interpolate(mask, size=pixels.shape[-2:], mode="bilinear"))

    def loss(self, pixels: Tensor, real: Tensor, indices: list[int]) -> Tensor:
        """:func:`instance_loss` of ``pixels`` against the instances of ``real``, (B,)."""
        return instance_loss(*self(pixels), self.instances(real, indices))

    def fit(
        self, images: Tensor, steps: int = 200, batch_size: int = 32, lr: float = 5e-3, seed: int = 0
    ) -> GridInstanceNet:
        """Train on the data's pictures (N, C, H, W), all of them, in its order: Adam, one-cycle rate.  Gives itself."""
        optimizer = torch.optim.Adam(self.parameters(), lr=lr)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
        order = Order(len(images), seed)
        for step in range(steps):
            indices = order.indices(step * batch_size, batch_size)
            self.loss(images[indices], images[indices], indices).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            rates.step()
        return self


def fashion_mnist() -> GridInstanceNet:
    """The reference trained on the shipped pictures in some seconds: ``stepdistill.judges.perception:fashion_mnist``.

    Its indices are places in ``asset:fashion_mnist/images.npz``, so the run's data must be that file.
    """
    images = read_npz(assets.resolve("asset:fashion_mnist/images.npz"), (1, 16, 16))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = GridInstanceNet(1, 10, OneInstance(images.labels))
    return network.fit(images.batch(list(range(len(images)))))


def load_perceptual(spec: str, device: str | torch.device = "cpu") -> PerceptualModel:
    """The perceptual model at ``module:attribute``: an object, or a class or function without arguments that gives one.

    An nn.Module is moved to ``device`` and frozen (eval, no parameter with a gradient).

    Raises:
        UserError: it cannot be imported, or has no ``loss``.
    """
    found = import_attribute(spec, "perceptual model")
    if isinstance(found, type) or (callable(found) and not hasattr(found, "loss")):
        found = made_by(found, spec, "perceptual model")
    if not callable(getattr(found, "loss", None)):
        raise UserError(f"perceptual model {spec!r}: has no method loss(pixels, real, indices)")
    return found.eval().requires_grad_(False).to(device) if isinstance(found, nn.Module) else found


def perceptual_loss(model: PerceptualModel, spec: str, pixels: Tensor, real: Tensor, indices: list[int]) -> Tensor:
    """The model's loss (B,) of pixels (B, C, H, W) against real pictures.

    Raises:
        UserError: it fails, or gives something else than (B,) floating-point numbers with a gradient.
    """
    with running(f"perceptual model {spec!r}: called on {len(pixels)} pictures it"):
        found = model.loss(pixels, real, indices)
    if not isinstance(found, Tensor) or found.shape != (len(pixels),) or not found.is_floating_point():
        raise UserError(
            f"perceptual model {spec!r}: gave {described(found)} for {len(pixels)} pictures; (B,) is needed"
        )
    if pixels.requires_grad and not found.requires_grad:
        raise UserError(f"perceptual model {spec!r}: its loss has no gradient to the pictures")
    return found
