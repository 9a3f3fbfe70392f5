"""The floor that a step is held against is made of all the passes that it makes."""

from __future__ import annotations

import pytest
from toys import toy_family, toy_trainer

from stepdistill.analytic import GaussianMixture
from stepdistill.trainers.loop.cost import record


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
