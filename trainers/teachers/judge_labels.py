"""Making evaluation assets, as the shipped ones were made: a feature network, reference statistics, packed images.

``prepare_assets`` does all three from one config (``stepdistill teacher features CONFIG``).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from tqdm import tqdm

from stepdistill.config import Section, UserPath
from stepdistill.data.arrays import read_idx, read_npz, write_npz
from stepdistill.data.images import ImageSet
from stepdistill.data.order import Order
from stepdistill.data.pictures import mirror_half
from stepdistill.data.pixels import signed_to_bytes
from stepdistill.errors import UserError
from stepdistill.eval.extractors.load import as_extractor
from stepdistill.eval.extractors.small import FeatureNetwork
from stepdistill.eval.measure.reference_statistics import make_reference
from stepdistill.seeds import RunSeed
from stepdistill.stock.folders import without_places


class LabelledImages(Section):
    """Pictures with labels: MNIST's idx files, or one ``.npz``."""

    idx_images: UserPath | None = Field(None, description="images in MNIST's idx format, plain or gzipped")
    idx_labels: UserPath | None = Field(None, description="their labels")
    npz: UserPath | None = Field(None, description="an .npz with 'images' and 'labels'")

    @model_validator(mode="after")
    def _one_source(self) -> LabelledImages:
        if (self.npz is None) == (self.idx_images is None):
            raise ValueError("set either npz, or idx_images with idx_labels")
        if (self.idx_images is None) != (self.idx_labels is None):
            raise ValueError("idx_images and idx_labels belong together")
        return self

    def read(self, shape: tuple[int, int, int]) -> ImageSet:
        """The pictures as ``shape`` (C, H, W), Lanczos-resized where they differ."""
        if self.npz is not None:
            return read_npz(self.npz, shape, resize=True, key="npz")
        return read_idx(str(self.idx_images), self.idx_labels, shape, resize=True)


class FeatureConfig(Section):
    """A feature network, the statistics of its data, and a packed subset of it."""

    output: UserPath = Field(description="the folder for features.safetensors, reference.safetensors and images.npz")
    name: str = Field("features", pattern=r"^[A-Za-z0-9_.-]+$", description="what metrics call the extractor")
    source: str = Field(description="what the data is called in reports")
    seed: RunSeed = 0
    train: LabelledImages
    test: LabelledImages
    resolution: int = Field(16, ge=16, le=64)
    channels: Literal[1, 3] = 1
    num_labels: int = Field(10, ge=2, le=10**6)
    num_features: int = Field(64, ge=2, le=65_536)
    width: int = Field(32, ge=8, le=1024, multiple_of=8, description="channels of the first convolution")
    epochs: int = Field(8, ge=1, le=10**6)
    batch_size: int = Field(64, ge=1, le=65_536)
    lr: float = Field(3e-3, gt=0, description="peak learning rate of AdamW (one cycle)")
    weight_decay: float = Field(0.01, ge=0)
    shift: int = Field(1, ge=0, le=64, description="random shift of training pictures, pixels each way")
    mirror: bool = Field(False, description="mirror half of the training pictures, left to right")
    label_smoothing: float = Field(0.05, ge=0, lt=1)
    kid_features: int = Field(5000, ge=2, le=10**7, description="features stored for the kernel distance")
    packed_images: int = Field(
        6000, ge=1, le=10**8, description="pictures in images.npz, the same number of each label"
    )

    @property
    def shape(self) -> tuple[int, int, int]:
        return (self.channels, self.resolution, self.resolution)


def read_all(images: ImageSet, batch_size: int = 1000) -> Tensor:
    """Every picture as uint8 (N, C, H, W)."""
    starts = range(0, len(images), batch_size)
    return torch.cat([signed_to_bytes(images.batch(list(range(i, min(i + batch_size, len(images)))))) for i in starts])


def _shift(pixels: Tensor, most: int, generator: torch.Generator) -> Tensor:
    """uint8 (B, C, H, W) moved by up to ``most`` pixels each way, one draw for the batch; zeros fill the edge."""
    if most == 0:
        return pixels
    down, right = torch.randint(0, 2 * most + 1, (2,), generator=generator).tolist()
    height, width = pixels.shape[-2:]
    padded = nn.functional.pad(pixels, (most, most, most, most))
    return padded[..., down : down + height, right : right + width]


@torch.inference_mode()
def accuracy(network: FeatureNetwork, pixels: Tensor, labels: Tensor, batch_size: int = 500) -> float:
    """The share of uint8 pictures (N, C, H, W) whose label (N,) the network names."""
    chunks = zip(pixels.split(batch_size), labels.split(batch_size), strict=True)
    right = sum((network.logits(x).argmax(1) == y).sum().item() for x, y in chunks)
    return right / len(labels)


def train_features(config: FeatureConfig, device: str = "cpu") -> FeatureNetwork:
    """Train the classifier whose features are used, print its test accuracy, write ``features.safetensors``.

    Cross entropy with label smoothing, AdamW on a one-cycle rate.  Same config, same weights on the CPU.

    Raises:
        UserError: data that is missing, of the wrong kind, or with labels outside ``num_labels``.
    """
    train, test = config.train.read(config.shape), config.test.read(config.shape)
    known, tested = (torch.tensor(images.classes(config.num_labels), device=device) for images in (train, test))
    pixels = read_all(train).to(device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = FeatureNetwork(config.channels, config.num_labels, config.num_features, config.width, config.name)
    network = network.to(device)
    started = time.perf_counter()
    _fit(network, pixels, known, config)
    network.eval().requires_grad_(False)
    network.calibrate(pixels)
    score = accuracy(network, read_all(test).to(device), tested)
    print(f"feature network {config.name}: {score:.2%} of {len(test)} test pictures labelled correctly")
    network.notes = {
        "accuracy": score,
        "seconds": round(time.perf_counter() - started, 1),
        "config": without_places(config.model_dump(mode="json", exclude={"output"})),
    }
    network.cpu().save(Path(config.output) / "features.safetensors")
    return network


def _fit(network: FeatureNetwork, pixels: Tensor, labels: Tensor, config: FeatureConfig) -> None:
    """The training loop: ``epochs`` passes over uint8 pixels (N, C, H, W) and labels (N,)."""
    steps = max(1, config.epochs * len(pixels) // config.batch_size)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=steps, pct_start=0.15)
    order = Order(len(pixels), config.seed)
    generator = torch.Generator().manual_seed(config.seed)
    bar = tqdm(range(steps), desc="features", unit="step")
    for step in bar:
        index = order.indices(step * config.batch_size, config.batch_size)
        x0 = mirror_half(pixels[index], generator) if config.mirror else pixels[index]
        logits = network.logits(_shift(x0, config.shift, generator))
        loss = nn.functional.cross_entropy(logits, labels[index], label_smoothing=config.label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def balanced_subset(labels: list[int], count: int, seed: int) -> list[int]:
    """``count`` indices, sorted, with as equal numbers of each label as possible; seeded.

    Raises:
        UserError: a label with too few pictures.
    """
    generator = np.random.default_rng(seed)
    kinds = sorted(set(labels))
    share = [count // len(kinds) + (i < count % len(kinds)) for i in range(len(kinds))]
    chosen: list[int] = []
    for label, number in zip(kinds, share, strict=True):
        of_label = np.flatnonzero(np.asarray(labels) == label)
        if len(of_label) < number:
            raise UserError(f"packed_images = {count}: label {label} has {len(of_label)} pictures, {number} are needed")
        chosen += generator.choice(of_label, number, replace=False).tolist()
    return sorted(chosen)


def pack_images(images: ImageSet, count: int, seed: int, path: str | Path) -> Path:
    """A class-balanced subset as a compressed ``.npz``: ``images`` uint8 (N, H, W[, C]), ``labels`` int64 (N,)."""
    labels = [label for label in images.labels or [] if isinstance(label, int)]
    index = balanced_subset(labels, count, seed)
    pixels = signed_to_bytes(images.batch(index)).permute(0, 2, 3, 1).numpy()
    return write_npz(path, pixels, np.asarray(labels)[index])


def prepare_assets(config: FeatureConfig, device: str = "cpu") -> dict[str, Path]:
    """Feature network, reference statistics and packed pictures under ``config.output``; their paths by name."""
    output = Path(config.output)
    network = train_features(config, device)
    images = config.train.read(config.shape)
    reference = make_reference(
        images,
        as_extractor(network),
        source=config.source,
        kid_features=config.kid_features,
        seed=config.seed,
        resize=f"Lanczos to {config.resolution}x{config.resolution} where the size differs",
        device=device,
    )
    return {
        "features": output / "features.safetensors",
        "reference": reference.save(output / "reference.safetensors"),
        "images": pack_images(images, config.packed_images, config.seed, output / "images.npz"),
    }
