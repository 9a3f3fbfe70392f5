"""What a dry run takes, the run takes: everything that a config names is tried before the first update."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from console import Result, stepdistill
from safetensors.torch import load_file, save_file

from stepdistill.config import merge
from stepdistill.families.unet2d import UNet2DFamily
from stepdistill.trainers.loop.trainer import Trainer
from stepdistill.trainers.plans import rehearsal


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("rehearsal")
    tiny.save_pixels(root / "label", "v", labels=3, null=True)
    tiny.save_pixels(root / "other", "v", labels=3, null=True, size=16, channels=3)
    tiny.save_stable_diffusion(root / "text")
    (root / "prompts.txt").write_text("a cat\na dog\n")
    for name, weights in (("label", "shared"), ("label", "full"), ("text", "shared")):
        assert run(root, root / f"{name}-{weights}", name, {"roles": {"weights": weights}}).code == 0
    return root


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch):
    monkeypatch.setattr(rehearsal, "_TRIED", set())


def run(root: Path, output: Path, teacher: str, changes: dict, *arguments: str) -> Result:
    good = {
        "method": "dmd2",
        "output": str(output),
        "teacher": {"path": str(root / teacher), "steps": 3},
        "data": {"prompts": str(root / "prompts.txt")} if teacher == "text" else {},
        "train": {"updates": 1, "batch_size": 2, "sample_count": 2, "trackers": []},
        "roles": {"lora": {"rank": 2}},
        "evaluation": {"samples": 4, "latency": False},
        "dmd2": {"fake_score_updates": 1},
    }
    config = output.parent / f"{output.name}.yaml"
    config.write_text(yaml.safe_dump(merge(good, changes)))
    return stepdistill("distill", config, *arguments)


BAD = {
    "no weights to start from": ("label", {"roles": {"student_from": "{root}/gone"}}, "roles.student_from"),
    "weights of another network": (
        "label",
        {"roles": {"student_from": "{root}/other"}},
        "not of the student's architecture",
    ),
    "no LoRA to go on with": ("label", {"roles": {"weights": "shared", "lora_from": "{root}/gone"}}, "no LoRA there"),
    "a LoRA of another network": (
        "label",
        {"roles": {"weights": "shared", "lora_under": "{root}/text-shared/student"}},
        "it is not a LoRA for this teacher",
    ),
    "no fake score to go on with": (
        "label",
        {"roles": {"fake_score_from": "{root}/gone"}},
        "no whole checkpoint there",
    ),
    "a fake score held in another way": (
        "label",
        {"roles": {"fake_score_from": "{root}/label-shared"}},
        "hold both runs' roles in the same way",
    ),
    "an output under a file": ("label", {"output": "{root}/prompts.txt/run"}, "prompts.txt is a file; name a folder"),
    "an output of a long name": ("label", {"output": "{root}/" + "x" * 300}, "a name longer than"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_the_run_refuses_the_dry_run_refuses_in_the_same_words(root, tmp_path, name):
    teacher, changes, says = BAD[name]
    changes = json.loads(json.dumps(changes).replace("{root}", str(root)))
    dry = run(root, tmp_path / "run", teacher, changes, "--dry-run")
    assert dry.code == 2, dry.out
    assert says in dry.error
    assert not (tmp_path / "run").exists()
    done = run(root, tmp_path / "run", teacher, changes)
    assert done.code == 2
    assert says in done.error
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_refused(root, tmp_path, monkeypatch):
    from stepdistill import run as module

    monkeypatch.setattr(module.os, "access", lambda path, mode, **_: not mode & module.os.W_OK)
    for arguments in ((), ("--dry-run",)):
        result = run(root, tmp_path / "run", "label", {}, *arguments)
        assert result.code == 2
        assert f"{tmp_path} cannot be written to; choose another folder, or its rights" in result.error


def test_a_dry_run_on_a_folder_that_holds_a_run_says_so(root):
    result = run(root, root / "label-full", "label", {}, "--dry-run")
    assert result.code == 2
    assert "holds a run; add --resume" in result.error
    assert run(root, root / "label-full", "label", {}, "--dry-run", "--resume").code == 0


def export_that_fails(self, network, scheduler):
    from stepdistill.errors import UserError

    raise UserError("no pipeline for it")


def scheduler_of_other_times(family, sampler):
    from diffusers import LCMScheduler

    return LCMScheduler(original_inference_steps=1, num_train_timesteps=500)


def scheduler_of_other_noise(family, sampler):
    from diffusers import LCMScheduler

    return LCMScheduler(original_inference_steps=1, prediction_type="epsilon")


@pytest.mark.parametrize("arguments", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    ("place", "name", "fake", "says"),
    [
        (UNet2DFamily, "pipeline", export_that_fails, "no pipeline for it"),
        (
            UNet2DFamily,
            "student_scheduler",
            scheduler_of_other_times,
            "samples at 499, and the student would be trained at 999",
        ),
        (UNet2DFamily, "student_scheduler", scheduler_of_other_noise, "draws other pictures than it is trained to"),
    ],
)
def test_an_export_that_is_wrong_is_found_before_the_first_update(
    root, tmp_path, monkeypatch, place, name, fake, says, arguments
):
    updates = []
    update = Trainer.step
    monkeypatch.setattr(Trainer, "step", lambda self, role: updates.append(self.run) or update(self, role))
    monkeypatch.setattr(place, name, fake)
    result = run(root, tmp_path / "run", "label", {}, *arguments)
    assert result.code == 2
    assert says in result.error
    assert not any(updates)  # those of a rehearsal write nowhere
    assert not (tmp_path / "run").exists()


def test_a_large_teacher_is_looked_at_without_building_anything_of_its_size(root, tmp_path, monkeypatch):
    monkeypatch.setattr(rehearsal, "SMALL", 0)
    monkeypatch.setattr(rehearsal, "build_trainer", None)
    assert run(root, tmp_path / "run", "text", {"roles": {"weights": "shared"}}, "--dry-run").code == 0
    for name in ("no weights to start from", "a LoRA of another network", "no fake score to go on with"):
        teacher, changes, says = BAD[name]
        changes = json.loads(json.dumps(changes).replace("{root}", str(root)))
        assert says in run(root, tmp_path / "run", teacher, changes, "--dry-run").error
    monkeypatch.setattr(UNet2DFamily, "student_scheduler", scheduler_of_other_times)
    assert "samples at 499" in run(root, tmp_path / "run", "label", {}, "--dry-run").error


@pytest.mark.slow
def test_a_rehearsal_changes_nothing_of_the_run(root, tmp_path, monkeypatch):
    assert run(root, tmp_path / "with", "label", {"roles": {"weights": "shared"}}).code == 0
    monkeypatch.setattr(rehearsal, "try_export", lambda *_: None)
    assert run(root, tmp_path / "without", "label", {"roles": {"weights": "shared"}}).code == 0
    file = "checkpoints/step-00000001/student.safetensors"
    with_it, without = (load_file(tmp_path / name / file) for name in ("with", "without"))
    assert all(torch.equal(value, without[key]) for key, value in with_it.items())
    rows = [
        json.loads((tmp_path / name / "checkpoints/step-00000001/state.json").read_text())
        for name in ("with", "without")
    ]
    assert rows[0]["meta"]["passes"] == rows[1]["meta"]["passes"]


def test_every_stage_of_a_recipe_is_tried_before_the_first_is_trained(root, tmp_path):
    stages = [{"name": "one"}, {"name": "two", "method": "feedback", "roles": {"weights": "shared"}}]
    stages[1]["feedback"] = {"rewards": [{"reward": "judges:Brightness"}], "decoder": str(root / "gone")}
    for arguments in (("--dry-run",), ()):
        result = run(root, tmp_path / "run", "text", {"stages": stages, "evaluation": {"enabled": False}}, *arguments)
        assert result.code == 2
        assert "no AutoencoderTiny can be loaded from it" in result.error
        assert not (tmp_path / "run").exists()


def test_a_teacher_whose_first_update_is_not_finite_is_refused(root, tmp_path):
    shutil.copytree(root / "label", tmp_path / "spoilt")
    file = tmp_path / "spoilt" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["conv_out.bias"].fill_(1e30)
    save_file(weights, file, {"format": "pt"})
    result = run(root, tmp_path / "run", str(tmp_path / "spoilt"), {"dmd2": {"guidance_scale": 1e10}}, "--dry-run")
    assert result.code == 2
    assert "not finite" in result.error
