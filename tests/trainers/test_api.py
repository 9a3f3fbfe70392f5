"""The loop with one method, for programs."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline

from stepdistill import trainers
from stepdistill.errors import UserError
from stepdistill.run_record import RunRecord
from stepdistill.trainers.loop.trainer import Trainer
from stepdistill.trainers.methods.registry import METHODS


def config(root, **sections):
    return {
        "teacher": {"path": str(tiny.save_pixels(root / "teacher", "v", labels=3, null=True))},
        "output": str(root / "run"),
        "train": {"updates": 2, "batch_size": 2, "sample_count": 2, "trackers": [], "ema_decay": 0.5},
        "evaluation": {"enabled": False},
        **sections,
    }


def test_each_method_has_its_trainer():
    classes = [getattr(trainers, name) for name in trainers.__all__ if name != "MethodTrainer"]
    assert {cls.method_class for cls in classes} == set(METHODS.values())
    assert all(issubclass(cls, Trainer) and cls.__doc__ for cls in classes)


def test_a_run_is_fit_exported_and_goes_on(tmp_path):
    trainer = trainers.DMD2Trainer(config(tmp_path), ["dmd2.fake_score_updates=1"])
    trainer.fit()
    assert trainer.counters["student"] == trainer.counters["fake_score"] == 2
    assert RunRecord.load(tmp_path / "run").guidance_scale == 1.0  # what an evaluation of the run reads
    pipe = DiffusionPipeline.from_pretrained(trainer.export(tmp_path / "student"))
    with trainer.exported():
        averaged = trainer.roles.student.plain_state_dict()
    weights = pipe.unet.state_dict()
    assert all(torch.equal(weights[k], v[: len(weights[k])]) for k, v in averaged.items())
    with pytest.raises(UserError, match="--resume"):
        trainers.DMD2Trainer(config(tmp_path), ["dmd2.fake_score_updates=1"])
    more = trainers.DMD2Trainer(config(tmp_path), ["dmd2.fake_score_updates=1", "train.updates=3"], resume=True)
    assert more.counters["student"] == 2
    more.fit()
    assert more.counters["student"] == 3


def test_nothing_is_written_unless_it_may_be(tmp_path):
    trainer = trainers.SIMTrainer(config(tmp_path), writes=False)
    trainer.fit()
    assert trainer.counters["student"] == 2
    assert not (tmp_path / "run").exists()


def test_a_config_of_another_method_is_refused(tmp_path):
    with pytest.raises(UserError, match="method = sim: DMD2Trainer is for dmd2"):
        trainers.DMD2Trainer(config(tmp_path, method="sim"))
