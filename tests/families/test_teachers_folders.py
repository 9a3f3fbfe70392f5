"""What a teacher's folder is: by its pipeline's class, all of its parts and its network's config."""

from __future__ import annotations

import json

import console
import diffusers
import pytest
import tiny
import torch
from diffusers import (
    DDIMScheduler,
    DDPMPipeline,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LatentConsistencyModelImg2ImgPipeline,
    LCMScheduler,
    PNDMPipeline,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    UniPCMultistepScheduler,
)

from stepdistill.errors import UserError
from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.families import StableDiffusionFamily, UNet2DFamily, load_family
from stepdistill.pipelines import export_student
from stepdistill.roles.roles import Roles
from stepdistill.roles.settings import RolesSettings
from stepdistill.sampler import FewStepSampler, few_step_times


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {
        "pixels": tiny.save_pixels(root / "pixels", "v", labels=3, null=True),
        "latents": tiny.save_stable_diffusion(root / "latents"),
    }


# -- model_index.json --------------------------------------------------------------------------------------------

PIXELS, LATENTS = "pixels", "latents"
REFUSED = {
    "latents of a VQ-VAE": (
        PIXELS,
        {"_class_name": "LDMPipeline", "vqvae": ["diffusers", "VQModel"]},
        r"a LDMPipeline with vqvae \(VQModel\) is not supported",
    ),
    "a VAE beside a pixel network": (PIXELS, {"vae": ["diffusers", "AutoencoderKL"]}, r"with vae \(AutoencoderKL\)"),
    "another pixel pipeline": (
        PIXELS,
        {"_class_name": "ScoreSdeVePipeline"},
        r"a ScoreSdeVePipeline is not supported; if ConsistencyModelPipeline draws as well with its parts \(unet, "
        r"scheduler\), save them as one",
    ),
    "a ControlNet": (
        LATENTS,
        {"_class_name": "StableDiffusionControlNetPipeline", "controlnet": ["diffusers", "ControlNetModel"]},
        r"with controlnet \(ControlNetModel\) is not supported",
    ),
    "an image encoder": (
        LATENTS,
        {"image_encoder": ["transformers", "CLIPVisionModelWithProjection"]},
        r"with image_encoder \(CLIPVisionModelWithProjection\)",
    ),
    "an adapter": (LATENTS, {"adapter": ["diffusers", "T2IAdapter"]}, r"with adapter \(T2IAdapter\)"),
    "a prior": (LATENTS, {"prior": ["diffusers", "PriorTransformer"]}, r"with prior \(PriorTransformer\)"),
    "a MoVQ": (LATENTS, {"movq": ["diffusers", "VQModel"]}, r"with movq \(VQModel\)"),
    "a depth estimator": (
        LATENTS,
        {"_class_name": "StableDiffusionDepth2ImgPipeline", "depth_estimator": ["transformers", "DPTModel"]},
        r"with depth_estimator \(DPTModel\)",
    ),
    "another pipeline of the same parts": (
        LATENTS,
        {"_class_name": "StableDiffusionPanoramaPipeline"},
        "a StableDiffusionPanoramaPipeline is not supported; if StableDiffusionPipeline draws as well",
    ),
    "an upscaler": (LATENTS, {"low_res_scheduler": ["diffusers", "DDPMScheduler"]}, "with low_res_scheduler"),
    "another VAE": (
        LATENTS,
        {"vae": ["diffusers", "AsymmetricAutoencoderKL"]},
        "its vae is of class AsymmetricAutoencoderKL; only AutoencoderKL is supported",
    ),
    "no VAE": (LATENTS, {"vae": [None, None]}, "its vae is missing; save the whole pipeline"),
    "no tokenizer": (LATENTS, {"tokenizer": None}, "its tokenizer is missing; save the whole pipeline"),
    "no scheduler": (PIXELS, {"scheduler": [None, None]}, "its scheduler is missing"),
    "another network": (PIXELS, {"unet": ["diffusers", "UNet1DModel"]}, "a ConsistencyModelPipeline is not supported"),
    "code of its own": (PIXELS, {"_class_name": ["pipeline", "Mine"]}, "names no pipeline class of diffusers"),
    "no class": (PIXELS, {"_class_name": None}, "names no pipeline class of diffusers"),
    "half a part": (PIXELS, {"unet": ["diffusers"]}, r"unet = \['diffusers'\] is not a library and a class"),
    "a number for a class": (PIXELS, {"unet": ["diffusers", 3]}, "is not a library and a class"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_folder_that_is_something_else_is_refused_in_one_line(name, folders, tmp_path):
    source, changes, says = REFUSED[name]
    index = json.loads((folders[source] / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | changes))
    with pytest.raises(UserError, match=says) as refused:
        load_family(str(tmp_path))
    assert str(refused.value).startswith(f"teacher {tmp_path}: ")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("index", [[], ["unet"], 3, None, "DDPMPipeline", {}, {"unet": ["diffusers", "UNet2DModel"]}])
def test_an_index_of_another_type_is_one_line(index, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model_index\.json") as refused:
        load_family(str(tmp_path))
    assert "\n" not in str(refused.value)


def test_safety_parts_are_left_out(folders, tmp_path):
    index = json.loads((folders["latents"] / "model_index.json").read_text())
    for name in folders["latents"].iterdir():
        if name.is_dir():
            (tmp_path / name.name).symlink_to(name)
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    assert load_family(str(tmp_path)).name == "stable_diffusion"


# -- pipelines around the same parts -----------------------------------------------------------------------------


def saved_as(kind, folder, path):
    """The parts of a StableDiffusionPipeline folder, saved by another pipeline class."""
    parts = DiffusionPipeline.from_pretrained(folder, safety_checker=None, feature_extractor=None).components
    if kind is LatentConsistencyModelImg2ImgPipeline:  # whose call is for such parts alone
        parts["scheduler"] = LCMScheduler.from_config(parts["scheduler"].config)
        parts["unet"] = text_network(time_cond_proj_dim=8)
    kind(**parts, requires_safety_checker=False).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    "kind", [StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, LatentConsistencyModelImg2ImgPipeline]
)
def test_a_folder_saved_by_a_pipeline_of_pictures_draws_as_the_one_of_prompts(kind, folders, tmp_path):
    teacher = saved_as(kind, folders["latents"], tmp_path / "teacher")
    assert load_family(str(teacher)).name == "stable_diffusion"
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    drawn = [
        StockPipeline.load(path).generate(["a cat", "a dog"], noise, 3, torch.Generator(), 4.0)
        for path in (teacher, folders["latents"])
    ]
    if kind is not LatentConsistencyModelImg2ImgPipeline:
        assert torch.equal(*drawn)
    assert drawn[0].shape == (2, 3, 16, 16)


@pytest.mark.slow
def test_a_teacher_saved_by_a_pipeline_of_pictures_runs_to_its_end(folders, tmp_path):
    """Before, it failed in the evaluation, after the training."""
    teacher = saved_as(StableDiffusionImg2ImgPipeline, folders["latents"], tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    (tmp_path / "config.yaml").write_text(f"""
method: dmd2
output: {tmp_path / "run"}
teacher: {{path: {teacher}, steps: 3}}
data: {{prompts: {tmp_path / "prompts.txt"}}}
train: {{updates: 1, batch_size: 2, sample_count: 2, trackers: []}}
""")
    done = console.stepdistill("distill", tmp_path / "config.yaml")
    assert done.code == 0, done.err
    assert (tmp_path / "run" / "grid.png").is_file()
    assert isinstance(DiffusionPipeline.from_pretrained(tmp_path / "run" / "student"), StableDiffusionPipeline)
    drawn = console.stepdistill("sample", teacher, "--prompt", "a cat", "--count", 2, "--output", tmp_path / "a.png")
    assert drawn.code == 0, drawn.err


@pytest.mark.parametrize(
    "scheduler",
    [
        PNDMScheduler(),
        HeunDiscreteScheduler(),
        UniPCMultistepScheduler(),
        FlowMatchEulerDiscreteScheduler(),
        diffusers.UnCLIPScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_pixel_teachers_with_other_schedulers_are_drawn(scheduler, tmp_path):
    """Stock's loop hands every scheduler a generator, and scales the first noise, which some do not know."""
    pipeline = PNDMPipeline if isinstance(scheduler, PNDMScheduler) else DDPMPipeline
    pipeline(tiny.unet(), scheduler).save_pretrained(tmp_path)
    assert load_family(str(tmp_path)).name == "unet2d"
    stock = StockPipeline.load(tmp_path)
    pixels = stock.generate(None, torch.randn(2, 1, 8, 8), 4, torch.Generator())
    assert pixels.shape == (2, 1, 8, 8)
    assert pixels.isfinite().all()


def test_a_scheduler_that_stock_cannot_call_is_one_line(tmp_path):
    DDPMPipeline(tiny.unet(), diffusers.RePaintScheduler()).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"cannot be sampled in 4 steps .*original_image") as refused:
        StockPipeline.load(tmp_path).generate(None, torch.randn(2, 1, 8, 8), 4, torch.Generator())
    assert "\n" not in str(refused.value)


# -- the network's config ----------------------------------------------------------------------------------------


def pixel_network(**changes):
    shape = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    return UNet2DModel(**{"sample_size": 8, "in_channels": 1, "out_channels": 1, **shape, **blocks, **changes})


def text_network(**changes):
    return UNet2DConditionModel(**{**tiny.condition_unet().config, **changes})


WIDTH = {"projection_class_embeddings_input_dim": 8}
NETWORKS = {
    "classes as timesteps": (pixel_network, {"class_embed_type": "timestep"}, "class_embed_type = timestep"),
    "classes as embeddings": (pixel_network, {"class_embed_type": "identity"}, "class_embed_type = identity"),
    "a score network": (pixel_network, {"time_embedding_type": "fourier"}, "time_embedding_type = fourier"),
    "a learned variance": (pixel_network, {"out_channels": 2}, "2 output channels for 1 input channels"),
    "no size": (pixel_network, {"sample_size": None}, "has no sample_size"),
    "SDXL": (
        text_network,
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 4, **WIDTH},
        "addition_embed_type = text_time .* takes more than a prompt",
    ),
    "an upscaler": (text_network, {"num_class_embeds": 10}, "num_class_embeds = 10"),
    "unCLIP": (text_network, {"class_embed_type": "projection", **WIDTH}, "class_embed_type = projection"),
    "prompts of another width": (text_network, {"encoder_hid_dim": 6}, "encoder_hid_dim_type = text_proj"),
    "boxes": (text_network, {"attention_type": "gated"}, "attention_type = gated"),
    "inpainting": (text_network, {"in_channels": 9}, "takes 9 channels, not the VAE's 4"),
    "edits": (text_network, {"in_channels": 8}, "takes 8 channels, not the VAE's 4"),
    "a learned variance of latents": (text_network, {"out_channels": 8}, "8 output channels for 4 input channels"),
    "no size of latents": (text_network, {"sample_size": None}, "has no sample_size"),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_that_is_called_otherwise_is_refused(name, folders):
    make, changes, says = NETWORKS[name]
    family = UNet2DFamily if make is pixel_network else StableDiffusionFamily
    pipeline = DiffusionPipeline.from_pretrained(folders["pixels" if family is UNet2DFamily else "latents"])
    pipeline.register_modules(unet=make())
    family.from_pipeline(pipeline, "X")
    pipeline.register_modules(unet=make(**changes))
    with pytest.raises(UserError, match=f"teacher X: .*{says}"):
        family.from_pipeline(pipeline, "X")


# -- pictures that are not square --------------------------------------------------------------------------------


def exported_oblong(scheduler, transition, steps, tmp_path):
    DDPMPipeline(pixel_network(sample_size=(8, 16)), scheduler).save_pretrained(tmp_path / "teacher")
    family = load_family(str(tmp_path / "teacher"))
    sampler = FewStepSampler(family.schedule, few_step_times(family.schedule, steps), transition)
    roles = Roles(family, RolesSettings())
    return family, roles, sampler, export_student(family, roles.student, sampler, tmp_path / "student", {})


@pytest.mark.parametrize(
    ("kind", "transition", "steps"), [("v", "renoise", 1), ("v", "renoise", 4), ("eps", "tcd", 4), ("flow", "ode", 4)]
)
def test_a_student_of_pictures_that_are_not_square_draws_in_stock_without_latents(kind, transition, steps, tmp_path):
    """The consistency pipeline has one number for both sides; DDPMPipeline has not, and runs the same loop."""
    family, roles, sampler, folder = exported_oblong(tiny.scheduler(kind), transition, steps, tmp_path)
    pipe = DiffusionPipeline.from_pretrained(folder)
    assert type(pipe) is DDPMPipeline
    drawn = pipe(2, torch.Generator().manual_seed(7), num_inference_steps=steps, output_type="pt").images
    generator = torch.Generator().manual_seed(7)
    noise = torch.randn(2, 1, 8, 16, generator=generator)
    with torch.no_grad():
        ours = sampler.sample(roles.student, noise, {}, lambda like: torch.randn(like.shape, generator=generator))
    torch.testing.assert_close(drawn, (family.decode(ours) + 1) / 2, rtol=0, atol=1e-5)
    stock = StockPipeline.load(folder)
    assert stock.generate(None, noise, steps, generator).shape == (2, 1, 8, 16)
    assert f"pipe(batch_size=1, num_inference_steps={steps})" in (folder / "README.md").read_text()


def test_what_stock_cannot_draw_oblong_is_refused_before_training(tmp_path):
    DDPMPipeline(pixel_network(sample_size=(8, 16), num_class_embeds=3), DDIMScheduler()).save_pretrained(
        tmp_path / "a"
    )
    with pytest.raises(UserError, match=r"its pictures are 16x8, and stock .* by class labels"):
        load_family(str(tmp_path / "a"))
    DDPMPipeline(pixel_network(sample_size=(8, 16)), tiny.scheduler("edm")).save_pretrained(tmp_path / "b")
    with pytest.raises(UserError, match=r"its pictures are 16x8, and stock .* with EDM schedulers"):
        load_family(str(tmp_path / "b"))
    with pytest.raises(UserError, match=r"EulerAncestralDiscreteScheduler; set sampler\.transition"):
        exported_oblong(tiny.scheduler("eps"), "ancestral", 2, tmp_path)


def test_a_square_written_as_a_pair_is_a_square(tmp_path):
    """Stock's consistency pipeline takes the pair for one side."""
    network = pixel_network(sample_size=(8, 8), num_class_embeds=3)
    DDPMPipeline(network, tiny.scheduler("v")).save_pretrained(tmp_path / "teacher")
    family = load_family(str(tmp_path / "teacher"))
    sampler = FewStepSampler(family.schedule, few_step_times(family.schedule, 1), "renoise")
    folder = export_student(family, Roles(family, RolesSettings()).student, sampler, tmp_path / "student", {})
    assert DiffusionPipeline.from_pretrained(folder)(class_labels=[2]).images[0].size == (8, 8)
