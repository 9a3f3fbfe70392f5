"""A small judge of pictures and captions, for data that no public model knows: features, and a CLIP-like cosine.

Two towers trained together by the symmetric contrastive loss of CLIP (2103.00020): convolutions for the picture, a bag
of hashed words for the caption.  It is no CLIP: its cosines are comparable among themselves alone, and its tag says so.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Self

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from stepdistill.errors import UserError, reading
from stepdistill.plain_files import parse_json
from stepdistill.readers import read_metadata, read_tensors

from .clip import ClipScorer

KIND = "stepdistill.MatchingNetwork"
WORDS = re.compile(r"[a-z0-9]+")


def is_matching(path: str | Path) -> bool:
    """Whether a safetensors file holds a :class:`MatchingNetwork`."""
    try:
        return read_metadata(path).get("kind") == KIND
    except (SafetensorError, OSError, ValueError):
        return False


class CalibratedFeatures(nn.Module):
    """A network whose raw feature (B, F) is centred, ``center`` (F,), and scaled by one number, ``scale``."""

    center: Tensor
    scale: Tensor

    def raw_feature(self, images: Tensor) -> Tensor:
        """The feature (B, F) before it is centred and scaled."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, F), float32, of uint8 0..255 or float [0, 1] pictures (B, C, H, W).

        Raises:
            UserError: pictures of other channels or sides.
        """
        return (self.raw_feature(images) - self.center) * self.scale

    @classmethod
    def rebuild(cls, tensors: dict[str, Tensor], metadata: dict[str, str]) -> Self:
        """The network that a file's tensors and metadata say, frozen, float32, in eval mode.

        Nothing is allocated before all tensors are known to fit.

        Raises:
            Exception: metadata or tensors of another network; call it inside :func:`errors.reading`.
        """
        architecture = parse_json(metadata["architecture"])
        with torch.device("meta"):
            network = cls(**architecture, name=metadata["name"])
        network.load_state_dict({name: value.float() for name, value in tensors.items()}, assign=True)
        network.notes = parse_json(metadata["notes"])
        return network.requires_grad_(False).eval()

    @torch.inference_mode()
    def calibrate(self, images: Tensor, batch_size: int = 500) -> None:
        """Make the mean of the features of these pictures (N, C, H, W) 0, and their mean variance 1."""
        raw = torch.cat([self.raw_feature(batch) for batch in images.split(batch_size)]).double()
        self.center.copy_(raw.mean(0))
        self.scale.copy_(raw.var(0).mean().rsqrt())


class MatchingNetwork(CalibratedFeatures):
    """Pictures (B, 3, S, S) and captions to unit vectors of the same space.

    The picture's feature (B, F), before its embedding, is what distances are measured in: linear, centred and scaled by
    :meth:`calibrate` as the classifiers' features are.

    Attributes:
        num_features: F.  name: what metrics call it.  notes: accuracies, training config, as saved.
    """

    def __init__(
        self,
        size: int = 64,
        num_features: int = 128,
        width: int = 32,
        embedding: int = 128,
        buckets: int = 4096,
        max_words: int = 24,
        name: str = "matching",
    ):
        super().__init__()
        self.architecture = {
            "size": size,
            "num_features": num_features,
            "width": width,
            "embedding": embedding,
            "buckets": buckets,
            "max_words": max_words,
        }
        self.size, self.num_features, self.name = size, num_features, name
        self.buckets, self.max_words = buckets, max_words
        self.notes: dict = {}
        widths = (3, width, 2 * width, 4 * width, 4 * width)
        blocks = []
        for inside, outside in itertools.pairwise(widths):
            blocks += [
                nn.Conv2d(inside, outside, 3, stride=2, padding=1, bias=False),
                nn.GroupNorm(8, outside),
                nn.SiLU(),
            ]
        self.backbone = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(4), nn.Flatten())
        self.feature = nn.Linear(64 * width, num_features)
        self.picture = nn.Linear(num_features, embedding)
        self.words = nn.EmbeddingBag(buckets, embedding, mode="mean", padding_idx=0)
        self.caption = nn.Sequential(nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.log_scale = nn.Parameter(torch.tensor(2.5))
        self.register_buffer("center", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(()))

    def raw_feature(self, images: Tensor) -> Tensor:
        """The feature (B, F) before calibration, of pictures (B, 3, S, S), uint8 or [0, 1]."""
        if tuple(images.shape[1:]) != (3, self.size, self.size):
            raise UserError(
                f"extractor {self.name}: takes pictures of (3, {self.size}, {self.size}), not "
                f"{tuple(images.shape[1:])}; use an extractor made for these"
            )
        unit = images.float() / 255 if images.dtype == torch.uint8 else images.float()
        return self.feature(self.backbone(unit * 2 - 1))

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings (B, E) of pictures."""
        return self.picture(nn.functional.silu(self.raw_feature(images)))

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embeddings (B, E) of hashed words (B, ``max_words``), 0 for none."""
        mean = self.words(tokens)
        return mean + self.caption(mean)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Words to buckets 1.., (B, ``max_words``); the order of words does not count."""
        rows = torch.zeros(len(captions), self.max_words, dtype=torch.long)
        for row, caption in zip(rows, captions, strict=True):
            for place, word in enumerate(WORDS.findall(caption.lower())[: self.max_words]):
                row[place] = 1 + int.from_bytes(hashlib.sha256(word.encode()).digest()[:8]) % (self.buckets - 1)
        return rows

    def logits(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Scaled cosines (B, B) of each picture with each caption."""
        picture, caption = (
            nn.functional.normalize(x, dim=-1) for x in (self.encode_image(images), self.encode_text(tokens))
        )
        return self.log_scale.clamp(max=4.6).exp() * picture @ caption.T

    def make_scorer(self, device: str | torch.device = "cpu") -> ClipScorer:
        """As what ``clip`` settings and losses take."""

        def transform(picture: Image.Image) -> Tensor:
            sized = picture.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
            return pil_to_tensor(sized).float() / 255

        plain = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
        tag = f"{self.name} (a small contrastive network, not CLIP)"
        return ClipScorer(self, transform, self.tokenize, tag, "", device, (self.size, self.size), **plain)

    @classmethod
    def load(cls, path: str | Path) -> MatchingNetwork:
        """From a file that was written with :meth:`metadata`, frozen and in eval mode.

        Raises:
            UserError: no such file, or not one of these.
        """
        remedy = "make one with configs/train_teachers/emoji_features.yaml"
        with reading(path, remedy, "not a readable safetensors file"):
            tensors, metadata = read_tensors(path)
        if metadata.get("kind") != KIND:
            raise UserError(f"{path}: no matching network of stepdistill's; {remedy}")
        with reading(path, remedy, "not a whole matching network"):
            return cls.rebuild(tensors, metadata)

    def metadata(self) -> dict[str, str]:
        """What a file of this network says of it."""
        return {
            "kind": KIND,
            "name": self.name,
            "architecture": json.dumps(self.architecture),
            "notes": json.dumps(self.notes),
        }
