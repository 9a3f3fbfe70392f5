"""Pictures of a batch."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from stepdistill import files
from stepdistill.errors import UserError


def save_grid(pixels: Tensor, path: Path, columns: int = 10, least_side: int = 48) -> None:
    """Write (N, C, H, W) pixels in [-1, 1] as one picture, ``columns`` across; small ones are enlarged to be seen.

    Raises:
        UserError: it cannot be written, or its name's ending is no picture format's.
    """
    kind = Image.registered_extensions().get(path.suffix.lower())
    if kind is None:
        raise UserError(f"{path}: cannot be written: no picture format has this ending; name a .png")
    count, channels, height, width = pixels.shape
    array = ((pixels.float().cpu().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = math.ceil(count / columns)
    canvas = np.full((rows * height, columns * width, channels), 255, dtype=np.uint8)
    for index, picture in enumerate(array):
        top, left = divmod(index, columns)
        canvas[top * height : (top + 1) * height, left * width : (left + 1) * width] = picture
    image = Image.fromarray(canvas[..., 0] if channels == 1 else canvas[..., :3])
    scale = max(1, math.ceil(least_side / height))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
    with files.replacing(path) as temporary:
        image.save(temporary, format=kind)
