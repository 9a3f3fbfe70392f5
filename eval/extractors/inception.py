"""Inception as clean-fid uses it (Parmar et al., 2104.11222), from a file on this machine.  Nothing is downloaded."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stepdistill import files
from stepdistill.errors import UserError, reading

from .base import Extractor, module_fingerprint

FILE_NAME = "inception-2015-12-05.pt"
URL = f"https://nvlabs-fi-cdn.nvidia.com/stylegan2-ada-pytorch/pretrained/metrics/{FILE_NAME}"
SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""The published file's hash: only with these weights is the distance a FID."""


class CleanInception(nn.Module):
    """clean-fid's "clean" mode: PIL's bicubic filter on float channels to 299x299, then Inception's 2048 features.

    Takes uint8 (B, 1 or 3, H, W); grey pictures become RGB as a file reader would make them.
    """

    num_features = 2048

    def __init__(self, network: Any):
        super().__init__()
        self.network: Any = network
        self._resize = _make_clean_resizer()

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048) of uint8 pictures (B, 1 or 3, H, W)."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(f"needs uint8 (B, 1 or 3, H, W), not {images.dtype} {tuple(images.shape)}")
        rgb = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
        resized = torch.from_numpy(np.stack([self._resize(picture) for picture in rgb]))
        pixels = resized.permute(0, 3, 1, 2).to(images.device)
        return self.network.layers((pixels - 128) / 128).reshape(len(images), -1)


class TensorFlowInception(nn.Module):
    """The same network with a resize to 299x299 inside, TensorFlow's bilinear one: EDM's FID, and clean-fid's
    "legacy_tensorflow" mode.  Takes uint8 (B, 1 or 3, H, W)."""

    num_features = 2048

    def __init__(self, network: Any):
        super().__init__()
        self.network: Any = network

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048)."""
        return self.network(images.expand(-1, 3, -1, -1).float(), return_features=True).reshape(len(images), -1)


def _make_clean_resizer() -> Callable[[np.ndarray], np.ndarray]:
    try:
        from cleanfid.resize import build_resizer
    except ImportError as error:
        raise UserError(
            f"extractor inception: needs the package clean-fid ({error}); pip install 'stepdistill[eval]'"
        ) from None
    return build_resizer("clean")


def default_location() -> Path:
    """Where clean-fid looks for the file: ``/tmp``, the current folder on Windows."""
    return Path("." if platform.system() == "Windows" else "/tmp") / FILE_NAME


def weights_file(path: str | Path | None = None) -> Path:
    """The file that ``path`` means: itself, in a folder of that name, or where clean-fid looks for it."""
    file = default_location() if path is None else Path(path)
    return file / FILE_NAME if file.is_dir() else file


def load_inception(path: str | Path | None = None, resize_inside: bool = False) -> Extractor:
    """Inception from ``path`` (the file, or a folder that holds it), by default from where clean-fid looks for it.

    ``resize_inside``: :class:`TensorFlowInception` in place of :class:`CleanInception`.

    Raises:
        UserError: no such file (says which, where from, where to), not TorchScript, or clean-fid missing.
    """
    file = weights_file(path)
    if not file.is_file():
        raise UserError(
            f"extractor inception: weights {file} are missing; download {URL} and put the file there "
            f"(or set the extractor to inception:FILE)"
        )
    with reading("extractor inception", f"download {URL} again", f"{file} is not clean-fid's Inception"):
        network = torch.jit.load(file, map_location="cpu").eval()
        layers = network.layers
    official = files.digest(file) == SHA256
    name = "inception" if official else "inception_unknown_weights"
    module: nn.Module
    if resize_inside:
        module, way = TensorFlowInception(network), "inside: TensorFlow's bilinear to 299x299"
        fingerprint = module_fingerprint(layers, "tensorflow")
    else:
        module, way = CleanInception(network), "clean-fid clean: PIL bicubic in float to 299x299"
        fingerprint = module_fingerprint(layers, "clean-fid clean")
    module.requires_grad_(False).eval()
    return Extractor(module, name, fingerprint, resize=way, is_fid=official)
