"""The judge of a captioned set: ``stepdistill teacher features CONFIG`` with ``kind: matching``.

A picture-caption network (:class:`stepdistill.judges.contrastive.MatchingNetwork`) trained on captioned pictures, and
the reference statistics, in its features, of the pictures that the teacher was trained on: all of these, or some.
"""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from tqdm import tqdm

from stepdistill.config import Section, UserPath
from stepdistill.data.arrays import read_array_images
from stepdistill.data.images import ImageSet
from stepdistill.data.order import Order
from stepdistill.errors import UserError
from stepdistill.eval.extractors.load import as_extractor
from stepdistill.eval.measure.reference_statistics import make_reference
from stepdistill.files import write_tensors
from stepdistill.judges.contrastive import MatchingNetwork
from stepdistill.seeds import RunSeed

from .captioned import Entry, read_pictures, training_caption


class MatchingConfig(Section):
    """The network, its training, and the reference."""

    kind: Literal["matching"]
    output: UserPath = Field(description="the folder for matching.safetensors and reference.safetensors")
    name: str = Field("matching", pattern=r"^[A-Za-z0-9_.-]+$", description="what metrics call it")
    source: str = Field(description="what the data is called in reports")
    data: UserPath = Field(description="a folder written by stepdistill teacher emoji: what the network learns from")
    reference_data: UserPath | None = Field(None, description="another one, whose training split the reference is of")
    seed: RunSeed = 0
    num_features: int = Field(128, ge=2, le=65_536)
    width: int = Field(32, ge=8, le=1024, multiple_of=8)
    steps: int = Field(3000, ge=1, le=10**9)
    batch_size: int = Field(128, ge=2, le=65_536)
    lr: float = Field(2e-3, gt=0, description="peak learning rate of AdamW (one cycle)")
    weight_decay: float = Field(0.05, ge=0)
    shift: int = Field(3, ge=0, le=64, description="random shift of training pictures, pixels each way")
    noise: float = Field(0.05, ge=0, description="of training pictures in [0, 1]: generated ones are not clean")
    kid_features: int = Field(5000, ge=2, le=10**7)


def prepare_matching(config: MatchingConfig, device: str = "cpu") -> dict[str, Path]:
    """Train, calibrate and measure the network, and write the files; their paths by name.

    Raises:
        UserError: data that is missing or of the wrong kind.
    """
    images, entries = read_pictures(config.data)
    size = images.shape[1]
    if images.shape[1] != images.shape[2]:
        raise UserError(f"data: {config.data} has pictures of {images.shape[2]}x{size}; squares are read")
    measured = _reference_pictures(config, images, entries)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    trained = [i for i, entry in enumerate(entries) if entry.split == "train"]
    known = [entries[i] for i in trained]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = MatchingNetwork(size, config.num_features, config.width, name=config.name)
    network = network.to(device)
    started = time.perf_counter()
    _fit(network, pixels[trained], known, config, device)
    network.eval().requires_grad_(False)
    network.calibrate(pixels[trained].to(device))
    shares = {
        split: rank_captions(network, pixels, entries, split, device) for split in ("held-out-pair", "held-out-name")
    }
    for split, (count, first, tenth) in shares.items():
        print(
            f"{config.name}: of {count} pictures of split {split} {first:.1%} find their caption first, "
            f"{tenth:.1%} in the first ten"
        )
    network.notes = {
        "ranks": {split: list(values) for split, values in shares.items()},
        "seconds": round(time.perf_counter() - started, 1),
        "config": config.model_dump(mode="json", exclude={"output", "data", "reference_data"}),
    }
    output = Path(config.output)
    path = write_tensors(output / "matching.safetensors", network.cpu().state_dict(), network.metadata())
    reference = make_reference(measured, as_extractor(network), config.source, config.kid_features, config.seed)
    return {"matching": path, "reference": reference.save(output / "reference.safetensors")}


def _reference_pictures(config: MatchingConfig, images: np.ndarray, entries: list[Entry]) -> ImageSet:
    """The training split that the reference is of: from ``reference_data``, or from the pictures passed in."""
    key, folder, size = "data", config.data, images.shape[1]
    if config.reference_data is not None:
        key, folder = "reference_data", config.reference_data
        images, entries = read_pictures(folder, key)
    if images.shape[1:3] != (size, size):
        raise UserError(
            f"{key}: {folder} has pictures of {images.shape[2]}x{images.shape[1]}, data's are {size}x{size}"
        )
    trained = [i for i, entry in enumerate(entries) if entry.split == "train"]
    if not trained:
        raise UserError(f"{key}: {folder} has no picture of split train")
    return read_array_images(images[trained], None, (3, size, size), False, folder)


@torch.inference_mode()
def rank_captions(
    network: MatchingNetwork, pixels: Tensor, entries: list[Entry], split: str, device: str
) -> tuple[int, float, float]:
    """The number of pictures of ``split``, and the shares whose caption is the first, or among the first ten, of all
    the captions."""
    members = [i for i, entry in enumerate(entries) if entry.split == split]
    if not members:
        return 0, 0.0, 0.0
    captions = nn.functional.normalize(
        network.encode_text(network.tokenize([e.caption for e in entries]).to(device)), dim=-1
    )
    starts = range(0, len(members), 500)
    pictures = torch.cat([network.encode_image(pixels[members[i : i + 500]].to(device)) for i in starts])
    cosine = nn.functional.normalize(pictures, dim=-1) @ captions.T
    of_caption = cosine[torch.arange(len(members)), torch.tensor(members)]
    above = (cosine > of_caption[:, None]).sum(1)
    return len(members), (above == 0).float().mean().item(), (above < 10).float().mean().item()


def _fit(network: MatchingNetwork, pixels: Tensor, entries: list[Entry], config: MatchingConfig, device: str) -> None:
    """Symmetric cross entropy of pictures and captions in a batch."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=config.steps + 1, pct_start=0.15)
    order, generator = Order(len(pixels), config.seed), torch.Generator().manual_seed(config.seed)
    bar = tqdm(range(config.steps), desc=config.name, unit="step")
    for step in bar:
        index = order.indices(step * config.batch_size, config.batch_size)
        draw = random.Random(f"{config.seed} {step}")
        tokens = network.tokenize([training_caption(entries[i], draw) for i in index]).to(device)
        images = pixels[index].float() / 255
        move = torch.randint(-config.shift, config.shift + 1, (2,), generator=generator).tolist()
        images = nn.functional.pad(images, (config.shift,) * 4, value=1.0).roll(move, (2, 3))
        edge = config.shift
        images = images[..., edge : images.shape[2] - edge, edge : images.shape[3] - edge]
        images = images + config.noise * torch.rand((), generator=generator) * torch.randn(
            images.shape, generator=generator
        )
        logits = network.logits(images.to(device), tokens)
        target = torch.arange(len(index), device=device)
        loss = (nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
