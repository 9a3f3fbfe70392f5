"""A small SOLO (1912.04488) and its training on the shipped pictures, as a perceptual model of tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from stepdistill import assets
from stepdistill.data.arrays import read_npz
from stepdistill.data.order import Order
from stepdistill.judges.instances import Instances, instance_loss


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
    """The network trained on the shipped pictures in some seconds: ``solo:fashion_mnist``.

    Its indices are places in ``asset:fashion_mnist/images.npz``, so the run's data must be that file.
    """
    images = read_npz(assets.resolve("asset:fashion_mnist/images.npz"), (1, 16, 16))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = GridInstanceNet(1, 10, OneInstance(images.labels))
    return network.fit(images.batch(list(range(len(images)))))
