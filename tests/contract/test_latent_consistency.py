"""A published latent consistency model, with its guidance embedding and its grid of fifty, is tuned and exported."""

from __future__ import annotations

import pytest
import tiny
import torch
from diffusers import DiffusionPipeline, LatentConsistencyModelPipeline, LCMScheduler, UNet2DConditionModel

from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.families.stable_diffusion import guidance_embedding
from stepdistill.pipelines import export_student
from stepdistill.trainers.plans.build import build_trainer, provenance
from stepdistill.trainers.plans.job import make_job


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("lcm")
    base = DiffusionPipeline.from_pretrained(tiny.save_stable_diffusion(root / "base"), safety_checker=None)
    torch.manual_seed(0)
    LatentConsistencyModelPipeline(
        vae=base.vae,
        text_encoder=base.text_encoder,
        tokenizer=base.tokenizer,
        unet=UNet2DConditionModel.from_config({**base.unet.config, "time_cond_proj_dim": 8}),
        scheduler=LCMScheduler(**tiny.SD_BETAS, steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(root / "lcm")
    (root / "prompts.txt").write_text("a cat\na dog\n")
    return root


@pytest.fixture(scope="module")
def tuned(folder):
    """The trainer after two updates, and the exported folder."""
    raw = {
        "method": "pso",
        "output": str(folder / "out"),
        "teacher": {"path": str(folder / "lcm")},
        "data": {"prompts": str(folder / "prompts.txt")},
        "sampler": {"steps": 4},
        "roles": {"lora": {"rank": 2}},
        "optimizer": {"student": {"lr": 1e-2}},
        "train": {"updates": 2, "batch_size": 2, "trackers": []},
        "pso": {"rewards": [{"reward": "stepdistill.judges.rewards:Brightness"}]},
    }
    job = make_job(raw)
    trainer = build_trainer(job, None)
    trainer.fit()
    facts = provenance(job, trainer)
    return trainer, export_student(trainer.family, trainer.roles.student, trainer.sampler, folder / "student", facts)


def test_it_keeps_its_own_times_and_scheduler(tuned):
    trainer, student = tuned
    assert trainer.sampler.times == trainer.method.rollout.times == (999.0, 759.0, 499.0, 259.0)
    scheduler = DiffusionPipeline.from_pretrained(student).scheduler
    assert scheduler.config.original_inference_steps == 50
    assert scheduler.config["_stepdistill"]["call"] == {"num_inference_steps": 4, "guidance_scale": 8.5}


def test_the_stock_pipeline_draws_what_our_sampler_does(tuned):
    trainer, student = tuned
    pipeline = DiffusionPipeline.from_pretrained(student)
    assert type(pipeline) is LatentConsistencyModelPipeline
    pipeline.set_progress_bar_config(disable=True)
    prompts = ["a cat", "two dogs"]
    generator = torch.Generator().manual_seed(7)
    theirs = pipeline(prompts, generator=generator, output_type="latent").images  # the class's defaults: 4 steps, 8.5
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(2, *trainer.family.sample_shape, generator=generator)
    condition = trainer.family.encode_conditions(prompts)
    with torch.no_grad():
        ours = trainer.sampler.sample(
            trainer.roles.student, noise, condition, lambda like: torch.randn(like.shape, generator=generator)
        )
        untuned = trainer.sampler.sample(trainer.roles.teacher, noise, condition, lambda like: torch.zeros_like(like))
    assert (theirs - ours).abs().max() <= 1e-5 * ours.abs().max()
    assert not torch.allclose(untuned, ours)


def test_the_embedding_is_the_stock_pipelines(folder):
    pipeline = DiffusionPipeline.from_pretrained(folder / "lcm")
    w = torch.tensor([0.0, 7.5])
    for width in (8, 9):
        expected = pipeline.get_guidance_scale_embedding(w, embedding_dim=width)
        torch.testing.assert_close(guidance_embedding(w, width), expected, rtol=0, atol=1e-5)


def test_it_is_not_guided_again_and_not_asked_for_too_many_steps(folder):
    family = load_family(str(folder / "lcm"))
    with pytest.raises(UserError, match="guidance embedded"):
        family.null_condition(1)
    raw = {
        "method": "pso",
        "output": "unused",
        "teacher": {"path": str(folder / "lcm")},
        "data": {"prompts": str(folder / "prompts.txt")},
        "sampler": {"steps": 60},
        "train": {"updates": 1, "batch_size": 1},
        "pso": {"rewards": [{"reward": "stepdistill.judges.rewards:Brightness"}]},
    }
    job = make_job(raw)
    with pytest.raises(UserError, match=r"sampler\.steps = 60"):
        job.method.make_sampler(job.config, family)
