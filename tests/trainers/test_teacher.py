"""Training a teacher: resumes to the same bits, and its folder is a teacher of the unet2d family."""

import numpy as np
import pytest
import torch
from stepdistill.trainers.teacher import TeacherConfig, train_teacher

from stepdistill.config import check
from stepdistill.families import load_family


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
    from stepdistill.trainers import teacher

    whole = train_teacher(config(tmp_path, "whole", **VARIANTS[name]))
    saved = teacher._save_partial

    def save_and_die(path, step, *state):
        saved(path, step, *state)
        if step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(teacher, "_save_partial", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(config(tmp_path, "halves", **VARIANTS[name]))
    monkeypatch.setattr(teacher, "_save_partial", saved)
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
