"""A small feature network of stepdistill's, for data that no public network knows."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError, reading
from stepdistill.eval.tensor_files import read_tensors
from stepdistill.files import write_tensors
from stepdistill.judges.contrastive import CalibratedFeatures

from .base import module_fingerprint

SMALLEST, LARGEST = 16, 64
"""The picture sides, in pixels, that :class:`FeatureNetwork` is made for."""


def unit_pixels(images: Tensor) -> Tensor:
    """uint8 0..255 or floating [0, 1], any shape, to float32 in [0, 1]."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    return images.float()


def _convolution(inside: int, outside: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(8, outside),
        nn.SiLU(),
    )


class FeatureNetwork(CalibratedFeatures):
    """A small classifier of 16x16 to 64x64 pictures; its penultimate layer is the feature.

    The feature is linear (no ReLU before it, so it is dense and roughly Gaussian); the classifier reads it
    through a SiLU, so that all of its directions can matter.  The last map is pooled to 4x4, not to 1x1: where
    things are counts too.  :meth:`calibrate` centres the feature and scales it by one number, so that distances
    of different networks are of one size and the kernel distance's kernel, made for unit scale, fits.

    Attributes:
        num_features: F, the width of the feature.
        name: what metrics call it, such as ``fashion_mnist_features``.
        notes: accuracy, training config and the like, as saved.
    """

    def __init__(
        self,
        channels: int = 1,
        num_labels: int = 10,
        num_features: int = 64,
        width: int = 32,
        name: str = "features",
    ):
        super().__init__()
        self.architecture = {
            "channels": channels,
            "num_labels": num_labels,
            "num_features": num_features,
            "width": width,
        }
        self.channels, self.num_features, self.name = channels, num_features, name
        self.notes: dict = {}
        self.backbone = nn.Sequential(
            _convolution(channels, width, 1),
            _convolution(width, 2 * width, 2),
            _convolution(2 * width, 2 * width, 1),
            _convolution(2 * width, 2 * width, 2),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )
        self.feature = nn.Linear(32 * width, num_features)
        self.classifier = nn.Linear(num_features, num_labels)
        self.register_buffer("center", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(()))

    def raw_feature(self, images: Tensor) -> Tensor:
        """The feature (B, num_features) before calibration."""
        shape = tuple(images.shape[1:])
        if shape[0] != self.channels or not all(SMALLEST <= side <= LARGEST for side in shape[1:]):
            raise UserError(
                f"extractor {self.name}: takes {self.channels} channel(s) and sides of {SMALLEST} to {LARGEST} "
                f"pixels, not pictures of shape {shape}; use an extractor made for these"
            )
        return self.feature(self.backbone(unit_pixels(images) * 2 - 1))

    def logits(self, images: Tensor) -> Tensor:
        """Class scores (B, num_labels) of pictures as in :meth:`forward`."""
        return self.classifier(nn.functional.silu(self.raw_feature(images)))

    def fingerprint(self) -> str:
        """SHA-256 of the architecture and the weights."""
        return module_fingerprint(self, json.dumps(self.architecture, sort_keys=True))

    def save(self, path: str | Path) -> Path:
        """One safetensors file, written whole; architecture, name and notes in its metadata."""
        metadata = {
            "kind": "stepdistill.FeatureNetwork",
            "name": self.name,
            "architecture": json.dumps(self.architecture),
            "notes": json.dumps(self.notes),
        }
        return write_tensors(path, self.state_dict(), metadata)

    @classmethod
    def load(cls, path: str | Path) -> FeatureNetwork:
        """From a file that :meth:`save` wrote, frozen and in eval mode.

        Raises:
            UserError: no such file, not safetensors, or of something else.
        """
        remedy = "make one with a config like configs/train_teachers/fashion_mnist_features.yaml"
        tensors, metadata = read_tensors(path, "stepdistill.FeatureNetwork", "feature network", remedy)
        with reading(path, remedy, "not a whole feature network"):
            return cls.rebuild(tensors, metadata)
