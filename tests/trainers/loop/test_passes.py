"""Network passes are those of all processes, when their number changes between resumes too."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import tiny
from ranks import two_ranks

from stepdistill import checkpoint

AN_UPDATE = 2 * (4 + 4)  # of one process: a batch of 2; 4 passes for the fake score, 4 more for the student


def go_on(root: Path, updates: int) -> None:
    """The run in ``root`` up to ``updates`` student updates, on as many processes as there are."""
    from accelerate import Accelerator

    from stepdistill.run import RunFolder
    from stepdistill.trainers.plans.build import build_trainer, resume
    from stepdistill.trainers.plans.job import make_job

    raw = {
        "method": "dmd2",
        "output": str(root / "run"),
        "teacher": {"path": str(root / "teacher")},
        "train": {"updates": updates, "batch_size": 2, "log_every": 1, "trackers": []},
        "evaluation": {"enabled": False},
        "dmd2": {"fake_score_updates": 1},
    }
    accelerator, run = Accelerator(cpu=True), RunFolder(root / "run")
    trainer = build_trainer(make_job(raw), run, accelerator)
    if accelerator.is_main_process and updates == 1:
        run.create(trainer.config, 0)
    accelerator.wait_for_everyone()
    resume(trainer, run)
    trainer.recorder.save_samples = lambda: None
    trainer.fit()


@pytest.mark.slow
def test_two_processes_then_one_then_two(tmp_path):
    tiny.save_pixels(tmp_path / "teacher", "v", labels=3, null=True)
    (tmp_path / "updates").write_text("1")
    with two_ranks(__file__, tmp_path, timeout=240):
        pass
    go_on(tmp_path, 2)
    (tmp_path / "updates").write_text("3")
    with two_ranks(__file__, tmp_path, timeout=240):
        pass
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["passes"] for row in rows] == [2 * AN_UPDATE, 3 * AN_UPDATE, 5 * AN_UPDATE]
    _, meta = checkpoint.load(checkpoint.latest(tmp_path / "run" / "checkpoints"))
    assert meta["passes"] == 5 * AN_UPDATE


def child(root: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    assert os.environ["WORLD_SIZE"] == "2"
    go_on(root, int((root / "updates").read_text()))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    child(Path(sys.argv[1]))
