"""Pictures as pixels: as a viewer shows them, on a background where they are transparent, of one size."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Annotated

import numpy as np
import torch
from PIL import ExifTags, Image, ImageColor, ImageOps
from pydantic import AfterValidator
from torch import Tensor

from stepdistill.errors import UserError, first_line

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
Shape = tuple[int, int, int]
"""(C, H, W)."""
TURNED = (5, 6, 7, 8)
"""EXIF orientations that exchange width and height."""


class UnreadablePicture(UserError):
    """A picture that cannot be decoded."""


def _colour(text: str) -> str:
    try:
        ImageColor.getrgb(text)
    except ValueError:
        raise ValueError(f"{text} is no colour; write a name such as white, or '#rrggbb'") from None
    return text


Colour = Annotated[str, AfterValidator(_colour)]
"""A colour in a config: a name, or ``#rrggbb``."""


def open_header(source: str | Path | IO[bytes], name: str) -> Image.Image:
    """A picture whose header was read, its pixels not yet.

    Raises:
        UnreadablePicture: that is not possible; ``name`` is the picture's.
    """
    try:
        return Image.open(source)
    except Exception as error:  # decoders raise many kinds for damaged files
        raise _unreadable(name, error) from None


def open_picture(source: str | Path | IO[bytes], name: str) -> Image.Image:
    """A picture with its pixels.

    Raises:
        UnreadablePicture: it cannot be decoded; ``name`` is the picture's.
    """
    image = open_header(source, name)
    try:
        image.load()
    except Exception as error:
        raise _unreadable(name, error) from None
    return image


def _unreadable(name: str, error: Exception) -> UnreadablePicture:
    return UnreadablePicture(f"{name}: not a readable image ({first_line(error)}); remove or replace the file")


def turn_upright(image: Image.Image) -> Image.Image:
    """A picture turned as its EXIF orientation says; as it is where that cannot be read."""
    with contextlib.suppress(Exception):
        return ImageOps.exif_transpose(image)
    return image


def size_upright(image: Image.Image) -> tuple[int, int]:
    """(width, height) of :func:`turn_upright`, by the header alone."""
    orientation = 1
    if image.format != "PNG" or "exif" in image.info:  # Pillow decodes the whole of any other PNG to look for it
        with contextlib.suppress(Exception):
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    return image.size[::-1] if orientation in TURNED else image.size


def make_opaque(image: Image.Image, background: str = "white") -> Image.Image:
    """A picture on ``background`` where it is transparent; the same one where it has no transparency."""
    if not image.has_transparency_data:
        return image
    image = image.convert("LA") if image.mode == "La" else image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, ImageColor.getrgb(background)[:3]), image).convert("RGB")


def check_kind(image: Image.Image, size: tuple[int, int], shape: Shape, resize: bool, name: str) -> None:
    """Refuse a picture that :func:`fit` cannot bring to ``shape`` (C, H, W).

    Args:
        size: (width, height) as it is shown.

    Raises:
        UserError: more than 8 bits a channel, or another size without ``resize``.
    """
    if image.mode.startswith(("I", "F")):  # Pillow would clip these to 255
        raise UserError(f"{name}: the image has mode {image.mode}; 8 bits a channel are read, convert the files")
    _, height, width = shape
    if size != (width, height) and not resize:
        raise UserError(
            f"{name}: the image is {size[0]}x{size[1]}, the teacher needs {width}x{height}; "
            "resize the files or set data.images.resize=true"
        )


def fit(image: Image.Image, shape: Shape | None, resize: bool, name: str, background: str = "white") -> np.ndarray:
    """A picture as uint8 (H, W, C) of ``shape`` (C, H, W), upright and opaque.

    With ``resize`` another size is cropped to the largest window of the shape's proportions in the middle, and
    brought to size by PIL's Lanczos filter.

    Raises:
        UserError: more than 8 bits a channel, or another size without ``resize``; ``name`` is the picture's.
        ValueError: ``shape`` is None, which says that the pictures are not needed.
    """
    if shape is None:
        raise ValueError(f"{name}: these pictures are read for their captions alone, without a shape")
    channels, height, width = shape
    image = turn_upright(image)
    check_kind(image, image.size, shape, resize, name)
    image = make_opaque(image, background).convert("L" if channels == 1 else "RGB")
    if image.size != (width, height):
        side = min(image.size[0] / width, image.size[1] / height)
        crop_w, crop_h = side * width, side * height
        left, top = (image.size[0] - crop_w) / 2, (image.size[1] - crop_h) / 2
        image = image.resize((width, height), Image.Resampling.LANCZOS, box=(left, top, left + crop_w, top + crop_h))
    return np.asarray(image, dtype=np.uint8).reshape(height, width, channels)


def mirror_half(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Turn each of the pictures (B, C, H, W) left to right with probability one half; ``generator`` is on the CPU."""
    flip = torch.rand(len(pixels), generator=generator) < 0.5
    return torch.where(flip.to(pixels.device)[:, None, None, None], pixels.flip(-1), pixels)


def as_pixels(images: Sequence[np.ndarray]) -> Tensor:
    """uint8 images (H, W, C) as float32 (B, C, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
