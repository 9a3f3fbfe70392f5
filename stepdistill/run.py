"""The run folder: the config of a run, its measurements and its results.

config.yaml       the resolved config, defaults included
environment.json  versions, git state, command, when, digests of the teacher's weights
record.json       what its evaluation and report need to know of method and parts (stepdistill.run_record)
metrics.jsonl     one row every train.log_every student updates; what damage was taken out is in metrics.jsonl.damaged
samples/          grids over time on fixed noise
cache/            latents of real images
pairs/            the teacher's noise-sample pairs (stepdistill.data.teacher_pairs)
checkpoints/      whole checkpoints (stepdistill.checkpoint)
nodes/            recorded weights, for methods that walk a path (stepdistill.roles.recorded)
student/          the exported stock pipeline
evaluation.json, grid.png, report.html
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from stepdistill.stock.folders import holds_parts, is_whole

from . import files
from .config import dump_yaml, read_mapping
from .digests import Digests
from .errors import UserError, reading, show_value, writing
from .locks import Lock
from .plain_files import read_json

PACKAGES = ("stepdistill", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")
LONGEST_NAME = 200
"""Bytes of a file's name that leave room for what temporary names add, of the 255 that file systems take."""
ENVIRONMENT = "environment.json"
CACHE = "cache"
PAIRS = "pairs"
PARTS = ("checkpoints", "samples", "nodes", CACHE, PAIRS)
"""Folders in a run's that files are written to."""
FREE_KEYS = {"output", "evaluation"}
"""Top-level keys that may differ when a run is resumed; train's own are in FREE_TRAIN_KEYS."""
FREE_TRAIN_KEYS = {
    "updates",
    "max_minutes",
    "max_passes",
    "log_every",
    "sample_every",
    "checkpoint_every",
    "keep_checkpoints",
    "trackers",
    "attention",
    "non_finite_limit",
}


def environment(seed: int) -> dict[str, Any]:
    """Versions, git state, command and machine, for the record."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "versions": versions,
        "git": _git_state(),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "seed": seed,
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
    }


def _git_state() -> dict[str, Any] | None:
    def ask(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return {"commit": ask("rev-parse", "HEAD"), "dirty": bool(ask("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return None


def fixed_part(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a raw config that must stay the same when its run is resumed."""
    fixed = {key: value for key, value in config.items() if key not in FREE_KEYS}
    if "train" in fixed:
        train = fixed["train"] or {}
        fixed["train"] = {key: value for key, value in train.items() if key not in FREE_TRAIN_KEYS}
    for section, images in (("data", "images"), ("pso", "pairs")):
        if (fixed.get(section) or {}).get(images):
            fixed[section] = {**fixed[section], images: _without(fixed[section][images], "max_unreadable")}
    if fixed.get("data"):
        fixed["data"] = _without(fixed["data"], "shown")  # which concerns pictures alone
        if part := fixed["data"].get("part"):  # the folder of several students may be moved
            fixed["data"]["part"] = _without(part, "router")
    return fixed


def _without(section: dict[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in section.items() if k != key}


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """The keys where two configs differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        lines = []
        for key in sorted(a.keys() | b.keys()):
            lines += differences(a.get(key), b.get(key), f"{path}.{key}" if path else key)
        return lines
    return [] if a == b else [f"{path} ({show_value(a)} there, {show_value(b)} now)"]


def check_writable(folder: Path) -> None:
    """Refuse an output folder that could not be made or written.

    Raises:
        UserError: a file stands in its place or above it, a name is too long, or the rights are missing.
    """
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in folder.parts):
        raise UserError(f"output = {folder}: a name longer than {LONGEST_NAME} bytes; choose a shorter one")
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise UserError(f"output = {folder}: {'that' if existing == folder else existing} is a file; name a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"output = {folder}: {existing} cannot be written to; choose another folder, or its rights")


def check_run_folder(
    folder: Path,
    config: dict[str, Any],
    resume: bool,
    early: set[str],
    fixed: Callable[[dict[str, Any]], Any] = fixed_part,
    what: str = "config",
) -> bool:
    """Whether ``folder`` holds the run of this config, to go on with; nothing is written.

    Args:
        early: names that the folder may hold without a run, as one that was killed early leaves it.
        fixed: takes the part of a config that must be the same.
        what: the config's name in errors.

    Raises:
        UserError: the folder holds a run and ``resume`` is False, or the run has another config, or the folder
            holds something else or cannot be written.
    """
    check_writable(folder)
    saved = folder / "config.yaml"
    if not saved.exists():
        if folder.is_dir() and not all(_is_early(path, early) for path in folder.iterdir()):
            raise UserError(f"output = {folder}: the folder is not empty and holds no run; choose another")
        return False
    if not resume:
        raise UserError(
            f"output = {folder}: the folder holds a run; add --resume to go on with it, or choose another with "
            "output=FOLDER"
        )
    with reading(saved, "choose another output folder", "damaged"):
        odd = differences(fixed(read_mapping(saved)), fixed(config))
    if odd:
        raise UserError(
            f"output = {folder}: its {what} differs: {'; '.join(odd[:3])}; give it the same, or choose another folder "
            "with output=FOLDER"
        )
    return True


def _is_early(path: Path, early: set[str]) -> bool:
    """Whether something in a folder may have been written before ``config.yaml``."""
    if path.name == "samples" and path.is_dir():  # earlier versions made it first
        return not any(path.iterdir())
    return path.name in early or files.is_internal(path)


class RunFolder:
    """A run's folder.  Only the main process writes, and only one at a time: it holds :meth:`lock`."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.samples = self.path / "samples"
        self.nodes = self.path / "nodes"
        self.student = self.path / "student"

    def check(self, config: BaseModel, resume: bool) -> bool:
        """Whether there is a run to go on with; nothing is written.

        Raises:
            UserError: the folder holds a run and ``resume`` is False, or the run has another config, or the
                folder holds something else.
        """
        return check_run_folder(self.path, config.model_dump(mode="json"), resume, {CACHE, PAIRS})

    def lock(self) -> Lock:
        """The lock that a process holds while it writes in the folder."""
        return Lock(self.path, remedy="or choose another folder with output=FOLDER")

    def tidy(self) -> None:
        """Remove what killed processes left, and bring back what they had moved aside.  The lock must be held."""
        for folder in (self.path, *(self.path / name for name in PARTS)):
            files.tidy(folder)
        if self.student.is_dir() and not is_whole(self.student) and holds_parts(self.student):
            files.remove_folder(self.student)

    def create(self, config: BaseModel, seed: int, teacher: Digests | None = None) -> None:
        """Make the folder with its config, which makes it a run's, and environment.

        Args:
            teacher: the digests of the teacher's weights.

        Raises:
            UserError: it cannot be written.
        """
        with writing(f"output = {self.path}", "choose another with output=FOLDER"):
            self.path.mkdir(parents=True, exist_ok=True)
        self.write_config(config)
        self.write_environment(seed, teacher)

    def write_environment(self, seed: int, teacher: Digests | None = None) -> None:
        """Record what the run was started with, unless that is recorded."""
        if not (self.path / ENVIRONMENT).exists():
            files.write_json(self.path / ENVIRONMENT, {**environment(seed), "teacher": teacher or {}})

    @property
    def teacher(self) -> Digests:
        """The digests of the teacher that the run was started with; {} where it does not say."""
        with contextlib.suppress(OSError, ValueError):
            digests = read_json(self.path / ENVIRONMENT).get("teacher")
            return digests if isinstance(digests, dict) else {}
        return {}

    def write_config(self, config: BaseModel | dict[str, Any]) -> None:
        """Record the resolved config."""
        files.write_text(self.path / "config.yaml", dump_yaml(config))

    def drop_metrics_after(self, iteration: int) -> str | None:
        """Drop rows that a resumed run will write again, and lines that are no rows.

        Returns:
            What to tell the user, where more than a last line cut short was dropped; the file as it was stays under
            another name.

        Raises:
            UserError: it cannot be read or written.
        """
        if not self.metrics.exists():
            return None
        with reading(self.metrics, "see to the disk, or move the file away"):
            content = self.metrics.read_bytes()
        lines = content.splitlines(keepends=True)
        rows = [(line, _iteration(line)) for line in lines]
        cut = bool(lines) and not lines[-1].endswith(b"\n")  # by a kill
        bad = sum(at is None for _, at in (rows[:-1] if cut else rows))
        note = None
        if bad:
            aside = files.free_name(self.metrics.with_name(f"{self.metrics.name}.damaged"))
            with files.replacing(aside) as temporary:
                temporary.write_bytes(content)
            note = f"{self.metrics}: {bad} damaged lines are left out; the file as it was is {aside.name}"
        whole = b"".join(line.rstrip(b"\r\n") + b"\n" for line, at in rows if at is not None and at <= iteration)
        if whole != content:
            with files.replacing(self.metrics) as temporary:
                temporary.write_bytes(whole)
        return note

    def last_iteration(self) -> float:
        """That of the last row of metrics; -1 without rows.

        Raises:
            UserError: they cannot be read.
        """
        if not self.metrics.exists():
            return -1
        with reading(self.metrics, "see to the disk, or move the file away"):
            iterations = [_iteration(line) for line in self.metrics.read_bytes().splitlines()]
        return max((iteration for iteration in iterations if iteration is not None), default=-1)

    def append(self, row: dict[str, Any]) -> None:
        """One more row of metrics; what is no number becomes null.

        Raises:
            UserError: it cannot be written.
        """
        line = (json.dumps(files.replace_non_finite(row), allow_nan=False) + "\n").encode()
        with writing(self.metrics), self.metrics.open("ab", buffering=0) as file:
            end = file.tell()
            try:
                while line:
                    line = line[file.write(line) :]
            except OSError:
                with contextlib.suppress(OSError):  # no half row: the rest may come once the disk has space
                    file.truncate(end)
                raise


def _iteration(line: bytes) -> float | None:
    """The iteration of a line of metrics; None: it is no row."""
    try:
        row = json.loads(line)
        at = row["iteration"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return at if isinstance(at, int | float) and not isinstance(at, bool) else None
