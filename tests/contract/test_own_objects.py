"""Rewards, perceptual models and CLIP models of one's own: what is none is one line of --dry-run, for any teacher."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tiny
import yaml
from console import stepdistill

from stepdistill.config import merge
from stepdistill.trainers.plans import rehearsal


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("own")
    tiny.save_pixels(root / "label", "v", labels=3, null=True)
    pixels = np.random.default_rng(0).integers(0, 255, (4, 8, 8), dtype=np.uint8)
    np.savez(root / "images.npz", images=pixels, labels=np.arange(4) % 3)
    assert dry_run(root, root, {"method": "dmd2"}, finished=True).code == 0
    return root


def dry_run(root, folder, changes, finished=False):
    raw = {
        "output": str(folder / "run"),
        "teacher": {"path": str(root / "label")},
        "train": {"updates": 1, "batch_size": 2, "sample_count": 2, "trackers": []},
        "evaluation": {"enabled": False},
    }
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(merge(raw, changes)))
    return stepdistill("distill", config, *([] if finished else ["--dry-run"]))


def online(name):
    return tuned(f"judges:{name}")


def tuned(reward):
    pso = {"rewards": [{"reward": reward}], "rollout_transition": "renoise"}
    return {"method": "pso", "sampler": {"steps": 4, "transition": "ode"}, "pso": pso}


def feedback(root, **section):
    start = {"student_from": str(root / "run" / "student"), "weights": "shared", "lora": {"rank": 2}}
    data = {"images": {"npz": str(root / "images.npz")}} if "perceptual" in section else {}
    return {"method": "feedback", "feedback": section, "roles": start, "data": data}


REWARDS = {
    "raises": r"reward judges:raises: called on 2 pictures it failed at judges.py:\d+ \(KeyError: here is missing\)",
    "leaves": r"failed at judges.py:\d+ \(SystemExit: 7\)",
    "nothing": "gave a NoneType for 2 pictures; one number a picture",
    "counts": r"gave torch.int64 of shape \(2,\) for 2 pictures",
    "scalar": r"gave torch.float32 of shape \(\) for 2 pictures",
    "not_numbers": "gave a reward that is not finite for pictures of noise",
    "of_pixels_alone": "takes 1 positional argument but 2 were given",
    "NoArguments": r"called without arguments it failed at judges.py:\d+ \(RuntimeError: no weights here\)",
    "torch": "not an nn.Module or another callable",
    "gone": "module 'judges' has no 'gone'",
}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", REWARDS)
def test_what_is_no_reward(name, large, root, tmp_path, monkeypatch):
    if large:
        monkeypatch.setattr(rehearsal, "SMALL", 0)
    result = dry_run(root, tmp_path, online(name))
    assert result.code == 2
    assert re.search(REWARDS[name], result.error), result.error
    assert not (tmp_path / "run").exists()


def test_a_reward_without_a_gradient_judges_but_does_not_teach(root, tmp_path):
    assert dry_run(root, tmp_path, online("detached")).code == 0
    result = dry_run(root, tmp_path, feedback(root, rewards=[{"reward": "judges:detached"}]))
    assert result.code == 2
    assert "reward judges:detached: has no gradient to the pictures" in result.error


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("WrongLoss", "gave torch.float32 of shape () for 2 pictures; (B,) is needed"),
        ("DetachedLoss", "its loss has no gradient to the pictures"),
        ("OtherLoss", "takes 2 positional arguments but 4 were given"),
        ("NoArguments", "called without arguments it failed at judges.py"),
        ("Constant", "has no method loss(pixels, real, indices)"),
    ],
)
def test_what_is_no_perceptual_model(name, says, root, tmp_path):
    result = dry_run(root, tmp_path, feedback(root, perceptual={"model": f"judges:{name}"}))
    assert result.code == 2
    assert says in result.error


def test_an_extractor_that_fails(root, tmp_path):
    np.savez(tmp_path / "moments.npz", mu=np.zeros(3), sigma=np.eye(3))
    evaluation = {"enabled": True, "extractor": "judges:Extractor", "reference": str(tmp_path / "moments.npz")}
    result = dry_run(root, tmp_path, {"method": "dmd2", "evaluation": evaluation})
    assert result.code == 2
    assert "extractor Extractor: cannot be called on these pictures (no pictures, please)" in result.error


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("def (:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("import no_such_module_at_all", "No module named 'no_such_module_at_all'"),
        ("undefined", "NameError"),
    ],
)
def test_a_module_that_cannot_be_imported(code, says, root, tmp_path, monkeypatch):
    name = f"own_{abs(hash(code))}"
    (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    result = dry_run(root, tmp_path, tuned(f"{name}:x"))
    assert result.code == 2
    assert f"module '{name}' cannot be imported" in result.error
    assert says in result.error
