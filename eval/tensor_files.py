"""Safetensors files that say in their metadata what they are."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from stepdistill import readers
from stepdistill.errors import UserError, reading


def read_tensors(path: str | Path, kind: str, what: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that :func:`stepdistill.files.write_tensors` wrote with metadata ``kind``.

    Raises:
        UserError: no such file, not safetensors, or of another kind.
    """
    if not Path(path).exists():
        raise UserError(f"{path}: no such {what}; {remedy}")
    with reading(path, "replace it", "not a readable safetensors file"):
        tensors, metadata = readers.read_tensors(path)
    if metadata.get("kind") != kind:
        raise UserError(f"{path}: a safetensors file, but not a {what} of stepdistill's; name another file")
    return tensors, metadata
