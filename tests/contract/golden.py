"""Golden numbers: what every row of the matrix and the two first runs train to, at fixed seeds.

``python tests/contract/golden.py write FILE`` trains each for a few updates and writes digests and norms of all trained
weights, and the rows of metrics; ``... compare FILE`` trains again and prints what is not equal to the bit.  The bits
are of one processor and one torch; :mod:`test_golden` holds the norms and the rows to a tolerance on any.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
FILE = HERE / "golden.json"
ROOT = HERE.parents[1]

import conftest  # noqa: E402, F401
from methods import METHODS, weights_of  # noqa: E402
from teacher_table import GOLDEN, make_teachers  # noqa: E402

NOT_COMPARED = {"seconds"}


def cases() -> list[str]:
    """The names of all cases: ROW/WEIGHTS/TEACHER, and the first runs' configs."""
    rows = [f"{row}/{weights}/{teacher}" for row in METHODS for weights in weights_of(row) for teacher in GOLDEN]
    return [*rows, "configs/quickstart.yaml", "configs/emoji.yaml"]


def numbers(name: str, teachers: dict, place: Path) -> dict[str, Any]:
    """Train one case in the folder ``place``: its weights and its rows."""
    from test_methods import job_for, started

    from stepdistill.config import apply_overrides, read_yaml
    from stepdistill.trainers.plans.job import make_job

    if name.endswith(".yaml"):
        small = ["train.updates=3", "train.batch_size=4", "train.log_every=1", "train.trackers=[]"]
        small += ["evaluation.enabled=false", f"output={place}"]
        job = make_job(apply_overrides(read_yaml(str(ROOT / name)), small))
    else:
        row, weights, teacher = name.split("/")
        job = job_for(row, teachers[teacher], weights, place)
    trainer, run = started(job, place)
    trainer.fit()
    weights = {role: summary(parameters.values()) for role, parameters in trainer.trained.items()}
    if trainer.ema is not None:
        weights["ema"] = summary(trainer.ema.shadow.values())
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    rows = [{k: v for k, v in row.items() if k not in NOT_COMPARED} for row in rows]
    return {"weights": weights, "rows": rows}


def summary(tensors) -> dict[str, Any]:
    """Of a set of tensors, whatever their names and order are: one digest, norm and number of elements."""
    tensors = [t.detach().float().cpu().contiguous() for t in tensors]
    digests = sorted(hashlib.sha256(t.numpy().tobytes()).hexdigest() for t in tensors)
    return {
        "sha256": hashlib.sha256("".join(digests).encode()).hexdigest()[:16],
        "norm": math.sqrt(math.fsum(t.double().square().sum().item() for t in tensors)),
        "elements": sum(t.numel() for t in tensors),
    }


def measure(names: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder:
        teachers = make_teachers(Path(folder) / "teachers")
        started = time.monotonic()
        for index, name in enumerate(names):
            yield name, numbers(name, teachers, Path(folder) / f"run-{index}")
            each = (time.monotonic() - started) / (index + 1)
            left = each * (len(names) - index - 1)
            print(f"\r{index + 1}/{len(names)}, {each:.1f} s each, {left:.0f} s left ", end="", file=sys.stderr)
    print(file=sys.stderr)


def differences(before: Any, now: Any, where: str = "", tolerance: float = 0.0) -> list[str]:
    """Where two records differ; numbers within ``tolerance`` of each other (relative) are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        keys = [*before, *(k for k in now if k not in before)]
        return [d for k in keys for d in differences(before.get(k), now.get(k), f"{where}/{k}", tolerance)]
    if isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        pairs = enumerate(zip(before, now, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}/{i}", tolerance)]
    if isinstance(before, float) and isinstance(now, int | float) and math.isclose(before, now, rel_tol=tolerance):
        return []
    return [] if before == now else [f"{where}: {before} before, {now} now"]


def main() -> None:
    action, file, *names = sys.argv[1:]
    record = dict(measure(names or cases()))
    if action == "write":
        lines = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in record.items()]
        Path(file).write_text("{\n" + ",\n".join(lines) + "\n}\n")
        return
    before = json.loads(Path(file).read_text())
    result = differences({name: before.get(name) for name in record}, record)
    print("\n".join(result) or f"{len(record)} cases: equal to the bit")
    sys.exit(bool(result))


if __name__ == "__main__":
    main()
