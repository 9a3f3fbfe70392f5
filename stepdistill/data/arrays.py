"""Images in arrays: ``.npz`` files, and MNIST's idx files."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from stepdistill import files
from stepdistill.errors import UserError, reading
from stepdistill.readers import array_names, read_arrays

from .images import ImageSet
from .pictures import Shape, fit


def read_array_images(
    pixels: np.ndarray,
    labels: Sequence[int] | Sequence[str] | np.ndarray | None,
    shape: Shape | None,
    resize: bool,
    source: str,
    background: str = "white",
) -> ImageSet:
    """An ImageSet over a uint8 array (N, H, W) or (N, H, W, C); ``labels`` are integers or captions (N,), or None.

    ``shape`` None: the images are not read, their labels are.
    """
    whole = pixels.ndim == 3 or (pixels.ndim == 4 and pixels.shape[-1] in (1, 3, 4))
    if not whole or pixels.dtype != np.uint8 or pixels.size == 0:
        raise UserError(
            f"{source}: images must be uint8 of shape (N, H, W) or (N, H, W, C), C 1, 3 or 4, not {pixels.dtype} "
            f"{pixels.shape}"
        )
    if pixels.ndim == 4 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    values = None if labels is None else _checked_labels(np.asarray(labels), len(pixels), source)

    def read(index: int) -> np.ndarray:
        return fit(Image.fromarray(pixels[index]), shape, resize, f"{source}[{index}]", background)

    if shape is not None:
        read(0)  # a wrong size is answered at once
    fingerprint = hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()
    if _has_alpha(pixels):
        fingerprint += background
    hint = "write labels or captions into an array 'labels'"
    return ImageSet(source, read, len(pixels), values, fingerprint, hint=hint)


def _checked_labels(labels: np.ndarray, count: int, source: str) -> list[Any]:
    if labels.ndim != 1 or labels.dtype.kind not in "iuU":
        raise UserError(
            f"{source}: labels must be integers or captions of shape (N,), not {labels.dtype} {labels.shape}"
        )
    if len(labels) != count:
        raise UserError(f"{source}: {count} images but {len(labels)} labels")
    return labels.tolist()


def _has_alpha(pixels: np.ndarray) -> bool:
    return pixels.ndim == 4 and pixels.shape[-1] == 4


def read_npz(
    path: str | Path,
    shape: Shape | None,
    resize: bool = False,
    key: str = "data.images.npz",
    background: str = "white",
) -> ImageSet:
    """``.npz`` with ``images`` uint8 (N, H, W[, C]) and, if it has them, ``labels`` (N,): integers or captions.

    ``key`` is the config's, for errors.
    """
    with reading(path, f"set {key} to an existing .npz", "not a readable .npz file"):
        arrays = read_arrays(path, "images", "labels")
    if "images" not in arrays:
        names = ", ".join(array_names(path)) or "none"
        raise UserError(f"{path}: no array named 'images' (it holds {names}); write one with numpy.savez")
    return read_array_images(arrays["images"], arrays.get("labels"), shape, resize, str(path), background)


def write_npz(path: str | Path, images: np.ndarray, labels: np.ndarray | None = None) -> Path:
    """A compressed ``.npz`` that :func:`read_npz` reads, whole or not at all.

    Args:
        images: uint8 (N, H, W) or (N, H, W, C); of one channel they are written as (N, H, W).
        labels: integers or captions (N,).

    Raises:
        UserError: it cannot be written.
    """
    path = Path(path)
    images = images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images
    arrays = {"images": images}
    if labels is not None:
        arrays["labels"] = labels if labels.dtype.kind == "U" else labels.astype(np.int64)
    with files.replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    return path


def read_idx(images: str | Path, labels: str | Path | None, shape: Shape | None, resize: bool = True) -> ImageSet:
    """MNIST's idx format, plain or gzipped: uint8 images (N, H, W) and labels (N,).

    Raises:
        UserError: a file is not there, is damaged, or of another format.
    """

    def parse(path: str | Path) -> np.ndarray:
        try:
            raw = Path(path).read_bytes()
            raw = gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw
        except FileNotFoundError:
            raise UserError(f"{path}: no such file (Debian's dataset-fashion-mnist has one)") from None
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}: not readable ({error}); fetch the file again") from None
        if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
            raise UserError(f"{path}: not an idx file of bytes")
        try:
            dims = np.frombuffer(raw, ">i4", raw[3], 4)
            return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(dims)
        except ValueError:
            raise UserError(f"{path}: cut short; fetch the file again") from None

    return read_array_images(parse(images), None if labels is None else parse(labels), shape, resize, str(images))
