"""A feature extractor: what a distance between sets of pictures is measured with.

Every extractor takes uint8 pictures (B, C, H, W) and gives features (B, F).  A distance is named by its extractor
(:attr:`Extractor.metric`); only clean-fid's Inception, known by the hash of its weights, makes a "FID".
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError, reading
from stepdistill.finiteness import is_finite


def module_fingerprint(module: nn.Module, description: str = "") -> str:
    """SHA-256 of a description and of every tensor in the state dict: name, dtype, shape, bytes."""
    digest = hashlib.sha256(description.encode())
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, Tensor):
            digest.update(f"{name}={value!r}".encode())
            continue
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@dataclass(frozen=True)
class Extractor:
    """A feature network with what a report must say of it.

    Attributes:
        module: uint8 (B, C, H, W) to (B, F).
        name: what metrics call it.
        fingerprint: SHA-256 of its weights and architecture.
        resize: what it does to a picture's size; ``none`` where it takes pictures as they are.
        is_fid: Inception's official weights under clean-fid's protocol, and nothing else.
        titles: what papers call the Fréchet and the kernel distance over these features, where they have a name.
    """

    module: nn.Module
    name: str
    fingerprint: str
    resize: str = "none"
    is_fid: bool = False
    titles: tuple[str, str] | None = None

    @property
    def num_features(self) -> int:
        return int(getattr(self.module, "num_features"))  # noqa: B009 (a module's attributes have no types)

    @property
    def metric(self) -> str:
        """The name of the Fréchet distance over these features."""
        if self.titles is not None:
            return self.titles[0]
        return "FID" if self.is_fid else f"frechet[{self.name}]"

    @property
    def kernel_metric(self) -> str:
        """The name of the kernel distance over these features."""
        if self.titles is not None:
            return self.titles[1]
        return "KID" if self.is_fid else f"kid[{self.name}]"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, F) in float32 on the CPU of uint8 pictures (B, C, H, W)."""
        with reading(f"extractor {self.name}", "name another", "cannot be called on these pictures"):
            features = self.module(images)
        if not isinstance(features, Tensor) or features.shape != (len(images), self.num_features):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(
                f"extractor {self.name}: gave {got} for {len(images)} pictures; it must give "
                f"({len(images)}, {self.num_features})"
            )
        features = features.float().cpu()
        if not is_finite(features):
            raise UserError(
                f"extractor {self.name}: gave features that are not numbers; its weights are broken, name another"
            )
        return features

    def to(self, device: str | torch.device) -> Extractor:
        """Move the network."""
        self.module.to(device)
        return self
