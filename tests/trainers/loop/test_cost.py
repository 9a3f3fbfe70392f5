"""The floor that a step is held against is made of all the passes that it makes."""

from __future__ import annotations

import pytest
from toys import toy_family, toy_trainer

from stepdistill.analytic import GaussianMixture
from stepdistill.errors import UserError
from stepdistill.families import random_sizes
from stepdistill.trainers.loop.cost import measure_step, record
from stepdistill.trainers.plans.job import make_job


@pytest.mark.parametrize("method", ["dmd2", "sim", "swiftbrush", "boot"])
def test_every_pass_of_an_update_is_recorded(method):
    """Forward passes, by the meter: none is missing, features and signals included."""
    family = toy_family(GaussianMixture([[-1.0], [1.0]], 0.05, labels=[0, 1]))
    family.teacher_denoiser = lambda: None  # the network is the teacher, so its passes count
    changes = {} if method == "boot" else {method: {"fake_score_updates": 1}}
    trainer = toy_trainer(family, method=method, **changes)
    meter = trainer.roles.meter
    before = meter.forward
    calls = record(trainer, trainer.iteration)
    assert sum(len(call.x) for call in calls) == meter.forward - before
    before, backward = meter.forward, meter.backward
    for call in calls:
        call.replay()
    assert meter.forward - before == sum(len(call.x) for call in calls)
    assert meter.backward > backward


def test_an_update_of_a_teacher_of_random_weights_is_measured(tmp_path, monkeypatch):
    """In place of the config's teacher and data, which need not exist."""
    small = {"block_out_channels": (32, 32), "cross_attention_dim": 8, "sample_size": 8, "layers_per_block": 1}
    blocks = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
    blocks |= {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
    for sizes, value in (
        (random_sizes.RANDOM_SIZES, small | blocks),
        (random_sizes.PIPELINE_SIZES, small | blocks),
        (random_sizes.TEXT_ENCODERS, [(8, 1, 2)]),
        (random_sizes.VAE_CHANNELS, (32, 32, 32, 32)),
    ):
        monkeypatch.setitem(sizes, "tiny", value)
    raw = {
        "method": "dmd2",
        "output": str(tmp_path),
        "teacher": {"path": "nowhere"},
        "train": {"updates": 9, "batch_size": 2},
    }
    table = measure_step(make_job(raw | {"dmd2": {"fake_score_updates": 1}}), 0.0, "tiny")
    assert "UNet2DConditionModel" in table
    assert "student forward+backward" in table
    with pytest.raises(UserError, match="--random-size huge: sizes are sd-small, sd15, tiny"):
        measure_step(make_job(raw), 0.0, "huge")
