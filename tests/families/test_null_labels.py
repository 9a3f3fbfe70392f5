"""A null label, wherever it is, is no class: not trained, not drawn, not counted; and others keep their numbers."""

from __future__ import annotations

import json

import console
import numpy as np
import pytest
import tiny
import torch
from diffusers import ConsistencyModelPipeline, DiffusionPipeline

from stepdistill.conditions import label_ranges
from stepdistill.errors import UserError
from stepdistill.eval.measure.draws import select_conditions
from stepdistill.eval.run_evaluation import MeasuredRun
from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.families import load_family
from stepdistill.pipelines import export_student
from stepdistill.roles.roles import Roles
from stepdistill.roles.settings import RolesSettings
from stepdistill.sampler import FewStepSampler, few_step_times
from stepdistill.trainers.plans.build import build_trainer, check_fit
from stepdistill.trainers.plans.job import make_job
from stepdistill.trainers.plans.resolve import resolve


def teacher_of(folder, null=None, embeddings=4):
    """A class-conditional teacher whose folder states ``null`` where it is not None."""
    network = tiny.unet(labels=embeddings)
    if null is not None:
        network.register_to_config(_stepdistill={"null_label": null})
    ConsistencyModelPipeline(network, tiny.scheduler("v")).save_pretrained(folder)
    return folder


def config_of(path, output, **changes):
    return {
        "method": "dmd2",
        "output": str(output),
        "teacher": {"path": str(path), **changes.pop("teacher", {})},
        "train": {"updates": 1, "batch_size": 2, "sample_count": 2, "trackers": []},
        "evaluation": {"enabled": False},
        **changes,
    }


def items_of(teacher, **changes):
    job = make_job(config_of(teacher, "unused", **changes))
    return build_trainer(job, None).parts.conditions.items


def student_of(teacher, folder, null_label=None):
    family = load_family(str(teacher), null_label=null_label)
    roles = Roles(family, RolesSettings())
    sampler = FewStepSampler(family.schedule, few_step_times(family.schedule, 1), "renoise")
    return family, roles, sampler, export_student(family, roles.student, sampler, folder, {})


@pytest.mark.parametrize(("null", "labels"), [(0, [1, 2, 3]), (2, [0, 1, 3]), (3, [0, 1, 2]), (None, [0, 1, 2, 3])])
def test_all_labels_are_all_but_the_null_one(null, labels, tmp_path):
    teacher = teacher_of(tmp_path, null)
    assert list(load_family(str(teacher)).labels) == labels
    assert items_of(teacher) == labels
    assert items_of(teacher, data={"labels": labels}) == labels
    assert StockPipeline.load(teacher).labels == labels


@pytest.mark.parametrize(("null", "says"), [(0, "data.labels: 0 is outside 1..3"), (2, "2 is outside 0, 1, 3")])
def test_the_null_label_is_not_trained_when_asked_for(null, says, tmp_path):
    with pytest.raises(UserError, match=says):
        items_of(teacher_of(tmp_path, null), data={"labels": [null]})


def test_images_are_of_classes_not_of_the_null_label(tmp_path):
    teacher = teacher_of(tmp_path / "teacher", 0)
    gan = {"dmd2": {"gan": {"student_weight": 0.01}}}
    for labels, fits in (([1, 2, 3], True), ([0, 1, 2], False)):
        pixels = np.zeros((3, 8, 8), dtype=np.uint8)
        np.savez(tmp_path / "images.npz", images=pixels, labels=np.array(labels))
        raw = config_of(teacher, tmp_path / "run", data={"images": {"npz": str(tmp_path / "images.npz")}}, **gan)
        if fits:
            assert build_trainer(make_job(raw), None).parts.real.images.labels == labels
            continue
        with pytest.raises(UserError, match=r"labels 0\.\.2 are outside 1\.\.3"):
            build_trainer(make_job(raw), None)


@pytest.mark.parametrize(("null", "embeddings"), [(0, 4), (2, 4), (3, 3)])
def test_the_exported_student_draws_the_class_of_a_label(null, embeddings, tmp_path):
    family, roles, sampler, folder = student_of(teacher_of(tmp_path / "teacher", null), tmp_path / "student")
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.unet.config.num_class_embeds == embeddings
    labels = list(family.labels)
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        ours = sampler.sample(roles.student, noise, family.encode_conditions(labels), torch.randn_like)
    drawn = pipe(3, labels, generator=torch.Generator().manual_seed(7), output_type="pt").images
    torch.testing.assert_close(drawn, (family.decode(ours) + 1) / 2, rtol=0, atol=1e-5)
    stock = StockPipeline.load(folder)
    assert (stock.labels, stock.num_labels) == (labels, 3)
    assert select_conditions(stock, range(5)) == [*labels, *labels[:2]]
    card = (folder / "README.md").read_text()
    assert f"class_labels=[{labels[0]}]" in card
    assert ("stands for no class" in card) == (embeddings == 4)
    again = Roles(load_family(str(tmp_path / "teacher")), RolesSettings(student_from=str(folder)))
    assert len(again.student.network.class_embedding.weight) == 4
    refused = console.stepdistill("sample", folder, "--label", null, "--count", 1, "--output", tmp_path / "a.png")
    assert f"--label {null}: outside {label_ranges(labels)}" in refused.error


def test_several_students_share_out_the_classes_alone(tmp_path):
    teacher = teacher_of(tmp_path / "teacher", 0)
    several = resolve(config_of(teacher, tmp_path / "run", msd={"students": 2}))
    router = several.make_router(load_family(str(teacher)))
    assert router.labels == [1, 2, 3]
    parts = [check_fit(job, load_family(str(teacher)), router).items for job in several.jobs]
    assert sorted(label for part in parts for label in part) == [1, 2, 3]


# -- teacher.null_label ------------------------------------------------------------------------------------------


def test_the_config_states_a_null_label_that_the_folder_does_not(tmp_path):
    teacher = teacher_of(tmp_path / "teacher")
    raw = config_of(teacher, tmp_path / "run", teacher={"null_label": 3}, dmd2={"guidance_scale": 2.0})
    trainer = build_trainer(make_job(raw), None)
    assert trainer.parts.conditions.items == [0, 1, 2]
    assert trainer.family.null_condition(2)["label"].tolist() == [3, 3]
    trainer.iteration()
    job = make_job(raw)
    measured = MeasuredRun.from_config(job.config, job.method.make_record(job.config))
    target, *_ = measured.list_targets(tmp_path / "run")
    assert StockPipeline.load(target.path, null_label=target.null_label).labels == [0, 1, 2]
    *_, folder = student_of(teacher, tmp_path / "student", null_label=3)
    assert DiffusionPipeline.from_pretrained(folder).unet.config.num_class_embeds == 3
    *_, folder = student_of(teacher, tmp_path / "first", null_label=0)
    assert StockPipeline.load(folder).labels == [1, 2, 3]


@pytest.mark.slow
def test_the_evaluation_draws_no_null_label_of_the_teacher(tmp_path, monkeypatch):
    """Of a run whose config alone states it; the picture's columns are the classes."""
    teacher = teacher_of(tmp_path / "teacher")
    raw = config_of(teacher, tmp_path / "run", teacher={"null_label": 0, "steps": 2}, evaluation={"enabled": True})
    (tmp_path / "config.yaml").write_text(json.dumps(raw))
    done = console.stepdistill("distill", tmp_path / "config.yaml")
    assert done.code == 0, done.err
    calls, generate = [], StockPipeline.generate
    monkeypatch.setattr(
        StockPipeline,
        "generate",
        lambda self, conditions, *rest, **more: calls.append(conditions) or generate(self, conditions, *rest, **more),
    )
    again = console.stepdistill("evaluate", tmp_path / "run")
    assert again.code == 0, again.err
    assert len(calls) >= 4
    assert all(set(conditions) == {1, 2, 3} for conditions in calls)


@pytest.mark.parametrize(
    ("stated", "null_label", "says"),
    [
        (None, 4, r"teacher\.null_label = 4: the teacher .* has labels 0\.\.3; correct it"),
        (0, 3, r"teacher\.null_label = 3: the teacher .* itself says 0, under _stepdistill"),
        (9, None, r"null_label = 9 under _stepdistill in its unet/config\.json, which has labels 0\.\.3"),
        ("no", None, r"the entry _stepdistill is damaged \(null_label = 'no'\)"),
        (True, None, r"the entry _stepdistill is damaged \(null_label = True\)"),
    ],
)
def test_null_labels_that_cannot_be_are_refused(stated, null_label, says, tmp_path):
    with pytest.raises(UserError, match=says):
        load_family(str(teacher_of(tmp_path, stated)), null_label=null_label)


def test_a_null_label_of_teachers_without_labels_is_refused(tmp_path):
    for teacher in (tiny.save_pixels(tmp_path / "a", "v"), tiny.save_stable_diffusion(tmp_path / "b")):
        with pytest.raises(UserError, match=r"teacher\.null_label = 0: the teacher .* takes no labels; remove the key"):
            load_family(str(teacher), null_label=0)


def test_a_plan_says_that_the_null_label_is_not_stated(tmp_path):
    (tmp_path / "config.yaml").write_text(json.dumps(config_of(teacher_of(tmp_path / "teacher"), tmp_path / "run")))
    plan = console.stepdistill("distill", tmp_path / "config.yaml", "--dry-run")
    assert plan.code == 0, plan.err
    assert "4 labels" in plan.out
    assert (
        "note: the teacher's folder does not say which label is the null one, so all 4 are taken for classes"
        in plan.out
    )
    assert "(often the last, 3, as of ImageNet's 1001), set teacher.null_label" in plan.out
    plan = console.stepdistill("distill", tmp_path / "config.yaml", "teacher.null_label=3", "--dry-run")
    assert "3 labels" in plan.out
    assert "note:" not in plan.out


def test_a_plan_says_that_eps_is_faint_at_the_start(tmp_path):
    """Cosine betas end at alpha 4.9e-5: x0 there is 20,000 times the difference of two eps."""
    for kind, noted in (("cosine_eps", True), ("eps", False)):
        teacher = tiny.save_pixels(tmp_path / kind, kind)
        (tmp_path / "config.yaml").write_text(json.dumps(config_of(teacher, tmp_path / "run")))
        plan = console.stepdistill("distill", tmp_path / "config.yaml", "--dry-run")
        assert ("alpha is 4.9e-05 where the student starts: an error of its eps is 20,291 times" in plan.out) == noted
        assert ("with sampler.start=966 it is 20 times" in plan.out) == noted
    plan = console.stepdistill(
        "distill", tmp_path / "config.yaml", f"teacher.path={tmp_path / 'cosine_eps'}", "sampler.start=966", "--dry-run"
    )
    assert "note:" not in plan.out


@pytest.mark.parametrize(
    ("labels", "words"),
    [([], ""), ([3], "3"), ([0, 1], "0, 1"), (range(10), "0..9"), ([0, 2, 3, 4, 9], "0, 2..4, 9")],
)
def test_labels_in_words(labels, words):
    assert label_ranges(labels) == words
