"""Recipes: what a stage takes, going on at any point, one report, and what is refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from console import stepdistill
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from stepdistill.config import merge
from stepdistill.errors import UserError
from stepdistill.readers import digest_tensors
from stepdistill.roles.lora import read_lora
from stepdistill.trainers.plans.resolve import resolve


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    tiny.save_pixels(folder / "teacher", "v", labels=3, null=True)
    pixels = np.random.default_rng(0).integers(0, 255, (12, 8, 8), dtype=np.uint8)
    np.savez(folder / "images.npz", images=pixels, labels=np.arange(12) % 3)
    return folder


def raw_recipe(root: Path, output: Path, **changes) -> dict:
    raw = {
        "output": str(output),
        "seed": 2,
        "teacher": {"path": str(root / "teacher"), "steps": 3},
        "data": {"images": {"npz": str(root / "images.npz")}},
        "roles": {"weights": "shared", "lora": {"rank": 2}},
        "optimizer": {"student": {"lr": 1e-2}, "fake_score": {"lr": 1e-2}},
        "train": {"updates": 2, "batch_size": 2, "log_every": 1, "sample_count": 2, "trackers": []},
        "evaluation": {"enabled": False},
        "tscd": {"grid": 8},
        "stages": [
            {
                "name": "two",
                "method": "tscd",
                "tscd": {"segments": 2},
                "sampler": {"steps": 2, "transition": "ode"},
            },
            {"name": "one", "method": "tscd", "sampler": {"steps": 4, "also_steps": [1, 2]}},
            {
                "name": "reward",
                "method": "feedback",
                "take": "under",
                "feedback": {"rewards": [{"reward": "judges:Brightness"}], "merge_ratio": 0.5},
                "sampler": {"steps": 4, "also_steps": [1, 2]},
            },
            {
                "name": "enhance",
                "method": "enhance",
                "dmd2": {"fake_score_updates": 1},
                "enhance": {"mse_weight": 0.1},
                "sampler": {"steps": 4, "also_steps": [1, 2]},
                "train": {"updates": 3},
            },
        ],
    }
    return merge(raw, changes)


def write(folder: Path, raw: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def digests(folder: Path) -> dict[str, str]:
    """Every weight file of a student, by its tensors."""
    return {str(p.relative_to(folder)): digest_tensors(load_file(p)) for p in sorted(folder.rglob("*.safetensors"))}


@pytest.fixture(scope="module")
def done(root, tmp_path_factory) -> Path:
    """A recipe run through, uninterrupted."""
    folder = tmp_path_factory.mktemp("done")
    result = stepdistill("distill", write(folder, raw_recipe(root, folder / "out")))
    assert result.code == 0, result.err
    return folder / "out"


def test_every_stage_starts_from_what_it_takes(done):
    """The first samples of a stage are the last ones of the student that it takes."""
    configs = {
        name: yaml.safe_load((done / name / "config.yaml").read_text())["roles"]
        for name in ("01-two", "02-one", "03-reward", "04-enhance")
    }
    assert configs["01-two"]["lora_from"] is None
    assert configs["02-one"]["lora_from"] == str(done / "01-two" / "student")
    assert configs["03-reward"]["lora_under"] == str(done / "02-one" / "student")
    assert configs["04-enhance"]["lora_from"] == str(done / "03-reward" / "student")
    last, first = done / "02-one/samples/000002.png", done / "03-reward/samples/000000.png"
    assert last.read_bytes() == first.read_bytes()
    ranks = [read_lora(done / stage / "student", "here").rank for stage in configs]
    assert ranks == [2, 2, 4, 4]  # the reward's LoRA beside the one below it


def test_the_merge_ratio_is_in_the_exported_lora(done):
    below, both = (read_lora(done / stage / "student", "here") for stage in ("02-one", "03-reward"))
    for path, (down, up) in both.factors.items():
        assert torch.equal(down[:2], below.factors[path][0])
        assert torch.equal(up[:, :2], below.factors[path][1])
    from stepdistill import checkpoint

    tensors, _ = checkpoint.load(checkpoint.latest(done / "03-reward" / "checkpoints"))
    trained = {k: v for k, v in tensors["student"].items() if "lora_B" in k}
    assert trained
    for key, value in trained.items():
        path = key.split(".lora_B")[0]
        torch.testing.assert_close(both.factors[path][1][:, 2:], 0.5 * value)


def test_the_recipes_student_is_the_last_stages_and_has_its_steps(done):
    assert digests(done / "student") == digests(done / "04-enhance" / "student")
    facts = DiffusionPipeline.from_pretrained(done / "student").scheduler.config["_stepdistill"]
    assert (facts["steps"], facts["also_steps"]) == (4, [1, 2])
    assert "1, 2" in (done / "student" / "README.md").read_text()
    page = (done / "report.html").read_text()
    for name in ("two", "one", "reward", "enhance"):
        assert f"Curves: {name}" in page
        assert f"Samples over time: {name}" in page


def test_a_finished_recipe_is_not_run_again(done, root):
    path = done.parent / "recipe.yaml"
    before = digests(done)
    assert "add --resume" in stepdistill("distill", path).error
    result = stepdistill("distill", path, "--resume")
    assert result.code == 0
    assert result.out.count("finished before") == 4
    assert digests(done) == before


@pytest.mark.slow
@pytest.mark.parametrize("killed_in", ["01-two", "03-reward", "04-enhance"])
def test_a_killed_recipe_goes_on_to_the_same_weights(killed_in, done, root, tmp_path):
    """SIGKILL in a stage, --resume, and the student is the uninterrupted one's to the bit."""
    path = write(tmp_path, raw_recipe(root, tmp_path / "out", train={"checkpoint_every": 1}))
    program = (
        "import sys, time\n"
        "from stepdistill.cli import main as cli\n"
        "from stepdistill.trainers.loop.trainer import Trainer\n"
        "after_update = Trainer._after_update\n"
        "def after(self, bar, counter):\n"
        "    after_update(self, bar, counter)\n"
        f"    time.sleep(60 if self.run.path.name == {killed_in!r} else 0)\n"
        "Trainer._after_update = after\n"
        f"sys.argv = ['stepdistill', 'distill', {str(path)!r}]; cli.main()\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL)
    saved = tmp_path / "out" / killed_in / "checkpoints"
    deadline = time.time() + 100
    while not list(saved.glob("step-*/state.json")) and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "student").exists()
    assert "add --resume" in stepdistill("distill", path).error
    result = stepdistill("distill", path, "--resume")
    assert result.code == 0, result.err
    assert "resumed at student update 1" in result.out
    assert digests(tmp_path / "out" / "student") == digests(done / "student")


def test_a_plan_says_every_stage_with_its_cost_and_writes_nothing(root, tmp_path):
    path = write(tmp_path, raw_recipe(root, tmp_path / "out"))
    result = stepdistill("distill", path, "--dry-run")
    assert result.code == 0
    assert not (tmp_path / "out").exists()
    # two stages of 2 updates x 2 samples x 5 passes; reward: (0 + 1 + 3)/3 before and 3; enhance: 3 updates, 4 + 4 + 1
    for text in ("20 network passes", "17 network passes", "54 network passes", "cost of all  111 network passes"):
        assert text in result.out
    assert "student of two" in result.out
    assert "under of one" in result.out


def test_planned_passes_are_those_that_are_made(done, root):
    recipe = resolve(raw_recipe(root, done))
    rows = [json.loads(stage.folder.metrics.read_text().splitlines()[-1]) for stage in recipe.stages]
    for stage, row in zip(recipe.stages, rows, strict=True):
        if stage.name != "reward":  # its number of steps is drawn
            assert row["passes"] == stage.cost


def test_full_students_are_handed_on_by_their_weights(root, tmp_path):
    raw = raw_recipe(root, tmp_path / "out", roles={"weights": "full"})
    raw["stages"] = changed(raw, 2, roles={"weights": "shared"})["stages"][:3]
    recipe = resolve(raw)
    assert [stage.job.config.roles.student_from for stage in recipe.stages] == [
        None,
        str(tmp_path / "out" / "01-two" / "student"),
        str(tmp_path / "out" / "02-one" / "student"),
    ]
    result = stepdistill("distill", write(tmp_path, merge(raw, {"stages": [*raw["stages"][:2]]})))
    assert result.code == 0, result.err
    weights = [
        load_file(tmp_path / "out" / stage / "student" / "unet" / "diffusion_pytorch_model.safetensors")
        for stage in ("01-two", "02-one")
    ]
    assert any(not torch.equal(weights[0][k], weights[1][k]) for k in weights[0])


def changed(raw: dict, number: int, **changes) -> dict:
    raw["stages"][number] = merge(raw["stages"][number], changes)
    return raw


BAD = {
    "no list": (lambda raw: {**raw, "stages": "two"}, "stages must be a list"),
    "no name": (lambda raw: {**raw, "stages": [{"method": "tscd"}]}, "stages[1]: key 'name' is missing"),
    "a name that is no folder": (lambda raw: changed(raw, 0, name="a/b"), "stages[1]: name = 'a/b'"),
    "the same name": (lambda raw: changed(raw, 1, name="two"), "stages[2]: a second stage named two"),
    "unknown key": (lambda raw: changed(raw, 1, stpes=3), "stages[2] (one): unknown key 'stpes'"),
    "unknown method": (lambda raw: changed(raw, 1, method="x"), "stages[2] (one): method = 'x'"),
    "of a later one": (lambda raw: changed(raw, 1, of="reward"), "of = reward: no earlier stage"),
    "of nothing": (lambda raw: changed(raw, 1, take="nothing", of="two"), "remove one"),
    "the first takes": (lambda raw: changed(raw, 0, take="student"), "no stage before the first"),
    "takes twice": (
        lambda raw: changed(raw, 1, roles={"lora_from": "x"}),
        "roles.lora_from is what take = student",
    ),
    "under in full": (lambda raw: changed(raw, 2, roles={"weights": "full"}), "take = under needs a LoRA"),
    "a setting of a stage": (lambda raw: changed(raw, 0, tscd={"segments": 3}), "grid = 8 is not a multiple"),
    "a reward of no module": (
        lambda raw: changed(raw, 2, feedback={"rewards": [{"reward": "nomodule:Nope"}]}),
        "reward 'nomodule:Nope': module 'nomodule' cannot be imported",
    ),
    "a reward without its file": (
        lambda raw: changed(raw, 2, feedback={"rewards": [{"reward": "pick_score", "weights": "gone"}]}),
        "reward pick_score: weights gone is missing; download the folder of PickScore_v1",
    ),
    "a reward without its CLIP": (
        lambda raw: changed(
            raw, 2, feedback={"rewards": [{"reward": "clip", "clip": {"model": "ViT-B-32", "pretrained": "gone.pt"}}]}
        ),
        "clip: weight file gone.pt of ViT-B-32 is missing",
    ),
    "no output": (lambda raw: {k: v for k, v in raw.items() if k != "output"}, "key 'output' is missing"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_recipes_are_one_line_and_write_nothing(name, root, tmp_path):
    spoil, says = BAD[name]
    result = stepdistill("distill", write(tmp_path, spoil(raw_recipe(root, tmp_path / "out"))))
    assert result.code == 2
    assert says in result.error
    assert says in stepdistill("distill", tmp_path / "recipe.yaml", "--dry-run").error
    assert not (tmp_path / "out").exists()


def test_a_changed_recipe_or_a_strange_folder_is_refused(done, root, tmp_path):
    raw = changed(raw_recipe(root, done), 0, tscd={"target_decay": 0.5})
    result = stepdistill("distill", write(tmp_path, raw), "--resume")
    assert result.code == 2
    assert "its recipe differs: stages" in result.error
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "letter.txt").write_text("dear")
    result = stepdistill("distill", write(tmp_path, raw_recipe(root, tmp_path / "full")))
    assert "not empty and holds no run" in result.error
    result = stepdistill("export", done)
    assert result.code == 2
    assert "a recipe of stages" in result.error


def test_other_commands_say_that_it_is_a_recipe(root, tmp_path):
    path = write(tmp_path, raw_recipe(root, tmp_path / "out"))
    assert "a recipe of stages" in stepdistill("benchmark", "step", path).error
    assert "no stage with method = regression" in stepdistill("pairs", path).error
    with pytest.raises(UserError, match="stages must be a list"):
        resolve({"output": "runs/x", "stages": []})
