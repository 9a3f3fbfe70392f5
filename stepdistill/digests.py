"""Digests that show whether weights have changed.

An exported folder has ``stepdistill.json``, the SHA-256 of each of its weight files; stock diffusers ignores it.
Loading a folder compares the files that are about to be read.  A run remembers a digest of its teacher.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor, nn

from . import files
from .errors import UserError, reading
from .plain_files import read_json
from .readers import check_extent

RECORD = "stepdistill.json"
WEIGHTS = (".safetensors", ".bin")
"""Ends of the names of weight files, LoRA's among them."""
EXPORTED = f"damaged or changed since it was exported; export it again, or delete {RECORD} if you changed it on purpose"
SHOWN = 12
"""Characters of a digest in messages."""

Digests = dict[str, str]
"""SHA-256 by the network's name."""


# -- folders -----------------------------------------------------------------------------------------------


def write_record(folder: Path, suffixes: Collection[str] = WEIGHTS) -> Path:
    """Write the record of a folder's files with these ends of their names, in place of an earlier one.

    Raises:
        UserError: it cannot be written.
    """
    listed = sorted(path for path in folder.rglob("*") if path.suffix in suffixes and path.name != RECORD)
    digests = {path.relative_to(folder).as_posix(): files.digest(path) for path in listed}
    files.write_json(folder / RECORD, {"sha256": digests})
    return folder / RECORD


def read_record(folder: Path) -> Digests | None:
    """The digests of a folder's files by their names in it; None where it has no record.

    Raises:
        UserError: the record is damaged.
    """
    file = folder / RECORD
    if not file.exists():
        return None
    with reading(file, "export the folder again, or delete this file"):
        digests = read_json(file).get("sha256")
        if not isinstance(digests, dict) or not all(isinstance(value, str) for value in digests.values()):
            raise ValueError("it is not a record of digests")
        if not all(name and PurePosixPath(name).parts and ".." not in PurePosixPath(name).parts for name in digests):
            raise ValueError("it names files outside of the folder")
    return digests


def check_folder(folder: Path, what: str, parts: Collection[str] | None = None, problem: str = EXPORTED) -> None:
    """Refuse a folder whose weight files are not those that its record is of; a folder without a record passes.

    Args:
        what: the folder's name in errors.
        parts: the sub-folders, or files, that are about to be read; all of them by default.
        problem: what is wrong with a file that differs, and what to do.

    Raises:
        UserError: it names the file.
    """
    for name, digest in (read_record(folder) or {}).items():
        if parts is None or PurePosixPath(name).parts[0] in parts or name in parts:
            _compare(folder / name, digest, f"{what}: {name}", problem)


def check_file(file: Path, what: str) -> None:
    """Refuse a weight file that has changed, by the record of its folder or of the folder above.

    Raises:
        UserError: it is damaged or was changed.
    """
    for folder in (file.parent, file.parent.parent):
        digest = (read_record(folder) or {}).get(file.relative_to(folder).as_posix())
        if digest is not None:
            _compare(file, digest, what, EXPORTED)
            return


def _compare(file: Path, digest: str, what: str, problem: str) -> None:
    with reading(what, problem.partition("; ")[2]):
        check_extent(file)
        same = files.digest(file) == digest
    if not same:
        raise UserError(f"{what}: {problem}")


# -- a run's teacher ---------------------------------------------------------------------------------------


def digest_networks(networks: Mapping[str, nn.Module]) -> Digests:
    """The digest of each network's weights, bit for bit, without any LoRA on it.

    It is of values, not of how they are stored: a network loaded in half precision has the same digest in float32.
    """
    return {name: _digest_of_values(_base_tensors(network)) for name, network in networks.items()}


def _base_tensors(network: nn.Module) -> dict[str, Tensor]:
    tensors = network.state_dict().items()
    return {name.replace(".base_layer.", "."): value for name, value in tensors if "lora_" not in name}


def _digest_of_values(tensors: dict[str, Tensor]) -> str:
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing lets other threads run
        parts = pool.map(lambda item: f"{item[0]} {_digest_of_tensor(item[1])}", sorted(tensors.items()))
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _digest_of_tensor(value: Tensor) -> str:
    value = value.detach().cpu()
    if value.dtype in (torch.float16, torch.bfloat16):
        value = value.float()
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().data
    return f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(data).hexdigest()}"


def check_same(remembered: object, now: Digests, what: str) -> None:
    """Refuse to go on with another teacher than the one of the digests ``remembered``; anything else passes.

    Args:
        what: the teacher's name, for the error.

    Raises:
        UserError: it names the network and both digests.
    """
    if not isinstance(remembered, dict):
        return
    for name in sorted(remembered.keys() & now.keys()):
        before = str(remembered[name])
        if before != now[name]:
            raise UserError(
                f"teacher {what}: the weights of its {name} are not those that the run was started with (digest "
                f"{before[:SHOWN]} then, {now[name][:SHOWN]} now); put the earlier ones back, or start a new run in "
                "another folder with output=FOLDER"
            )
