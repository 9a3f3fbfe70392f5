"""Numbers that are none are one line wherever an evaluation could meet them; too few pictures are said to be so."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from console import stepdistill
from safetensors.torch import load_file, save_file

from stepdistill.errors import UserError
from stepdistill.eval.extractors.load import as_extractor
from stepdistill.eval.extractors.small import FeatureNetwork
from stepdistill.eval.measure.evaluate import evaluate
from stepdistill.eval.measure.protocols import list_notes
from stepdistill.eval.measure.reference_statistics import ReferenceStatistics, make_reference
from stepdistill.eval.measure.results import read_results
from stepdistill.eval.measure.settings import Protocol
from stepdistill.eval.measure.targets import Target
from stepdistill.eval.show.grid import draw_grid
from stepdistill.eval.show.run_page import show_results
from stepdistill.judges.rewards import RewardSettings
from stepdistill.trainers.plans.distance_curve import DistanceCurve

KEPT = 100  # features of the reference of the tests, of 8 each


@pytest.fixture
def settings(network_file, reference_file):
    return Protocol(samples=20, batch_size=8, extractor=str(network_file), kid_subsets=3, kid_subset_size=15)


@pytest.fixture
def broken(student_folder, tmp_path):
    """A pipeline with finite weights that draws none."""
    folder = tmp_path / "broken"
    shutil.copytree(student_folder, folder)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"].fill_(3e38)
    save_file(tensors, weights, {"format": "pt"})
    return folder


def test_sample_draws_no_picture_of_what_is_no_number(broken, tmp_path):
    result = stepdistill("sample", broken, "--count", 2, "--output", tmp_path / "a.png")
    assert result.code == 2
    assert f"pipeline {broken}: drew pixels that are not numbers" in result.error
    assert not (tmp_path / "a.png").exists()


def test_a_grid_of_pictures_does_neither(broken, label_folder, tmp_path):
    targets = [Target("teacher", label_folder, 2), Target("student", broken)]
    with pytest.raises(UserError, match="drew pixels that are not numbers"):
        draw_grid(targets, tmp_path / "grid.png", rows=1, columns=2)
    assert not (tmp_path / "grid.png").exists()


def test_what_was_measured_before_it_stays(broken, label_folder, settings, tmp_path):
    with pytest.raises(UserError, match="drew pixels that are not numbers"):
        evaluate([Target("teacher", label_folder, 2), Target("student", broken)], settings, tmp_path)
    rows = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher"]


@pytest.mark.parametrize("name", ["mean", "cov", "features"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_reference_with_one_number_that_is_none_is_one_line(name, value, reference_file, network_file, tmp_path):
    reference = ReferenceStatistics.load(reference_file)
    tensor = getattr(reference, name).clone()
    tensor.view(-1)[3] = value
    file = replace(reference, **{name: tensor}).save(tmp_path / "reference.safetensors")
    what = "covariance" if name == "cov" else name
    with pytest.raises(UserError, match=rf"not whole statistics \(its {what} holds a NaN or an infinity\)"):
        ReferenceStatistics.load(file)
    result = stepdistill("evaluate", "asset:fashion_mnist/teacher@1", "--reference", file, "--extractor", network_file)
    assert result.code == 2
    assert f"{file}: not whole statistics" in result.error


def test_moments_with_one_number_that_is_none_are_one_line_too(tmp_path):
    np.savez(tmp_path / "moments.npz", mu=np.array([0.0, np.nan]), sigma=np.eye(2))
    with pytest.raises(UserError, match=r"moments.npz: not whole statistics \(its mean holds"):
        ReferenceStatistics.load(tmp_path / "moments.npz")


def test_features_that_are_no_numbers_are_the_extractors_fault(pictures, network_file):
    network = FeatureNetwork.load(network_file)
    with torch.no_grad():
        next(iter(network.parameters())).fill_(math.nan)
    with pytest.raises(UserError, match="extractor tiny: gave features that are not numbers"):
        make_reference(pictures, as_extractor(network))


def test_a_reward_that_is_no_number_is_named(label_folder, settings, tmp_path):
    judged = settings.model_copy(update={"rewards": [RewardSettings(reward="judges:Broken")]})
    with pytest.raises(UserError, match="reward judges:Broken: gave numbers that are not finite for pictures of teach"):
        evaluate([Target("teacher", label_folder, 2)], judged, tmp_path)


def test_a_curve_has_no_point_of_what_is_no_number():
    class Student:
        def __getattr__(self, name):
            return lambda *arguments, **others: torch.full((2, 1, 8, 8), math.nan)

    curve = DistanceCurve.__new__(DistanceCurve)
    curve.samples, curve.batch, curve.seed = 2, 2, 0
    trainer = SimpleNamespace(
        family=SimpleNamespace(sample_shape=(1, 8, 8), device="cpu", decode=lambda x0: x0),
        parts=SimpleNamespace(conditions=SimpleNamespace(items=[])),
        roles=SimpleNamespace(meter=SimpleNamespace(paused=contextlib.nullcontext), student=None),
        sampler=Student(),
        passes=12345,
        exported=contextlib.nullcontext,
    )
    with pytest.raises(UserError, match="the student's pictures are not finite after 12,345 network passes"):
        curve.measure(trainer)


# -- too few -----------------------------------------------------------------------------------------------


def noted(
    samples: int, features: int = 8, n: int = 200, features_stored: int = KEPT, subset: int = 15, kid: bool = True
):
    return list_notes(
        {
            "features": features,
            "settings": {"samples": samples, "kid": kid, "kid_subset_size": subset},
            "reference": {"n": n, "features": features_stored},
        }
    )


def test_enough_is_not_noted():
    assert noted(15) == []
    assert noted(9, subset=9) == []
    assert noted(9, kid=False) == []
    assert noted(9, n=0, features_stored=0) == []  # moments alone, which do not say


def test_too_few_samples_or_pictures_of_the_reference_are_noted_with_what_would_be_enough():
    (note,) = noted(8, kid=False)
    assert note.startswith("8 samples are too few for a distance over 8 features: their covariance is singular")
    assert note.endswith("at least 9 are needed")
    (note,) = noted(4000, features=2048, n=2048, subset=10)
    assert note.startswith("2,048 pictures of the reference are too few")
    assert note.endswith("at least 2,049 are needed")


def test_smaller_subsets_of_the_kernel_distance_are_noted():
    (note,) = noted(12)
    assert note == (
        "the kernel distance is over subsets of 12 in place of 15, for there are 12 samples and 100 features of the "
        "reference; 15 of both are needed"
    )


def test_they_are_printed_and_in_the_file_and_on_the_page(label_folder, network_file, tmp_path):
    file = tmp_path / "a.json"
    result = stepdistill("evaluate", f"{label_folder}@1", "--samples", 4, "--extractor", network_file, "--output", file)
    assert result.code == 0, result.err
    content = json.loads(file.read_text())
    notes = content["protocol"]["notes"]
    assert len(notes) == 2
    assert [line for line in result.out.splitlines() if line.startswith("note: ")] == [f"note: {n}" for n in notes]
    blocks = show_results(content["protocol"], content["rows"])
    assert [block.text for block in blocks[2:]] == [f"Note: {note}." for note in notes]
    assert read_results(file) is not None


def test_an_older_file_without_notes_is_a_page_still(label_folder, settings, tmp_path):
    evaluate([Target("teacher", label_folder, 1)], settings, tmp_path)
    content = json.loads((tmp_path / "evaluation.json").read_text())
    del content["protocol"]["notes"]
    assert len(show_results(content["protocol"], content["rows"])) == 2  # the table, and the protocol's line
