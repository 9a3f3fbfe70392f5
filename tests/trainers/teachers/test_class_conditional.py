"""Training a teacher: resumes to the same bits, and its folder is a teacher of the unet2d family."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from stepdistill.config import check
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.trainers.teachers import class_conditional, loop
from stepdistill.trainers.teachers.class_conditional import TeacherConfig, train_teacher


def config(tmp_path, output, mirror=False, **changes):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels, labels=np.arange(20) % 2)
    raw = {
        "output": str(tmp_path / output),
        "data": {"npz": str(tmp_path / "images.npz"), "num_labels": 2, "label_names": ["a", "b"], "mirror": mirror},
        "network": {"resolution": 8, "block_channels": [8, 16]},
        "steps": 6,
        "warmup": 2,
        "batch_size": 4,
        "save_every": 3,
    }
    return check(TeacherConfig, {**raw, **changes}, "test")


VARIANTS = {"plain": {}, "mirrored, bfloat16": {"bf16": True, "mirror": True}}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_stopped_training_goes_on_to_the_same_weights(tmp_path, monkeypatch, name):
    whole = train_teacher(config(tmp_path, "whole", **VARIANTS[name]))
    saved = loop._save_partial

    def save_and_die(path, step, *state):
        saved(path, step, *state)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(loop, "_save_partial", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(config(tmp_path, "halves", **VARIANTS[name]))
    monkeypatch.setattr(loop, "_save_partial", saved)
    halves = train_teacher(config(tmp_path, "halves", **VARIANTS[name]))
    one, other = load_family(str(whole)), load_family(str(halves))
    for key, value in one.network.state_dict().items():
        assert torch.equal(value, other.network.state_dict()[key]), key
    assert one.null_label == 2
    assert one.num_labels == 2
    assert one.kind == "v"
    assert one.network.config["_stepdistill"]["label_names"] == ["a", "b"]


def test_the_schedule_ends_at_pure_noise(tmp_path):
    family = load_family(str(train_teacher(config(tmp_path, "t", steps=1))))
    assert family.schedule.alphas_cumprod[-1] == 0
    assert family.schedule.alphas_cumprod[0] > 0.999


def test_bfloat16_and_mirrored_pictures_change_the_training_and_not_the_dtype(tmp_path):
    plain, bf16 = config(tmp_path, "plain"), config(tmp_path, "bf16", bf16=True)
    mirrored = config(tmp_path, "mirrored", mirror=True)
    weights = [load_family(str(train_teacher(c))).network.conv_in.weight for c in (plain, bf16, mirrored)]
    assert all(w.dtype == torch.float32 for w in weights)
    assert not torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.allclose(weights[0], weights[1], atol=0.02)


@pytest.mark.parametrize(("broken", "ends"), [(range(3, 5), True), (range(3, 99), False)])
def test_a_gradient_that_is_not_finite_spoils_no_teacher(tmp_path, monkeypatch, broken, ends):
    calls, loss = [], class_conditional.denoising_loss

    def sometimes(*arguments):
        calls.append(0)
        return loss(*arguments) * (float("nan") if len(calls) - 1 in broken else 1)

    monkeypatch.setattr(class_conditional, "denoising_loss", sometimes)
    settings = config(tmp_path, "teacher", steps=20)
    if ends:
        network = load_family(str(train_teacher(settings))).network
        assert all(value.isfinite().all() for value in network.state_dict().values())
        return
    with pytest.raises(UserError, match=r"stopped at step 12: 10 non-finite gradients in a row; lower lr") as stop:
        train_teacher(settings)
    partial = str(stop.value).rpartition("what was saved last is in ")[2]
    assert all(value.isfinite().all() for value in load_file(partial).values())
