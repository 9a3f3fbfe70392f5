"""Checkpoints that are whole or absent.

A checkpoint is a folder of safetensors files and a ``state.json`` that lists every file's SHA-256.  It is written
beside its place and renamed into it; older ones are deleted only after that.  Nothing is unpickled.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stepdistill.errors import UserError

STATE = "state.json"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(root: Path, step: int, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any], keep: int) -> Path:
    """Write ``root/step-NNNNNNNN`` with one file a group of tensors, then drop all but the last ``keep``.

    A whole checkpoint of the same step stays as it is: nothing has been trained since it was written.

    Raises:
        UserError: no space left; earlier checkpoints are untouched.
    """
    target = root / f"step-{step:08d}"
    temporary = root / f".step-{step:08d}.tmp"
    if target in folders(root):
        return target
    try:
        root.mkdir(parents=True, exist_ok=True)
        for leftover in root.glob(".step-*.tmp"):  # of a run that was killed while it wrote
            shutil.rmtree(leftover)
        temporary.mkdir()
        digests = {}
        for name, group in tensors.items():
            file = temporary / f"{name}.safetensors"
            save_file({k: v.detach().cpu().contiguous().clone() for k, v in group.items()}, file)
            _sync(file)
            digests[file.name] = _digest(file)
        state = temporary / STATE
        state.write_text(json.dumps({"files": digests, "meta": meta}, indent=1), encoding="utf-8")
        _sync(state)
        _sync(temporary)
        shutil.rmtree(target, ignore_errors=True)
        temporary.rename(target)
        _sync(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space" in str(error)
        if full:
            last = latest(root)
            kept = f"; the last whole checkpoint is {last}" if last else ""
            raise UserError(f"{root}: no space left for a checkpoint; free some and use --resume{kept}") from None
        raise
    for old in folders(root)[:-keep]:
        (old / STATE).unlink()  # first, so that half a folder never counts as whole
        shutil.rmtree(old)
    return target


def folders(root: Path) -> list[Path]:
    """The whole checkpoints under ``root``, oldest first."""
    named = (p for p in root.glob("step-*") if re.fullmatch(r"step-\d{8,}", p.name))
    return sorted(p for p in named if (p / STATE).is_file())


def latest(root: Path) -> Path | None:
    """The newest whole checkpoint, or None."""
    found = folders(root)
    return found[-1] if found else None


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The groups of tensors and the meta data of one checkpoint, every file checked against its digest.

    Raises:
        UserError: a file is missing or damaged, or the folder is not a checkpoint of ours.
    """
    remedy = f"delete {path} to go on from the one before it"
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        files, meta = dict(state["files"]), dict(state["meta"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"checkpoint {path}: {STATE} is missing or damaged; {remedy}") from None
    tensors = {}
    for name, digest in files.items():
        file = path / name
        if not file.is_file():
            raise UserError(f"checkpoint {path}: {name} is missing; {remedy}")
        if _digest(file) != digest:
            raise UserError(f"checkpoint {path}: {name} is damaged (its checksum differs); {remedy}")
        tensors[file.stem] = load_file(file)
    return tensors, meta
