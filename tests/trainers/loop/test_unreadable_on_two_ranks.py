"""Pictures that cannot be read, on two processes: the batches are those of one, and both know of all of them."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from ranks import two_ranks

BROKEN = ("2.png", "5.png")
UPDATES = 4


def train(root: Path, batch: int, limit: float) -> dict:
    """What was seen, and the student, after a run; or the line that it ended with."""
    from accelerate import Accelerator

    from stepdistill.data import images as data
    from stepdistill.data.streams import RealSource
    from stepdistill.trainers.methods.base import RunStopped
    from stepdistill.trainers.plans.build import build_trainer
    from stepdistill.trainers.plans.job import make_job

    data.MOST_TRIED = 0
    raw = {
        "method": "tsm",
        "output": str(root / "unused"),
        "seed": 5,
        "teacher": {"path": str(root / "teacher")},
        "data": {"images": {"folder": str(root / "set"), "max_unreadable": limit}},
        "roles": {"network": {"layers_per_block": 2}},
        "sampler": {"transition": "ode"},
        "train": {"updates": UPDATES, "batch_size": batch, "trackers": []},
        "evaluation": {"enabled": False},
    }
    trainer = build_trainer(make_job(raw), None, Accelerator(cpu=True))
    seen, batch_of = [], RealSource.batch
    trainer.parts.real.batch = lambda *where: seen.append(batch_of(trainer.parts.real, *where)) or seen[-1]
    line = ""
    try:
        trainer.fit()
    except RunStopped as stop:
        line = str(stop)
    return {
        "seen": [one.indices for one in seen],
        "line": line,
        "unreadable": sorted(trainer.parts.real.images.unreadable),
        "updates": trainer.counters["student"],
    }


def child(root: Path) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    results = {str(limit): train(root, 2, limit) for limit in (0.9, 0.0)}
    (root / f"{os.environ['RANK']}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    root = tmp_path_factory.mktemp("unreadable")
    tiny.save_pixels(root / "teacher", "v")
    (root / "set").mkdir()
    generator = np.random.default_rng(0)
    for index in range(8):
        Image.fromarray(generator.integers(0, 255, (8, 8), dtype=np.uint8)).save(root / "set" / f"{index}.png")
    for name in BROKEN:
        content = (root / "set" / name).read_bytes()
        (root / "set" / name).write_bytes(content[: len(content) // 2])
    with two_ranks(__file__, root, timeout=240):
        single = {str(limit): train(root, 4, limit) for limit in (0.9, 0.0)}
    return [json.loads((root / f"{rank}.json").read_text()) for rank in range(2)], single


@pytest.mark.slow
def test_the_pictures_are_those_of_one_process(results):
    ranks, single = results
    together = [a + b for a, b in zip(*(rank["0.9"]["seen"] for rank in ranks), strict=True)]
    assert together == single["0.9"]["seen"]
    assert not {2, 5} & {index for batch in together for index in batch}


@pytest.mark.slow
def test_both_know_what_each_of_them_could_not_read(results):
    ranks, single = results
    assert ranks[0]["0.9"]["unreadable"] == ranks[1]["0.9"]["unreadable"] == single["0.9"]["unreadable"] == [2, 5]


@pytest.mark.slow
def test_both_end_at_the_same_update_with_the_same_line(results):
    ranks, single = results
    assert ranks[0]["0.0"]["line"] == ranks[1]["0.0"]["line"] != ""
    assert ranks[0]["0.0"]["updates"] == ranks[1]["0.0"]["updates"] == single["0.0"]["updates"] < UPDATES


if __name__ == "__main__":
    child(Path(sys.argv[1]))
