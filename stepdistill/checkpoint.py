"""Checkpoints that are whole or absent.

A checkpoint is a folder of safetensors files and a ``state.json`` that lists every file's SHA-256.  It is written
next to its place and renamed into it; older ones are deleted only after that.  Nothing is unpickled.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from . import files
from .errors import UserError, reading
from .plain_files import read_json, regular
from .readers import DIGEST

STATE = "state.json"


def save(root: Path, step: int, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any], keep: int) -> Path:
    """Write ``root/step-NNNNNNNN`` with one file for each group of tensors, then delete all but the last ``keep``.

    A whole checkpoint of the same step stays as it is: nothing has been trained since it was written.  An old one that
    cannot be deleted is named in a note, and tried again the next time.

    Raises:
        UserError: it cannot be written; earlier checkpoints are untouched.
    """
    target = root / f"step-{step:08d}"
    files.tidy(root)
    if target not in folders(root):
        _write(target, tensors, meta)
    for old in [*_parts(root), *folders(root)[:-keep]]:
        if problem := files.remove_folder(old):
            print(f"note: {old}: an old checkpoint that cannot be deleted ({problem}); delete it by hand")
    return target


def _write(target: Path, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any]) -> None:
    try:
        with files.replacing_folder(target) as temporary:
            digests = {}
            for name, group in tensors.items():
                file = temporary / f"{name}.safetensors"
                save_file({k: v.detach().cpu().contiguous().clone() for k, v in group.items()}, file)
                digests[file.name] = files.digest(file)
            state = {"files": digests, "meta": meta}
            files.write_json(temporary / STATE, {**state, DIGEST: _digest(state)})
    except UserError as error:
        last = latest(target.parent)
        remains = f"the last whole checkpoint is {last}" if last else "there is no checkpoint yet"
        raise UserError(f"{error}; {remains}; go on with --resume") from None


def _parts(root: Path) -> list[Path]:
    """Half-written and half-deleted checkpoints, as earlier versions left them when they were stopped."""
    return [p for p in _named(root) if not (p / STATE).is_file()] + list(root.glob(".step-????????.tmp"))


def _named(root: Path) -> list[Path]:
    return [p for p in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name)]


def folders(root: Path) -> list[Path]:
    """The whole checkpoints under ``root``, oldest first."""
    return sorted(p for p in _named(root) if (p / STATE).is_file())


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    whole = folders(root)
    return whole[-1] if whole else None


def load_latest(root: Path) -> tuple[Path, dict[str, dict[str, Tensor]], dict[str, Any]] | None:
    """The newest whole checkpoint with its content, as :func:`load` returns it; None where there is none.

    Where a running training deletes it meanwhile, the newer one is read.

    Raises:
        UserError: as :func:`load`.
    """
    while (path := latest(root)) is not None:
        try:
            return path, *load(path)
        except UserError:
            if path in folders(root):
                raise
    return None


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The groups of tensors and the meta data of one checkpoint, every file checked against its digest.

    Raises:
        UserError: a file is missing or damaged, or the folder is no checkpoint of stepdistill.
    """
    remedy = f"delete {path} to go on from the one before it"
    if not (path / STATE).exists():
        raise UserError(f"checkpoint {path}: {STATE} is missing; {remedy}")
    with reading(f"checkpoint {path}", remedy, f"{STATE} is damaged"):
        state = read_json(path / STATE)
        digests, meta = dict(state["files"]), dict(state["meta"])
        if not all(isinstance(name, str) and re.fullmatch(r"[\w-]+\.safetensors", name) for name in digests):
            raise ValueError("it names other files")
        if DIGEST in state and state[DIGEST] != _digest({"files": digests, "meta": meta}):
            raise ValueError("its content is not what was written")
    tensors = {}
    for name, digest in digests.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"checkpoint {path}: {name} is missing; {remedy}")
        if not _has_its_size(file) or files.digest(file) != digest:
            raise UserError(f"checkpoint {path}: {name} is damaged (its checksum differs); {remedy}")
        with reading(f"checkpoint {path}", remedy, f"{name} cannot be read"):
            tensors[file.stem] = load_file(file)
    return tensors, meta


def _has_its_size(file: Path) -> bool:
    """Whether a safetensors file is as long as its header says, before it is read to its end."""
    try:
        with safe_open(regular(file), "pt"):
            return True
    except (SafetensorError, OSError, ValueError):
        return False


def _digest(state: dict[str, Any]) -> str:
    """SHA-256 of a state as JSON."""
    return hashlib.sha256(json.dumps(files.replace_non_finite(state), sort_keys=True).encode()).hexdigest()
