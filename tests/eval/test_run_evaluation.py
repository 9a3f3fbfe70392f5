"""What a run is measured with: its teacher's guidance, its prompts."""

import ast
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import yaml
from console import stepdistill
from datasets import Dataset

from stepdistill.data.arrays import read_array_images
from stepdistill.eval.extractors.load import as_extractor
from stepdistill.eval.extractors.small import FeatureNetwork
from stepdistill.eval.measure.reference_statistics import make_reference
from stepdistill.eval.run_evaluation import MeasuredRun, choose_prompts
from stepdistill.trainers.methods.registry import METHODS
from stepdistill.trainers.plans.job import make_job


def config(root, **changes):
    raw = {
        "method": "dmd2",
        "output": str(root / "run"),
        "teacher": {"path": str(root / "teacher"), "steps": 4},
        "data": {"prompt_dataset": {"name": str(root / "captions"), "column": "caption"}},
        "roles": {"weights": "shared", "lora": {"rank": 2}},
        "optimizer": {"student": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
        "train": {"updates": 1, "batch_size": 2, "sample_count": 2, "trackers": []},
        **changes,
    }
    return raw


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({"dmd2": {"guidance_scale": 1.0}}, 1.0),  # not the pipeline's own 7.5
        ({"dmd2": {"guidance_scale": 4.0}}, 4.0),
        ({"dmd2": {"guidance_scale": 4.0}, "evaluation": {"teacher_guidance_scale": 2.0}}, 2.0),
        ({"method": "swiftbrush", "swiftbrush": {"guidance_scale": 4.0, "fake_score_guidance": "shared"}}, 1.0),
        ({"method": "swiftbrush", "swiftbrush": {"guidance_scale": 4.0, "fake_score_guidance": "none"}}, 4.0),
    ],
)
def test_the_teacher_is_guided_as_the_student_was_distilled(tmp_path, changes, scale):
    job = make_job(config(tmp_path, **changes))
    targets = MeasuredRun.from_config(job.config, job.method.make_record(job.config)).list_targets(tmp_path)
    assert {target.guidance_scale for target in targets if target.name == "teacher"} == {scale}
    assert targets[-1].guidance_scale is None  # the student's own


def test_prompts_of_a_dataset_are_those_of_the_evaluation(tmp_path):
    tiny.save_stable_diffusion(tmp_path / "teacher")
    Dataset.from_dict({"caption": ["a cat", None, "a dog"]}).save_to_disk(tmp_path / "captions")
    torch.manual_seed(0)
    network = FeatureNetwork(3, 3, num_features=4, width=8, name="tiny").eval()
    network.save(tmp_path / "features.safetensors")
    pixels = np.random.default_rng(0).integers(0, 255, (12, 16, 16, 3), dtype=np.uint8)
    pictures = read_array_images(pixels, None, (3, 16, 16), False, "noise")
    make_reference(pictures, as_extractor(network), kid_features=100).save(tmp_path / "reference.safetensors")
    evaluation = {"samples": 4, "extractor": str(tmp_path / "features.safetensors")}
    raw = config(tmp_path, evaluation={**evaluation, "reference": str(tmp_path / "reference.safetensors")})
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(raw))
    command = stepdistill("distill", tmp_path / "config.yaml")
    assert command.code == 0, command.err[-2000:]
    protocol = json.loads((tmp_path / "run/evaluation.json").read_text())["protocol"]
    assert protocol["prompts_fingerprint"] == hashlib.sha256(b"a cat\na dog").hexdigest()
    assert choose_prompts(MeasuredRun.read(tmp_path / "run").data) == ["a cat", "a dog"]
    assert (tmp_path / "run/grid.png").is_file()


def test_a_judge_that_does_not_fit_is_answered_before_the_training(tmp_path):
    tiny.save_stable_diffusion(tmp_path / "teacher")
    Dataset.from_dict({"caption": ["a cat"]}).save_to_disk(tmp_path / "captions")
    shipped = {"extractor": "fashion_mnist", "reference": "asset:fashion_mnist/reference.safetensors"}
    for evaluation, message in (
        (shipped, "its pictures are (1, 16, 16) (C, H, W), these are (3, 16, 16)"),
        ({**shipped, "extractor": "nowhere.safetensors"}, "nowhere.safetensors: no such feature network"),
        ({**shipped, "reference": "nowhere.safetensors"}, "nowhere.safetensors: no such file"),
    ):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(tmp_path, evaluation=evaluation)))
        for more in ([], ["--dry-run"]):
            result = stepdistill("distill", tmp_path / "config.yaml", *more)
            assert (result.code, message in result.error) == (2, True), result.error
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_measured_by_options_that_it_does_not_read(tmp_path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config(tmp_path)))
    for option in (["--latency"], ["--extractor", "inception"], ["--output", "x.json"], ["--seed", "3"]):
        result = stepdistill("evaluate", tmp_path, *option)
        assert "a run is measured as its config says, --samples aside; for all else name" in result.error


def test_the_evaluation_names_no_method():
    """What it needs of one is in the run's record."""
    named = {
        f"{path.name}: {node.value}"
        for path in Path("eval").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in METHODS
    }
    assert named == set()
