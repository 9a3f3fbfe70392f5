"""What the README says can be done is done, on a small scale; every shipped config is a valid one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from stepdistill.config import check, read_mapping, read_yaml
from stepdistill.trainers.plans.resolve import read_plan, resolve
from stepdistill.trainers.teachers.class_conditional import TeacherConfig
from stepdistill.trainers.teachers.judge_captions import MatchingConfig
from stepdistill.trainers.teachers.judge_labels import FeatureConfig
from stepdistill.trainers.teachers.text_to_image import TextTeacherConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.yaml") if p.parent.name not in ("teachers", "train_teachers"))
COMPARISONS = [p for p in CONFIGS if "runs" in read_yaml(p)]
CONFIGS = [p for p in CONFIGS if p not in COMPARISONS]
TEACHERS = sorted((ROOT / "configs/teachers").glob("*.yaml"))


def test_the_two_commands_are_there():
    install = r"python3 -m venv \.venv && \.venv/bin/pip install -e "
    assert re.search(install + r"\. && \.venv/bin/stepdistill distill configs/emoji\.yaml$", README, re.M)
    assert re.search(install + r'"\.\[test\]" && \.venv/bin/python -m pytest$', README, re.M)


FIRST_RUNS = [("quickstart", 80, [25, 5, 1]), pytest.param("emoji", 12, [25, 1], marks=pytest.mark.slow)]


@pytest.mark.parametrize(("config", "samples", "teacher"), FIRST_RUNS)
def test_the_first_runs_are_whole_on_a_small_scale(config, samples, teacher, tmp_path):
    """Shipped teacher, training, export, evaluation in a fresh process, grid and report."""
    small = ["train.updates=2", "train.batch_size=8", f"evaluation.samples={samples}"]
    small += [f"evaluation.batch_size={samples // 2}", "train.sample_count=4"]
    command = [sys.executable, "-P", "-m", "stepdistill", "distill", str(ROOT / f"configs/{config}.yaml"), *small]
    done = subprocess.run(
        [*command, f"output={tmp_path / 'run'}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # two threads beside another test's process wait for each other
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "run"
    evaluation = json.loads((run / "evaluation.json").read_text())
    rows = [("teacher", steps) for steps in teacher] + [("student", 1)]
    assert [(row["name"], row["steps"]) for row in evaluation["rows"]] == rows
    for name in ("student/model_index.json", "student/README.md", "grid.png", "report.html", "config.yaml"):
        assert (run / name).is_file(), name
    for text in ("student", "report.html", "grid.png", "Next:"):
        assert text in done.stdout
    assert ("--count 40 --prompt 'grinning face, noto style'" in done.stdout) == (config == "emoji")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_shipped_configs_are_valid(path):
    plan = read_plan(path)
    assert str(plan.output).startswith("runs/")
    assert all(job.config.output.startswith("runs/") for job in plan.jobs)
    assert plan.cost > 0


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_shipped_comparisons_are_valid(path):
    comparison = read_plan(path)
    assert {run.title for run in comparison.runs.values()} == set(comparison.settings.runs)


@pytest.mark.parametrize("path", TEACHERS, ids=lambda p: p.stem)
@pytest.mark.parametrize("method", ["dmd2", "boot"])
def test_a_teachers_config_goes_with_any_method(path, method):
    """Teacher, data and judge, and nothing of a method: one line chooses it, and one line the method."""
    raw = read_yaml(path)
    assert raw.keys() <= {"teacher", "data", "evaluation"}
    plan = resolve({**raw, "method": method, "output": "runs/mine", "train": {"updates": 1, "batch_size": 2}})
    assert plan.job.config.teacher.path == raw["teacher"]["path"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT / "configs")))
def test_every_teacher_is_named_in_one_file(path):
    """What trains from a teacher inherits its file; what trains from another run's student names that."""
    path_in_file = read_mapping(path).get("teacher", {}).get("path", "runs/")
    assert path_in_file.startswith("runs/")


def test_shipped_teacher_configs_are_valid():
    for name in ("fashion_mnist", "cifar10", "cifar10_16"):
        path = ROOT / f"configs/train_teachers/{name}.yaml"
        config = check(TeacherConfig, read_yaml(path), str(path))
        assert len(config.data.label_names) == config.data.num_labels == 10
    path = ROOT / "configs/train_teachers/emoji.yaml"
    emoji = check(TextTeacherConfig, read_yaml(path), str(path))
    assert emoji.output.startswith("runs/")
    assert emoji.dtype == "float16"
    for name in ("fashion_mnist", "cifar10_16"):
        path = ROOT / f"configs/train_teachers/{name}_features.yaml"
        check(FeatureConfig, read_yaml(path), str(path))
    path = ROOT / "configs/train_teachers/emoji_features.yaml"
    assert check(MatchingConfig, read_yaml(path), str(path)).reference_data == emoji.data


def test_every_command_and_link_of_the_pages_exists():
    from typer.main import get_command

    from stepdistill.cli.main import app

    known = get_command(app).commands
    pages = [ROOT / "README.md", ROOT / "configs/benchmark/README.md", ROOT / "tests/README.md"]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for name in re.findall(r"^stepdistill (\w+)|`stepdistill (\w+)", text, re.M):
            assert (name[0] or name[1]) in known, (page, name)
        for link in re.findall(r"\]\(([^)#:]+)\)", text):  # pictures and pages of this repository
            assert (page.parent / link).exists(), (page, link)


def test_modules_keep_to_their_rooms():
    """The library imports no room above it but in cli/; no trainer names a model class; objectives call nothing."""
    rooms = r"stepdistill\.(trainers|pipelines|eval)\b"
    for path in (ROOT / "stepdistill").rglob("*.py"):
        if path.parent.name != "cli":
            code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.S)
            assert not re.search(rf"^\s*(from|import) {rooms}", code, re.M), path
    for path in (ROOT / "trainers").rglob("*.py"):
        if path.parent.name != "teachers":  # which trains teachers of two families
            code = re.sub(r'""".*?"""', "", path.read_text(), flags=re.S)
            assert not re.search(r"UNet2D|StableDiffusionPipeline|AutoencoderKL", code), path
    for path in (ROOT / "stepdistill/objectives").glob("*.py"):
        assert not re.search(r"no_grad|backward\(|randn|\boptim\b", path.read_text()), path
