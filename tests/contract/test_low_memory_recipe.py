"""The shipped low-memory recipe, ``configs/dmd2/sd15_lora.yaml``, on a tiny Stable Diffusion from end to end: two LoRAs
on one bfloat16 base, trained, resumed, exported, loaded by stock diffusers and evaluated."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from console import stepdistill
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from stepdistill.config import read_yaml
from stepdistill.data.arrays import read_array_images
from stepdistill.eval.extractors.load import as_extractor
from stepdistill.eval.extractors.small import FeatureNetwork
from stepdistill.eval.measure.reference_statistics import make_reference
from stepdistill.roles.lora import read_lora

pytestmark = pytest.mark.slow
RECIPE = Path(__file__).parents[2] / "configs" / "dmd2" / "sd15_lora.yaml"
STOCK = """
import os, re, sys
sys.modules["stepdistill"] = None  # any import of it fails
import torch
for folder in sys.argv[1:]:
    os.chdir(folder)
    (snippet,) = re.findall(r"```python\\n(.*?)```", open("README.md").read(), re.DOTALL)
    exec(snippet)
    assert image.size == (16, 16), image.size
    assert {p.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters()} == {torch.float32}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """A teacher saved in bfloat16, as a fine-tune is; prompts, pictures with captions, a judge."""
    root = tmp_path_factory.mktemp("low_memory")
    half = dict.fromkeys(("unet", "vae", "text_encoder"), torch.bfloat16)
    tiny.save_in_dtypes(tiny.save_stable_diffusion(root / "float32"), root / "teacher", **half)
    (root / "prompts.txt").write_text("a cat\na dog\na red bus\n")
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 16, 3), dtype=np.uint8)
    (root / "images").mkdir()
    for index, array in enumerate(pixels):
        Image.fromarray(array).save(root / "images" / f"{index}.png")
        (root / "images" / f"{index}.txt").write_text("a cat" if index % 2 else "a dog")
    torch.manual_seed(0)
    network = FeatureNetwork(3, 3, num_features=4, width=8, name="tiny").eval()
    network.save(root / "features.safetensors")
    pictures = read_array_images(pixels, None, (3, 16, 16), False, "noise")
    make_reference(pictures, as_extractor(network), kid_features=100).save(root / "reference.safetensors")
    return root


def config(root: Path, name: str, **train) -> Path:
    """The recipe with another teacher, its data, sizes for a minute, and rates that move a LoRA in four updates."""
    settings = {
        "inherits": str(RECIPE),
        "output": str(root / name),
        "teacher": {"path": str(root / "teacher"), "steps": 4},
        "data": {"prompts": str(root / "prompts.txt"), "images": {"folder": str(root / "images")}},
        "optimizer": {"student": {"lr": 1e-2, "warmup": 0}, "fake_score": {"lr": 1e-2, "warmup": 0}},
        "train": {"updates": 4, "checkpoint_every": 2, "sample_count": 2, "trackers": [], **train},
        "evaluation": {
            "samples": 4,
            "extractor": str(root / "features.safetensors"),
            "reference": str(root / "reference.safetensors"),
        },
    }
    file = root / f"{name}.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


@pytest.fixture(scope="module")
def run(root) -> Path:
    """The finished run's folder."""
    done = stepdistill("distill", config(root, "run"))
    assert done.code == 0, done.err[-3000:]
    return root / "run"


def test_the_run_has_the_recipes_settings(run):
    settings, recipe = yaml.safe_load((run / "config.yaml").read_text()), read_yaml(RECIPE)
    assert settings["teacher"]["dtype"] == recipe["teacher"]["dtype"] == "bfloat16"
    assert settings["roles"]["weights"] == recipe["roles"]["weights"] == "shared"
    assert settings["roles"]["lora"].items() >= recipe["roles"]["lora"].items()
    for section in ("sampler", "dmd2"):
        assert settings[section].items() >= {k: v for k, v in recipe[section].items() if k != "gan"}.items()
    assert settings["dmd2"]["gan"].items() >= recipe["dmd2"]["gan"].items()
    assert (settings["train"]["precision"], settings["train"]["gradient_checkpointing"]) == ("bf16", True)


def test_the_run_evaluates_teacher_and_student(run):
    rows = json.loads((run / "evaluation.json").read_text())["rows"]
    assert [(row["name"], row["steps"]) for row in rows] == [("teacher", 4), ("student", 4)]
    assert all(np.isfinite(row["frechet"]) for row in rows)
    assert (run / "grid.png").is_file()
    assert (run / "report.html").is_file()
    assert stepdistill("evaluate", run, "--samples", 2).code == 0


def test_the_merged_lora_is_the_float32_sum(root, run):
    base = DiffusionPipeline.from_pretrained(root / "teacher", dtype=torch.bfloat16).unet.state_dict()
    merged = load_file(run / "student" / "unet" / "diffusion_pytorch_model.safetensors")
    lora = read_lora(run / "student", "lora")
    assert (lora.rank, lora.alpha) == (64, 8.0)
    assert len(lora.factors) > 20
    largest = 0.0
    for key, value in merged.items():
        path, expected = key.removesuffix(".weight"), base[key].double()
        if key != path and path in lora.factors:
            down, up = (factor.double() for factor in lora.factors[path])
            delta = 8 / 64 * torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1))
            expected = expected + delta.reshape(expected.shape)
            largest = max(largest, delta.abs().max().item())
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected, rtol=0, atol=1e-6, msg=key)
    assert largest > 1e-3  # so that rounding to bfloat16 would show


def test_stock_diffusers_runs_the_model_cards_snippets(run, tmp_path):
    """Of the run's student, and of what ``stepdistill export`` writes in half precision."""
    folders = [run / "student"]
    for dtype in ("bfloat16", "float16"):
        folders.append(tmp_path / dtype)
        done = stepdistill("export", run, "--output", folders[-1], "--dtype", dtype)
        assert done.code == 0, done.err
        for part in ("unet", "vae", "text_encoder"):
            (file,) = (folders[-1] / part).glob("*.safetensors")
            assert {str(t.dtype) for t in load_file(file).values() if t.is_floating_point()} == {f"torch.{dtype}"}
    (tmp_path / "child.py").write_text(STOCK)
    command = [sys.executable, str(tmp_path / "child.py"), *map(str, folders)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_run_that_was_stopped_goes_on_to_the_same_student(root, run):
    assert stepdistill("distill", config(root, "again", updates=2), "evaluation.enabled=false").code == 0
    done = stepdistill("distill", config(root, "again"), "--resume")
    assert done.code == 0, done.err[-3000:]
    assert "resumed at student update 2" in done.out
    name = "student/unet/diffusion_pytorch_model.safetensors"
    whole, resumed = load_file(run / name), load_file(root / "again" / name)
    assert all(torch.equal(value, resumed[key]) for key, value in whole.items())
