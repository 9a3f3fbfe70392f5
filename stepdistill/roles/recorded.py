"""Recorded weights of one network along a training: each written whole, and read only if it is unchanged.

A node is one safetensors file, ``node-NNNNNNNN.safetensors`` by the update that it was taken at; ``path.json`` says
which nodes the path has.  Without a folder (tests, benchmarks) they stay in memory.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from stepdistill import files
from stepdistill.errors import UserError, first_line
from stepdistill.plain_files import read_bytes

PATH = "path.json"


@dataclass(frozen=True)
class Node:
    """One recorded set of weights: after how many updates, its loss then, its file's SHA-256."""

    update: int
    loss: float
    sha256: str


class NodeStore:
    """Nodes in ``folder``, made on the first write; in memory where it is None.

    ``writes``: whether this process writes the files; the others of the same run leave that to it.
    """

    def __init__(self, folder: Path | None = None, writes: bool = True):
        self.folder, self.writes = folder, writes
        self._memory: dict[int, bytes] = {}

    def write(self, update: int, loss: float, tensors: dict[str, Tensor]) -> Node:
        """Record the tensors as they are now.

        Raises:
            UserError: the folder cannot be written.
        """
        data = save({k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()})
        if self.folder is None:
            self._memory[update] = data
        elif self.writes:
            with files.replacing(_file(self.folder, update)) as temporary:
                temporary.write_bytes(data)
        return Node(update, loss, hashlib.sha256(data).hexdigest())

    def read(self, node: Node) -> dict[str, Tensor]:
        """The tensors of a node.

        Raises:
            UserError: its file is missing, or is not the one that was written.
        """
        if self.folder is None:
            return load(self._memory[node.update])
        file = _file(self.folder, node.update)
        remedy = "the path cannot be walked without it: start the run again in another output folder"
        try:
            data = read_bytes(file)
        except (OSError, ValueError) as error:
            raise UserError(f"{file}: this node is missing ({first_line(error)}); {remedy}") from None
        if hashlib.sha256(data).hexdigest() != node.sha256:
            raise UserError(f"{file}: this node is damaged (its checksum differs); {remedy}")
        try:
            return load(data)
        except SafetensorError as error:
            raise UserError(f"{file}: this node is damaged ({error}); {remedy}") from None

    def keep(self, nodes: list[Node], facts: dict[str, Any]) -> None:
        """Delete all but ``nodes``, then describe these in ``path.json``.

        A file that cannot be deleted is named in a note.

        Raises:
            UserError: ``path.json`` cannot be written.
        """
        if self.folder is None:
            updates = {node.update for node in nodes}
            self._memory = {update: data for update, data in self._memory.items() if update in updates}
            return
        names = {node.update: _file(self.folder, node.update).name for node in nodes}
        content = {**facts, "nodes": [{"file": names[node.update], **asdict(node)} for node in nodes]}
        for file in self.folder.glob("node-*.safetensors"):
            if file.name not in names.values():
                try:
                    file.unlink(missing_ok=True)
                except OSError as error:
                    print(f"note: {file}: a node that is not needed cannot be deleted ({first_line(error)})")
        files.write_json(self.folder / PATH, content)

    @property
    def has_path(self) -> bool:
        """Whether :meth:`keep` has come to its end."""
        return self.folder is not None and (self.folder / PATH).exists()


def _file(folder: Path, update: int) -> Path:
    return folder / f"node-{update:08d}.safetensors"
