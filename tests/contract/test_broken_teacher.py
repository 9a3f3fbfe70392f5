"""A teacher whose predictions are not finite ends every method's run with its name, and leaves no student."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from console import stepdistill
from methods import METHODS, weights_of
from test_cli import write_config
from test_methods import job_for, started, teachers  # noqa: F401 (a fixture)

from stepdistill import checkpoint
from stepdistill.config import merge
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.trainers.methods.base import RunStopped
from stepdistill.trainers.plans import single
from stepdistill.trainers.plans.build import build_trainer

ELSEWHERE = ("feedback", "enhance", "tscd_segments_adversarial")
"""Rows that ask no teacher, or a copy of the student in its place."""


def break_teacher(family, above: float = -1, value: float = math.nan) -> None:
    """The teacher's network says ``value`` at timesteps above ``above``; copies made before are whole."""

    def broken(_module, arguments, output):
        wrong = (arguments[1] > above).reshape(-1, 1, 1, 1)
        output.sample = torch.where(wrong, value, output.sample)
        return output

    family.network.register_forward_hook(broken)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("row", [row for row in METHODS if row not in ELSEWHERE])
def test_a_teacher_that_is_not_finite_ends_the_run_by_its_name(row, value, teachers, tmp_path):  # noqa: F811
    weights = "full" if "full" in weights_of(row) else weights_of(row)[0]
    job = job_for(row, teachers["unet2d"], weights, tmp_path / "run", non_finite_limit=3, updates=9)
    trainer, run = started(job, tmp_path / "run")
    break_teacher(trainer.family, value=value)
    with pytest.raises(UserError, match=r"teacher's (prediction is|samples in 3 steps are) not finite") as stop:
        trainer.fit()
    assert "lr" not in str(stop.value)
    for name in ("nan", "inf"):
        assert name not in (run.metrics.read_text().lower() if run.metrics.exists() else "")


def test_the_command_ends_with_2_and_one_line_and_no_student(tmp_path, monkeypatch):
    teacher = tiny.save_pixels(tmp_path / "teacher", "v", labels=3, null=True)
    config = write_config(tmp_path, teacher, non_finite_limit=3)
    build = single.build_trainer

    def broken(*arguments, **keywords):
        trainer = build(*arguments, **keywords)
        break_teacher(trainer.family)
        return trainer

    monkeypatch.setattr(single, "build_trainer", broken)
    result = stepdistill("distill", config, "roles.weights=full")
    assert result.code == 2
    assert "3 non-finite gradients of the student in a row; the teacher's prediction is not finite" in result.error
    assert not (tmp_path / "run" / "student").exists()


def test_levels_that_are_never_trained_end_the_run_though_never_many_in_a_row(teachers, tmp_path):  # noqa: F811
    """Of a teacher that is finite below timestep 800 the half of all updates would be skipped, and never be learnt."""
    job = job_for("dmd2", teachers["unet2d"], "full", tmp_path / "run", updates=400, non_finite_limit=4)
    trainer = build_trainer(job, None)
    break_teacher(trainer.family, above=800)
    with pytest.raises(
        RunStopped, match=r"gradients of the student (were non-finite|in a row); the teacher's predic"
    ) as stop:
        trainer.fit()
    assert "not finite at timestep" in str(stop.value)
    assert trainer.not_finite["teacher"] == trainer.skipped["student"] >= 4
    assert set(trainer.not_finite) == {"teacher"}
    assert trainer.skipped["fake_score"] == 0


REWARDED = {
    "feedback": {"feedback": {"rewards": [{"reward": "judges:Broken", "hinge": 2.0}], "perceptual": None}},
    "enhance": {"enhance": {"rewards": [{"reward": "judges:Broken", "hinge": 2.0}]}},
    "pso": {"pso": {"rewards": [{"reward": "judges:Broken"}]}},
}


@pytest.mark.parametrize("row", REWARDED)
def test_a_reward_that_is_no_number_ends_the_run_by_its_name(row, teachers, tmp_path):  # noqa: F811
    teacher = merge(teachers["unet2d"], REWARDED[row])
    trainer = build_trainer(job_for(row, teacher, "shared", tmp_path / "run", non_finite_limit=2), None)
    with pytest.raises(RunStopped, match="student in a row; reward judges:Broken gives numbers that are not finite"):
        trainer.fit()


def test_targets_are_not_chosen_by_a_reward_that_is_no_number(teachers, tmp_path):  # noqa: F811
    settings = {"mode": "targets", "best": 0.5, "rewards": [{"reward": "judges:Broken"}]}
    job = job_for("pso", merge(teachers["unet2d"], {"pso": settings}), "shared", tmp_path / "run")
    with pytest.raises(UserError, match=r"pso.best: the rewards of image 0 of .*images.npz are not finite"):
        build_trainer(job, None)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("vae", "the teacher's VAE gives latents that are not finite"),
        ("text_encoder", "the teacher's text encoder gives encodings of the prompts that are not finite"),
    ],
)
def test_what_is_encoded_before_the_run_is_looked_at(part, says, teachers, tmp_path):  # noqa: F811
    job = job_for("tsm", teachers["stable_diffusion"], "full", tmp_path / "run")
    family = load_family(job.config.teacher.path)
    with torch.no_grad():  # as one that overflows
        for parameter in getattr(family, part).parameters():
            parameter.fill_(math.nan)
    with pytest.raises(UserError, match=says):
        build_trainer(job, None, family=family)


def test_a_float16_teacher_is_told_that_float16_overflows(teachers, tmp_path):  # noqa: F811
    job = job_for("dmd2", teachers["unet2d"], "full", tmp_path / "run", non_finite_limit=1)
    trainer = build_trainer(job, None)
    trainer.config.teacher.__dict__["dtype"] = "float16"
    break_teacher(trainer.family)
    with pytest.raises(RunStopped, match=r"load it in float32 or bfloat16 \(float16 overflows\)"):
        trainer.fit()


def test_what_was_skipped_is_said_at_the_end_and_remembered(teachers, tmp_path):  # noqa: F811
    job = job_for("dmd2", teachers["unet2d"], "full", tmp_path / "run", updates=4)
    trainer, run = started(job, tmp_path / "run")
    settings, calls = trainer.method.distribution_matching, []

    def once(x0, condition):
        calls.append(0)
        return settings(x0, condition) * (math.nan if len(calls) == 2 else 1)

    trainer.method.distribution_matching = once
    trainer.fit()
    assert trainer.skipped_lines() == [
        "note: 1 of 5 updates of the student were skipped, not finite",
        "note: what was not finite first, and how often: gradient 1",
    ]
    again = build_trainer(job, None)
    again.restore(*checkpoint.load(checkpoint.latest(run.checkpoints)), "here")
    assert again.skipped_lines() == trainer.skipped_lines()
    assert trainer.skipped_lines() != build_trainer(job, None).skipped_lines() == []
