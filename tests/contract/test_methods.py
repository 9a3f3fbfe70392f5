"""Every method x teacher family x weights: trains, resumes bit for bit, routes gradients, exports."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from diffusers import DiffusionPipeline
from methods import CASES, DIRECT_ROWS, METHODS, SCORE_ROWS, settings_on, weights_of
from teacher_table import TEACHERS, make_teachers

from stepdistill import checkpoint
from stepdistill.config import merge
from stepdistill.errors import UserError
from stepdistill.eval.run_evaluation import choose_prompts
from stepdistill.families import calls_of
from stepdistill.pipelines import export_student
from stepdistill.run import RunFolder
from stepdistill.trainers.plans.build import build_trainer, provenance, resume
from stepdistill.trainers.plans.job import make_job


@pytest.fixture(scope="session")
def teachers(tmp_path_factory):
    return make_teachers(tmp_path_factory.mktemp("teachers"))


def job_for(row: str, teacher: dict, weights: str, output, on: str = "unet2d", **train):
    """The job of a row of methods; ``teacher``: its config sections; ``on``: the row of teachers that it is like."""
    raw = {
        "method": row.split("_")[0],
        "output": str(output),
        "seed": 3,
        "roles": {"weights": weights, "lora": {"rank": 2}},
        "optimizer": {
            "student": {"lr": 1e-3, "warmup": 3},
            "fake_score": {"lr": 1e-3},
            "discriminator": {"lr": 1e-3},
        },
        "train": {"updates": 4, "batch_size": 2, "log_every": 1, "sample_count": 4, "ema_decay": 0.9, "trackers": []},
        "evaluation": {"enabled": False},
    }
    settings = json.loads(json.dumps(settings_on(row, on)).replace("{teacher}", teacher["teacher"]["path"]))
    raw = merge(merge(raw, settings), {"train": train})
    return make_job(merge(raw, teacher))


def method_of(trainer):
    """The method that makes samples: DisBack's is the one that it is around."""
    return getattr(trainer.method, "base", trainer.method)


def tensors_of(trainer) -> dict[str, torch.Tensor]:
    tensors, _ = trainer.state()
    return {f"{group}/{key}": value.clone() for group, settings in tensors.items() for key, value in settings.items()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]):
    assert a.keys() == b.keys()
    different = [key for key in a if not torch.equal(a[key], b[key])]
    assert not different, different[:5]


def started(job, output):
    run = RunFolder(output)
    run.create(job.config, job.config.seed)
    return build_trainer(job, run), run


@pytest.mark.parametrize(("row", "weights", "teacher"), CASES)
def test_two_and_two_updates_are_four_bit_for_bit_and_the_student_exports(row, teacher, weights, teachers, tmp_path):
    whole, _ = started(job_for(row, teachers[teacher], weights, tmp_path / "whole", teacher), tmp_path / "whole")
    frozen = {k: v.clone() for k, v in whole.family.network.state_dict().items() if "lora_" not in k}
    start = tensors_of(whole)
    whole.fit()

    half = job_for(row, teachers[teacher], weights, tmp_path / "halves", teacher, updates=2)
    first, _ = started(half, tmp_path / "halves")
    first.fit()
    job = job_for(row, teachers[teacher], weights, tmp_path / "halves", teacher)
    run = RunFolder(tmp_path / "halves")
    assert run.check(job.config, resume=True)
    second = build_trainer(job, run)
    assert resume(second, run)
    assert second.counters["student"] == 2
    second.fit()
    assert_same(tensors_of(whole), tensors_of(second))
    assert whole.counters == second.counters

    moved = tensors_of(whole)
    for role in (group for group in whole.trained if any(k.startswith(f"{group}/") for k in start)):
        keys = [k for k in start if k.startswith(f"{role}/")]
        assert any(not torch.equal(start[k], moved[k]) for k in keys), role
    for key, value in whole.family.network.state_dict().items():
        if "lora_" not in key:
            assert torch.equal(value, frozen[key]), f"the teacher's {key} changed"

    folder = export_student(
        whole.family, whole.roles.student, whole.sampler, tmp_path / "student", provenance(job, whole)
    )
    exported = calls_of(DiffusionPipeline.from_pretrained(folder)).network.state_dict()
    for key, value in whole.roles.student.plain_state_dict().items():
        assert torch.equal(exported[key], value[: len(exported[key])]), key  # the null label's row may be left out
    assert (folder / "lora").exists() == (weights == "shared")
    rows = run.metrics.read_text().splitlines()
    assert len(rows) == 4 + whole.counters.get("recorded", 0)


REFUSED = [(row, teacher) for teacher, table in TEACHERS.items() for row in table.refused]


@pytest.mark.parametrize(("row", "teacher"), REFUSED)
def test_what_a_teacher_is_not_for_is_refused_before_training(row, teacher, teachers, tmp_path):
    def prepare() -> None:
        trainer = build_trainer(job_for(row, teachers[teacher], "full", tmp_path, teacher), None)
        trainer.family.check_expressible(trainer.sampler)

    with pytest.raises(UserError) as error:
        prepare()
    assert TEACHERS[teacher].refused[row] in str(error.value)


@pytest.mark.parametrize(("row", "weights", "teacher"), CASES)
def test_gradient_checkpointing_changes_no_gradient(row, teacher, weights, teachers, tmp_path):
    """Values, not running: recomputation under the wrong adapter would give other gradients and no error."""
    gradients = []
    for checkpointing in (False, True):
        job = job_for(row, teachers[teacher], weights, tmp_path, teacher, gradient_checkpointing=checkpointing)
        trainer = build_trainer(job, None)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():  # LoRA's B starts at zero: adapters would not differ from the base
            for role in trainer.roles.trained():
                for parameter in role.parameters().values():
                    parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
        if row.startswith("disback"):  # a target to ask, as after the recording
            state = trainer.roles.fake_score.portable_state_dict()
            state = {k: v + 0.03 * torch.randn(v.shape, generator=generator) for k, v in state.items()}
            node = asdict(trainer.method.store.write(1, 0.0, state))
            trainer.method.memory["path"] = [node] * trainer.method.settings.nodes
        recorded = {}
        trainer.step = lambda role, recorded=recorded, trainer=trainer: recorded.update(
            {f"{role}/{k}": p.grad.clone() for k, p in trainer.trained[role].items() if p.grad is not None}
        )
        trainer.begin() if row == "regression" else None
        trainer.iteration()
        if row.startswith("disback"):
            assert trainer.method.walk.teacher.denoiser is trainer.method.walk.node_teacher
        gradients.append(recorded)
    plain, recomputed = gradients
    assert plain.keys() == recomputed.keys()
    assert any(key.startswith("student/") for key in plain)
    for key, value in plain.items():
        torch.testing.assert_close(recomputed[key], value, rtol=1e-4, atol=1e-7, msg=key)


@pytest.mark.parametrize("row", METHODS)
def test_a_half_precision_teacher_trains_and_its_export_draws(row, teachers, tmp_path):
    """Frozen weights in half precision, networks in bfloat16; float16 for a row of each loop."""
    dtype = "float16" if row in ("dmd2_gan", "boot", "tscd", "pso", "regression") else "bfloat16"
    weights = "shared" if "shared" in weights_of(row) else "full"
    teacher = merge(teachers["stable_diffusion"], {"teacher": {"dtype": dtype}})
    job = job_for(row, teacher, weights, tmp_path / "run", updates=2, precision="bf16", sample_count=2)
    trainer, run = started(job, tmp_path / "run")
    trainer.fit()
    assert trainer.counters["student"] == 2
    assert not any(trainer.skipped.values())
    assert all(value.isfinite().all() for value in tensors_of(trainer).values())
    assert (run.samples / "000002.png").is_file()
    student, facts = trainer.roles.student, provenance(job, trainer)
    pipeline = DiffusionPipeline.from_pretrained(
        export_student(trainer.family, student, trainer.sampler, tmp_path / "student", facts)
    )
    pipeline.set_progress_bar_config(disable=True)
    call = pipeline.scheduler.config["_stepdistill"]["call"]
    assert pipeline(["a cat"], output_type="pt", **call).images.isfinite().all()


@pytest.mark.parametrize("row", DIRECT_ROWS)
def test_accumulation_is_the_mean_of_its_micro_batches(row, teachers, tmp_path):
    job = job_for(row, teachers["unet2d"], weights_of(row)[-1], tmp_path, gradient_accumulation=2)
    trainer = build_trainer(job, None)
    trainer.begin()
    settings, seen, taken = trainer.method.student_losses, [], {}

    def keep(batch):
        seen.append((batch, trainer.noise.get_state(), dict(trainer.counters)))
        return settings(batch)

    trainer.method.student_losses = keep
    trainer.step = lambda role: taken.setdefault(
        role, {k: p.grad.clone() for k, p in trainer.trained[role].items() if p.grad is not None}
    )
    trainer.iteration()
    assert len(seen) == 2
    summed: dict = {}
    for batch, state, counters in seen:
        trainer.noise.set_state(state)
        trainer.counters.update(counters)
        parameters = {k: p for k, p in trainer.trained["student"].items() if k in taken["student"]}
        loss = sum(weight * value for weight, value in settings(batch).values())
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        for key, gradient in zip(parameters, gradients, strict=True):
            summed[key] = summed.get(key, 0) + gradient / 2
    for key, gradient in taken["student"].items():
        torch.testing.assert_close(gradient, summed[key], rtol=1e-4, atol=1e-7, msg=key)
    assert max(gradient.abs().max() for gradient in summed.values()) > 1e-5


@pytest.mark.parametrize("row", DIRECT_ROWS)
def test_bf16_gradients_of_a_student_alone_are_close_to_float32(row, teachers, tmp_path):
    gradients = {}
    for precision in ("float32", "bf16"):
        job = job_for(row, teachers["unet2d"], weights_of(row)[-1], tmp_path, precision=precision)
        trainer = build_trainer(job, None)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in trainer.roles.student.parameters().values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        trainer.begin()
        taken = gradients[precision] = {}
        trainer.step = lambda role, trainer=trainer, taken=taken: taken.setdefault(
            role, torch.cat([p.grad.flatten() for p in trainer.trained[role].values() if p.grad is not None])
        )
        trainer.iteration()
    a, b = gradients["float32"]["student"], gradients["bf16"]["student"]
    assert b.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(a, b, 0) > 0.98


@pytest.mark.parametrize("row", [row for row in SCORE_ROWS if row != "enhance"])
def test_accumulation_is_the_larger_batch(row, teachers, tmp_path):
    """Two micro-batches of 2 give the gradient of one batch of 4 on the same samples."""
    job = job_for(row, teachers["unet2d"], "full", tmp_path, gradient_accumulation=2)
    trainer = build_trainer(job, None)
    parts, taken = [], {}

    def whole(trainer):
        trainer.step = lambda role: taken.update({k: p.grad.clone() for k, p in trainer.trained[role].items()})

    make = method_of(trainer).make_sample

    def make_and_keep(batch):
        x0 = make(batch)
        if x0.requires_grad:  # the student's own; a fake score that is first has others
            parts.append((batch, x0.detach().clone()))
        return x0

    method_of(trainer).make_sample = make_and_keep
    gradients = []
    settings = method_of(trainer).sample_gradient
    method_of(trainer).sample_gradient = lambda x0, batch: gradients.append(settings(x0, batch)) or gradients[-1]
    backward = {}
    trainer.step = lambda role: backward.update(
        {role: {k: p.grad.clone() for k, p in trainer.trained[role].items() if p.grad is not None}}
    )
    trainer.iteration()
    student = backward["student"]
    for p in trainer.trained["student"].values():
        p.grad = None
    state = trainer.noise.get_state()
    for (batch, before), gradient in zip(parts, gradients, strict=True):
        trainer.noise.set_state(state)
        if trainer.sampler.steps == 1:
            x0 = make(batch)
            torch.testing.assert_close(x0.detach(), before)
            x0.backward(gradient / 2)
    if trainer.sampler.steps == 1:
        for key, parameter in trainer.trained["student"].items():
            if parameter.grad is not None:
                torch.testing.assert_close(student[key], parameter.grad)
    assert len(parts) == 2


@pytest.mark.parametrize("row", SCORE_ROWS)
def test_bf16_trains_close_to_float32(row, teachers, tmp_path):
    """The sample's gradient in bf16 points where float32's does."""
    gradients = {}
    for precision in ("float32", "bf16"):
        trainer = build_trainer(job_for(row, teachers["unet2d"], "full", tmp_path, precision=precision), None)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():  # away from fake score = teacher, where the gradient is zero
            for parameter in trainer.roles.fake_score.parameters().values():
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
        batch = method_of(trainer).next_batch()
        x0 = method_of(trainer).make_sample(batch)
        assert x0.dtype == torch.float32
        gradients[precision] = method_of(trainer).sample_gradient(x0.detach(), batch).flatten()
    cosine = torch.nn.functional.cosine_similarity(gradients["float32"], gradients["bf16"], 0)
    assert cosine > 0.98


def test_checkpoint_of_another_method_or_teacher_is_refused(teachers, tmp_path):
    job = job_for("dmd2", teachers["unet2d"], "full", tmp_path / "a", updates=1)
    trainer, run = started(job, tmp_path / "a")
    trainer.fit()
    tensors, meta = checkpoint.load(checkpoint.latest(run.checkpoints))
    with pytest.raises(UserError, match="written by method 'other'"):
        trainer.restore(tensors, {**meta, "method": "other"}, "here")
    other = build_trainer(job_for("dmd2", teachers["stable_diffusion"], "full", tmp_path / "b"), None)
    with pytest.raises(UserError, match="not those that the run was started with"):
        other.restore(tensors, meta, "here")


@pytest.mark.parametrize(("shown", "drawn"), [([], ["a cat", "a dog"]), (["a red bus"], ["a red bus", "a red bus"])])
def test_a_runs_pictures_are_of_the_prompts_that_it_shows(shown, drawn, teachers, tmp_path, monkeypatch):
    base = teachers["stable_diffusion"]
    teacher = merge(base, {"data": {"shown": shown}})
    trainer, run = started(job_for("dmd2", teacher, "shared", tmp_path / "a", sample_count=2), tmp_path / "a")
    calls, encode = [], trainer.family.encode_conditions
    monkeypatch.setattr(trainer.family, "encode_conditions", lambda items: calls.extend(items) or encode(items))
    trainer.recorder.save_samples()
    assert calls == drawn
    assert (run.samples / "000000.png").is_file()
    assert choose_prompts(trainer.config.data) == (shown or ["a cat", "a dog", "a red bus"])
