"""Reading users' files of arrays and tensors: of a size that such a file can have, never more than fits into memory.

What is wrong is raised as :class:`ValueError` or :class:`OSError` in a few words; ``with errors.reading(...)`` around
the call makes the user's line of it.
"""

from __future__ import annotations

import hashlib
import json
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from .plain_files import MOST_TEXT, regular, require_memory

DIGEST = "sha256"
"""The key of a safetensors file's metadata under which the digest of its content stands."""


def check_extent(path: str | Path) -> Path:
    """``path``, a plain file that is no longer than its kind can be: hashing one that is may never end.

    Raises:
        OSError, ValueError, safetensors.SafetensorError: as :func:`regular`, or longer.
    """
    path = regular(path)
    if path.suffix == ".safetensors":
        with safe_open(path, "pt"):  # its header says how long it is
            return path
    if path.suffix in (".json", ".txt", ".yaml") and path.stat().st_size > MOST_TEXT:
        raise ValueError(f"it is larger than {MOST_TEXT:,} bytes")
    return path


# -- NumPy -------------------------------------------------------------------------------------------------


def read_arrays(path: str | Path, *names: str) -> dict[str, np.ndarray]:
    """The arrays ``names`` of an ``.npz``, those that it holds; all of them without names.  Nothing is unpickled.

    Every array's header is compared with what the file holds and with the memory before it is read.

    Raises:
        OSError: as :func:`regular`.
        ValueError, zipfile.BadZipFile: not an ``.npz``, damaged, or with Python objects in it.
        MemoryError: larger than the memory.
    """
    path = regular(path)
    if not zipfile.is_zipfile(path):
        raise ValueError("it is not an .npz file; numpy.savez writes one")
    with zipfile.ZipFile(path) as archive:
        members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
        selected = [name for name in names or members if name in members]
        require_memory(sum(_checked_size(archive, members[name]) for name in selected))
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in selected}


def array_names(path: str | Path) -> list[str]:
    """The names of the arrays in an ``.npz``."""
    with zipfile.ZipFile(path) as archive:
        return [name.removesuffix(".npy") for name in archive.namelist()]


def _checked_size(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> int:
    """Bytes of one array, once its header is known to fit the file."""
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        if version not in ((1, 0), (2, 0), (3, 0)):
            raise ValueError(f"its array {info.filename} is of NumPy's format {version}")
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(member)
        start = member.tell()
    if dtype.hasobject:
        raise ValueError(f"its array {info.filename} holds Python objects, which are not read")
    size = math.prod(shape) * dtype.itemsize
    if size != info.file_size - start:
        raise ValueError(
            f"its array {info.filename} says {dtype} {shape}, {size:,} bytes, and holds {info.file_size - start:,}"
        )
    return size


# -- tensors -----------------------------------------------------------------------------------------------


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata of a safetensors file, {} without any.

    Raises:
        OSError, ValueError: as :func:`regular`.
        safetensors.SafetensorError: not such a file.
    """
    with safe_open(regular(path), "pt") as file:
        return file.metadata() or {}


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; where the metadata holds a digest, it is compared.

    Raises:
        OSError, ValueError: as :func:`regular`.
        ValueError: the content is not what was written.
        safetensors.SafetensorError: not such a file.
    """
    with safe_open(regular(path), "pt") as file:
        metadata = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no iterator)
    if DIGEST in metadata and metadata[DIGEST] != digest_tensors(tensors, metadata):
        raise ValueError("its content is not what was written: the digest differs")
    return tensors, metadata


def digest_tensors(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> str:
    """SHA-256 of named tensors, bit for bit, and of metadata (the digest in it aside)."""
    sha = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        sha.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        sha.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    if metadata is not None:
        sha.update(json.dumps({k: v for k, v in metadata.items() if k != DIGEST}, sort_keys=True).encode())
    return sha.hexdigest()


def read_weights(path: str | Path) -> Any:
    """What a weight file holds, on the CPU: a ``.safetensors`` file's tensors, or what ``torch.save`` wrote.

    No code in the file is run.

    Raises:
        OSError, ValueError: as :func:`regular`.
        Exception: many kinds, of a file that is damaged or of another type.
    """
    path = regular(path)
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    zipped = zipfile.is_zipfile(path)  # torch.save's format since 1.6, which can be mapped instead of read
    if zipped:
        _check_sums(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)


def read_torchscript(path: str | Path) -> torch.jit.ScriptModule:
    """A TorchScript module, on the CPU.

    Raises:
        OSError, ValueError: as :func:`regular`, or a part of it is not what was written.
        RuntimeError: not such a file.
    """
    path = regular(path)
    if zipfile.is_zipfile(path):
        _check_sums(path)
    return torch.jit.load(path, map_location="cpu")


def _check_sums(path: Path) -> None:
    """Compare a zip's checksums, which torch itself passes over.

    Raises:
        ValueError: one differs.
    """
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise ValueError(f"its part {damaged} is damaged: the checksum differs")
