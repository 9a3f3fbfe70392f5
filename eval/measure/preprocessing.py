"""What is done to pictures before they are measured: bytes, crop, size.  The same to drawn ones and to references."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import center_crop

from stepdistill.data.folders import read_folder
from stepdistill.data.images import ImageSet
from stepdistill.data.pictures import make_opaque, turn_upright
from stepdistill.data.pixels import unit_to_bytes


@dataclass(frozen=True)
class Preprocessing:
    """Bytes of pictures, then a centre crop to the shorter side and PIL's Lanczos filter to ``side`` (both sides).

    ``side`` None leaves the size alone.  ``floor`` cuts a pixel's value to a byte, as DMD2's code does, where
    ``round`` takes the nearest, as a picture file would hold it.  ``files``: picture files as a viewer shows them
    (turned by their EXIF orientation, on white where they are transparent), or the stored pixels, as clean-fid's and
    DMD2's code reads them.
    """

    side: int | None = None
    bytes: Literal["round", "floor"] = "round"
    files: Literal["shown", "stored"] = "shown"

    @property
    def crop(self) -> str:
        return "none" if self.side is None else "centre, to the shorter side"

    @property
    def description(self) -> str:
        """As a reference's ``resize`` says it."""
        shown = ", as a viewer shows them" if self.files == "shown" else ""
        return f"crop {self.crop}, {self.resize}{shown}"

    @property
    def resize(self) -> str:
        return "none" if self.side is None else f"PIL lanczos to {self.side}x{self.side}"

    def to_bytes(self, pixels: Tensor) -> Tensor:
        """Pixels in [0, 1], any shape, to uint8 0..255."""
        return unit_to_bytes(pixels) if self.bytes == "round" else (pixels.float() * 255).clamp(0, 255).to(torch.uint8)

    def __call__(self, pictures: Tensor) -> Tensor:
        """uint8 (B, 1 or 3, H, W) to (B, the same, side, side)."""
        if self.side is None:
            return pictures
        arrays = pictures.permute(0, 2, 3, 1).cpu().numpy()
        images = (Image.fromarray(array[..., 0] if array.shape[-1] == 1 else array) for array in arrays)
        return torch.from_numpy(np.stack([self.process_image(image) for image in images])).permute(0, 3, 1, 2)

    def process_file(self, image: Image.Image, mode: str) -> np.ndarray:
        """uint8 (side, side, C) of a picture file, C by PIL's ``mode``."""
        return self.process_image((make_opaque(turn_upright(image)) if self.files == "shown" else image).convert(mode))

    def process_image(self, image: Image.Image) -> np.ndarray:
        """uint8 (side, side, C)."""
        side = self.require_side()
        image = center_crop(image, [min(image.size)]).resize((side, side), Image.Resampling.LANCZOS)
        return np.asarray(image, dtype=np.uint8).reshape(side, side, -1)

    def require_side(self) -> int:
        """``side``, which must be set."""
        if self.side is None:
            raise ValueError("these pictures keep their size; set side")
        return self.side


def read_preprocessed_folder(path: str | Path, preprocessing: Preprocessing, channels: int = 3) -> ImageSet:
    """The pictures of a folder, of any sizes, as RGB (or grey) of the preprocessing's side, which must be set.

    Raises:
        UserError: no such folder, no pictures in it, or one that cannot be read.
    """
    mode = "L" if channels == 1 else "RGB"
    side = preprocessing.require_side()
    shape = (channels, side, side)
    return read_folder(path, shape, treat=lambda image: preprocessing.process_file(image, mode), key="reference")
