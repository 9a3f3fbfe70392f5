"""Pictures of a batch as one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from stepdistill import files
from stepdistill.errors import UserError

from .pixels import signed_to_bytes


def tile_pictures(pictures: Tensor, columns: int, least_side: int, gap: int = 0) -> Image.Image:
    """One picture of many on white: ``columns`` across, row by row, small ones enlarged by a whole factor.

    Args:
        pictures: uint8 (N, C, H, W); one channel is grey, of more the first three are red, green and blue.
        least_side: pixels of the shorter side at least, after enlarging.
        gap: pixels of white at the left of and below each.
    """
    count, channels, height, width = pictures.shape
    factor = max(1, -(-least_side // min(height, width)))
    size = (width * factor, height * factor)
    cell_width, cell_height = size[0] + gap, size[1] + gap
    rows = -(-count // columns)
    canvas = Image.new("L" if channels == 1 else "RGB", (columns * cell_width, rows * cell_height), "white")
    for index, array in enumerate(pictures[:, :3].permute(0, 2, 3, 1).cpu().numpy()):
        picture = Image.fromarray(array[..., 0] if channels == 1 else array)
        row, column = divmod(index, columns)
        place = (column * cell_width + gap, row * cell_height)
        canvas.paste(picture.resize(size, Image.Resampling.NEAREST), place)
    return canvas


def save_grid(pixels: Tensor, path: Path, columns: int = 10, least_side: int = 48) -> None:
    """Write (N, C, H, W) pixels in [-1, 1] as one picture, ``columns`` across; small ones are enlarged to be seen.

    Raises:
        UserError: it cannot be written, or its name's ending is no picture format's.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path}: cannot be written: no picture format has this ending; name a .png")
    save_picture(tile_pictures(signed_to_bytes(pixels), columns, least_side), path, kind)


def save_picture(image: Image.Image, path: Path, kind: str = "PNG", **options: Any) -> None:
    """Write a picture file, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    with files.replacing(path) as temporary:
        image.save(temporary, format=kind, **options)
