"""Commands of stepdistill that are killed, or meet an error of the disk, at any of their file operations in a folder.

``python killing.py REQUEST.json``: a list of mappings with ``scenario``, ``kind`` and what :func:`main` says; prints a
JSON list of how many points were tried and what was wrong.  Every command is a fork of one process that has imported
everything, so a case costs what its work costs.

Kinds: ``kills``: what lies on the disk before each operation, which is what a kill there leaves, is copied while the
command runs once, and each state that differs from the others is gone on with.  ``kill``: the process ends there.
``once-EIO`` and the like: that operation fails.  ``EIO`` and the like: every change from there on fails.  ``limit``: no
file may be longer than so many bytes.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import hashlib
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import safetensors.torch
import tiny
import torch
import yaml

from stepdistill import files
from stepdistill.cli import main as cli
from stepdistill.config import merge
from stepdistill.stock.folders import is_whole
from stepdistill.trainers.plans import finish, single

KILLED = 9
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}
LOOKS = {"os.scandir", "os.listdir"}
ERRORS = {name: getattr(errno, name) for name in ("EIO", "ENOSPC", "EACCES", "EROFS", "EDQUOT")}


# -- the disk ------------------------------------------------------------------------------------------------


class Disk:
    """Counts the file operations below ``root`` in this process, and lets the ``at``-th one fail.

    Attributes:
        kind: as the module says; ``count`` for nothing but counting.
        shots: where ``kills`` copies states to.
        states: the copy of each operation's state, by the operation's number.
        exchanges: whether two folders can change places, as not every system can.
    """

    exchanges = True

    def __init__(self, root: Path, kind: str, at: int, shots: Path | None = None):
        self.folder, self.root, self.kind, self.at, self.shots = root, os.fsencode(root), kind, at, shots
        self.count, self.log, self.states, self.busy = 0, [], [], False

    def operation(self, name: str, path: object, changes: bool, half: Half = contextlib.nullcontext) -> None:
        place = _bytes(path)
        if self.busy or place is None or not (place.startswith(self.root) or not place.startswith(b"/")):
            return
        self.count += 1
        self.log.append(f"{name} {os.fsdecode(place)}")
        if self.kind == "kills":
            self.busy = True
            self.record()
            if half is not contextlib.nullcontext:
                with half():
                    self.record()
            self.busy = False
        if self.kind == "kill" and self.count > self.at:
            half().__enter__()
            os._exit(KILLED)
        once, _, code = self.kind.rpartition("-")
        if code in ERRORS and (self.count == self.at + 1 if once else changes and self.count > self.at):
            raise OSError(ERRORS[code], os.strerror(ERRORS[code]), os.fsdecode(place))

    def record(self) -> None:
        """Copy the folder, unless one like it was copied."""
        copy = self.shots / state_of(self.folder)
        if not copy.exists():
            copy.mkdir()  # stands for a folder that is not there
            if self.folder.is_dir():
                shutil.copytree(self.folder, copy / "output", symlinks=True)
        self.states.append([self.count - 1, copy.name])


def state_of(folder: Path) -> str:
    """A hash of all files' names and contents but times, and of temporary names' random parts."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*"), key=lambda path: re.sub(RANDOM, "*", str(path))):
        if path.name != ".lock":
            digest.update(re.sub(RANDOM, "*", f"{path.relative_to(folder)} {path.is_dir() or _content(path)}").encode())
    return digest.hexdigest()[:20]


Half = Callable[[], contextlib.AbstractContextManager]
"""Leaves half of what an operation writes."""
DISK: Disk | None = None
RANDOM = r"\w+-\d+-[0-9a-f]{8}\.tmp"


def _bytes(path: object) -> bytes | None:
    if isinstance(path, int):
        try:
            return os.readlink(f"/proc/self/fd/{path}").encode()
        except OSError:
            return None
    return os.fsencode(path) if isinstance(path, str | bytes | os.PathLike) else None


def _audit(event: str, arguments: tuple) -> None:
    if DISK is None:
        return
    if event in CHANGES or event in LOOKS:
        DISK.operation(event, arguments[0], event in CHANGES)
    elif event == "open" and not isinstance(arguments[0], int):
        path, mode, flags = arguments
        writes = any(c in mode for c in "wax+") if mode else (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        torn = contextlib.nullcontext
        if mode and "a" in mode:

            @contextlib.contextmanager
            def torn():
                row = b'{"iteration": 1, "pas'
                with open(path, "ab") as file:
                    file.write(row)
                yield
                os.truncate(path, os.path.getsize(path) - len(row))

        DISK.operation(event, path, bool(writes), torn)


def _watched() -> None:
    """Operations that Python does not announce: syncing, exchanging, and what safetensors writes."""
    sync, exchange, serialize = os.fsync, files._exchange, safetensors.torch.serialize_file

    def fsync(descriptor):
        if DISK is not None:
            DISK.operation("fsync", descriptor, True)
        return sync(descriptor)

    def exchanged(a, b):
        if DISK is not None and not DISK.exchanges:
            return False
        if DISK is not None:
            try:
                DISK.operation("exchange", b, True)
            except OSError:
                return False
        return exchange(a, b)

    def serialized(tensors, path, metadata=None):
        @contextlib.contextmanager
        def half():
            serialize(tensors, path, metadata)
            os.truncate(path, os.path.getsize(path) // 2)
            yield

        if DISK is not None:
            DISK.operation("serialize", path, True, half)
        return serialize(tensors, path, metadata)

    os.fsync, files._exchange, safetensors.torch.serialize_file = fsync, exchanged, serialized
    sys.addaudithook(_audit)


# -- commands ------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    code: int
    errors: list[str]
    log: list[str]
    states: list[tuple[int, str]]


def command(arguments: list[str], root: Path, kind: str = "count", at: int = 0, shots: Path | None = None) -> Outcome:
    """``stepdistill ARGUMENTS`` in a fork."""
    reads, writes = os.pipe()
    counted, counts = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            _child(arguments, Disk(root, kind, at, shots), writes, counts)
        finally:
            os._exit(1)
    os.close(writes)
    os.close(counts)
    with open(reads, "rb") as pipe, open(counted, "rb") as numbers:
        printed, outcomes = pipe.read().decode(errors="replace"), numbers.read().decode()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = [line for line in printed.replace("\r", "\n").splitlines() if line.strip()]
    lines = [line for line in lines if "update/s" not in line and not line.startswith("note: ")]
    content = json.loads(outcomes) if outcomes else {"log": [], "states": []}
    return Outcome(code, lines, **content)


def _child(arguments: list[str], disk: Disk, writes: int, counts: int) -> None:
    global DISK
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(writes, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    sys.argv = ["stepdistill", *map(str, arguments)]
    if disk.kind == "limit":
        resource.setrlimit(resource.RLIMIT_FSIZE, (disk.at, disk.at))
    DISK = disk
    code = 0
    try:
        cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    DISK = None
    sys.stderr.flush()
    with open(counts, "wb") as pipe:
        pipe.write(json.dumps({"log": disk.log, "states": disk.states}).encode())
    os._exit(code)


# -- what must come out --------------------------------------------------------------------------------------


def snapshot(folder: Path) -> dict[str, object]:
    """Every file below a folder by what must be the same in every run of the same config."""
    return {str(p.relative_to(folder)): _content(p) for p in sorted(folder.rglob("*")) if not p.is_dir()}


def _content(path: Path) -> object:
    with contextlib.suppress(ValueError):  # half a file
        if path.name == "environment.json":
            return sorted(json.loads(path.read_text()))
        if path.name == "metrics.jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]
        if path.name == "state.json":
            state = json.loads(path.read_text())
            state["meta"].pop("seconds")
            return {key: value for key, value in state.items() if key != "sha256"}  # its own, seconds included
    return hashlib.sha256(path.read_bytes()).hexdigest()


def difference(a: dict[str, object], b: dict[str, object]) -> str:
    odd = sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
    return "" if not odd else f"differs after all: {', '.join(odd[:5])}"


# -- scenarios -----------------------------------------------------------------------------------------------


@dataclass
class Scenario:
    """A command that is disturbed, one that makes good, and what comes of it undisturbed.

    Attributes:
        start: what lies at ``output`` before; None: nothing.
        student: a student that is whole at any time; None: none before the end.
        good: states that were gone on with well.
    """

    output: Path
    disturbed: list[str]
    after: list[str]
    start: Path | None
    student: Path | None = None
    expected: dict[str, object] | None = None
    good: set[str] = field(default_factory=set)

    def reset(self, start: Path | None) -> None:
        shutil.rmtree(self.output, ignore_errors=True)
        if start is not None and start.is_dir():
            shutil.copytree(start, self.output, symlinks=True)

    def undisturbed(self) -> list[str]:
        """Run it, remember what it makes; its operations."""
        self.reset(self.start)
        outcome = command(self.disturbed, self.output)
        assert outcome.code == 0, outcome.errors
        self.expected = snapshot(self.output)
        return outcome.log

    def kills(self, shots: Path) -> tuple[list[tuple[int, str]], dict[str, str]]:
        """Record every state, go on with each; (the operations' states, what was wrong by state)."""
        self.reset(self.start)
        outcome = command(self.disturbed, self.output, "kills", shots=shots)
        assert outcome.code == 0, outcome.errors
        wrong = {}
        for state in dict.fromkeys(state for _, state in outcome.states):
            self.reset(shots / state / "output")
            if problem := self.repair():
                wrong[state] = problem
        return outcome.states, wrong

    def try_at(self, kind: str, at: int) -> str:
        """What is wrong after a disturbance at an operation; "" for nothing."""
        self.reset(self.start)
        outcome = command(self.disturbed, self.output, kind, at)
        if kind == "kill":
            fine = outcome.code == KILLED
        else:
            fine = (outcome.code, len(outcome.errors)) in ((0, 0), (2, 1))
        if not fine:
            return f"exit code {outcome.code}: {outcome.errors[-3:]}"
        state = state_of(self.output)
        if state not in self.good:
            if problem := self.repair():
                return problem
            self.good.add(state)
        return ""

    def repair(self) -> str:
        """What is wrong with what lies there, or comes of going on with it; "" for nothing."""
        if self.student is not None and not is_whole(self.student):
            return "the student is not whole"
        again = command(self.after, self.output)
        if again.code != 0 or again.errors:
            return f"then exit code {again.code}: {again.errors[-3:]}"
        return difference(self.expected, snapshot(self.output))


def raw_config(root: Path, output: Path, **changes) -> dict:
    raw = {
        "method": "dmd2",
        "output": str(output),
        "seed": 3,
        "teacher": {"path": str(root / "teacher"), "steps": 3},
        "optimizer": {"student": {"lr": 1e-2}, "fake_score": {"lr": 1e-2}},
        "train": {
            "updates": 2,
            "batch_size": 2,
            "log_every": 1,
            "sample_every": 1,
            "sample_count": 1,
            "checkpoint_every": 1,
            "keep_checkpoints": 1,
            "ema_decay": 0.5,
            "trackers": [],
        },
        "evaluation": {"enabled": False},
        "dmd2": {"fake_score_updates": 1},
    }
    return merge(raw, changes)


def write(root: Path, name: str, raw: dict) -> str:
    path = root / f"{name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


def scenarios(root: Path) -> Iterator[tuple[str, Scenario]]:
    """A run; an export over another student, where folders can change places and where not; the ends of a recipe and of
    several students."""
    tiny.save_pixels(root / "teacher", "v", labels=4, null=True)
    config = write(root, "run", raw_config(root, root / "run"))
    resumed = ["distill", config, "--resume"]
    run = Scenario(root / "run", ["distill", config], resumed, None)
    yield "run", run

    exported = root / "exported"
    run.undisturbed()
    assert command(["export", str(root / "run"), "--no-average"], root / "run").code == 0
    shutil.copytree(root / "run", exported)
    student = root / "run" / "student"
    export = ["export", str(root / "run")]
    yield "export", Scenario(root / "run", export, export, exported, student)
    Disk.exchanges = False
    yield "move", Scenario(root / "run", export, export, exported, student)
    Disk.exchanges = True

    short = {"train": {"updates": 1}}
    stages = [{"name": "one", "method": "dmd2"}, {"name": "two", "method": "dmd2"}]
    raw = merge(raw_config(root, root / "recipe", **short), {"stages": stages})
    del raw["method"]
    yield "recipe", _end(root, "recipe", raw, ("02-two/student", "student"))
    raw = merge(raw_config(root, root / "msd", **short), {"msd": {"students": 2}})
    yield "msd", _end(root, "msd", raw, ("student-1/student", "student"))


def _end(root: Path, name: str, raw: dict, gone: tuple[str, ...]) -> Scenario:
    """A command at its end: all is trained, the last students are not written yet."""
    config, start = write(root, name, raw), root / f"{name}-start"
    outcome = command(["distill", config], root / name)
    assert outcome.code == 0, outcome.errors
    shutil.copytree(root / name, start)
    for part in gone:
        shutil.rmtree(start / part)
    resumed = ["distill", config, "--resume"]
    return Scenario(root / name, resumed, resumed, start)


def main(request: list[dict]) -> None:
    """Each of ``request``: scenario and kind; ``count``: how many points, all by default; ``limits`` of kind limit."""
    torch.set_num_threads(1)
    _watched()
    memory = Path("/dev/shm")  # where there is one, syncing costs nothing
    results = []
    with (
        tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder,
        mock.patch.object(finish, "write_report"),  # takes long, as the next
        mock.patch.object(single, "check_student"),
    ):
        gc.freeze()  # a fork copies no page for its collector
        for name, scenario in scenarios(Path(folder).resolve()):
            requests = [order for order in request if order["scenario"] == name]
            log = scenario.undisturbed() if requests else []
            for order in requests:
                result = {**order, "operations": len(log), **_tried(scenario, order, log, Path(folder))}
                results.append(json.loads(json.dumps(result).replace(folder, "")))
                print(json.dumps(results[-1]), file=sys.stderr, flush=True)
    print(json.dumps(results, indent=1))


def _tried(scenario: Scenario, order: dict, log: list[str], folder: Path) -> dict[str, object]:
    if order["kind"] == "kills":
        shots = folder / f"{order['scenario']}-shots"
        shots.mkdir()
        states, bad = scenario.kills(shots)
        wrong = {f"{at}: {log[at]}": bad[state] for at, state in states if state in bad}
        shutil.rmtree(shots)
        return {"points": len(states), "states": len({state for _, state in states}), "wrong": wrong}
    at = order.get("limits") or points(len(log), order.get("count"))
    outcomes = {point: scenario.try_at(order["kind"], point) for point in at}
    named = "{} bytes".format if order["kind"] == "limit" else lambda point: f"{point}: {log[point]}"
    return {"points": len(outcomes), "wrong": {named(point): problem for point, problem in outcomes.items() if problem}}


def points(total: int, count: int | None) -> list[int]:
    """All, or a seeded sample of them."""
    return list(range(total)) if count is None else sorted(random.Random(0).sample(range(total), min(count, total)))


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
