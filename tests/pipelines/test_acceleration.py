"""accelerate and NegativePrompts on loaded pipelines: the same pictures, and the stock pipeline back."""

from __future__ import annotations

import inspect
import logging
import re
import warnings

import pytest
import tiny
import torch
from diffusers import (
    AutoencoderTiny,
    ConsistencyModelPipeline,
    DiffusionPipeline,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from stepdistill.attention import kernels
from stepdistill.attention.fused import fused_projection
from stepdistill.attention.modules import find_attention
from stepdistill.attention.processor import AttentionProcessor
from stepdistill.errors import UserError
from stepdistill.pipelines import Acceleration, NegativePrompts, accelerate
from stepdistill.pipelines import acceleration as speed

ROUNDING = 2e-6
"""On pictures in [0, 1]: other kernels, fused products, other memory formats."""


@pytest.fixture(autouse=True)
def process_wide_default():
    yield
    assert _AttentionBackendRegistry._active_backend == AttentionBackendName.NATIVE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny pipeline whose pictures are of its text: cross-attentions of 20 times the size."""
    path = tiny.save_stable_diffusion(tmp_path_factory.mktemp("speed") / "sd")
    pipe = load(path)
    with torch.no_grad():
        for name, module in pipe.unet.named_modules():
            if name.endswith("attn2"):
                module.to_v.weight.mul_(20)
    pipe.save_pretrained(path)
    return path


@pytest.fixture
def pipe(folder):
    return load(folder)


def load(folder):
    pipe = DiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe, prompts="a cat", steps=1, seed=7, **call) -> torch.Tensor:
    """Pictures (B, 3, H, W) in [0, 1]."""
    call = {"num_inference_steps": steps, "guidance_scale": 0, "output_type": "pt", **call}
    return pipe(prompts, generator=torch.Generator().manual_seed(seed), **call).images


def pixels(pipe) -> torch.Tensor:
    result = pipe(batch_size=2, generator=torch.Generator().manual_seed(7), num_inference_steps=1, output_type="pt")
    return result.images


def networks(pipe) -> list:
    return [part for name, part in pipe.components.items() if name in ("unet", "vae") and part is not None]


def assert_stock(pipe) -> None:
    for network in networks(pipe):
        assert {type(module.processor) for module in find_attention(network)} <= {AttnProcessor2_0}
        assert not [name for name, _ in network.named_buffers() if "fused" in name]
        assert all(module._compiled_call_impl is None for module in network.modules())
        assert all(p.is_contiguous() for p in network.parameters())


def taesd(channels: int = 4, levels: int = 2) -> AutoencoderTiny:
    torch.manual_seed(1)
    return AutoencoderTiny(
        latent_channels=channels,
        encoder_block_out_channels=(8,) * levels,
        decoder_block_out_channels=(8,) * levels,
        num_encoder_blocks=(1,) * levels,
        num_decoder_blocks=(1,) * levels,
    )


OFF = {"attention": "native", "fuse_qkv": False, "channels_last": False, "compile": False}
PARTS = {
    "attention": {"attention": "_native_math"},
    "attention_flash": {"attention": "_native_flash"},
    "fuse_qkv": {"fuse_qkv": True},
    "channels_last": {"channels_last": True},
    "all": {"attention": "_native_math", "fuse_qkv": True, "channels_last": True},
}


# -- each part and all -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_pictures_stay_within_rounding_and_come_back_to_the_bit(part, pipe):
    stock = draw(pipe, ["a cat", "two dogs"])
    acceleration = accelerate(pipe, **{**OFF, **PARTS[part]})
    assert acceleration.done.keys() == {"attention", *(k for k in PARTS[part])}
    torch.testing.assert_close(draw(pipe, ["a cat", "two dogs"]), stock, rtol=0, atol=ROUNDING)
    acceleration.undo()
    assert acceleration.done == {}
    assert_stock(pipe)
    assert torch.equal(draw(pipe, ["a cat", "two dogs"]), stock)


def test_each_part_does_what_it_says(pipe):
    with accelerate(pipe, **{**OFF, **PARTS["all"]}):
        for network in networks(pipe):
            for module in find_attention(network):
                assert module.processor._attention_backend == AttentionBackendName("_native_math")
                with torch.no_grad():
                    assert fused_projection(module) is not None
        for weight in (pipe.unet.conv_in.weight, pipe.vae.decoder.conv_in.weight):
            assert weight.is_contiguous(memory_format=torch.channels_last)
            assert not weight.is_contiguous()
    assert_stock(pipe)


def test_on_a_cpu_auto_is_native_and_fused_alone(pipe):
    acceleration = accelerate(pipe)
    assert acceleration.done == {"attention": "native", "fuse_qkv": "10 attentions"}
    assert acceleration.skipped.keys() == {
        "attention: _native_cudnn, _native_flash, _native_efficient, flash, _flash_3, xformers",
        "channels_last",
        "compile",
    }
    lines = str(acceleration).splitlines()
    assert lines[:2] == ["attention: native", "fuse_qkv: 10 attentions"]
    assert "skipped channels_last (auto, on a cpu; True does it)" in lines


def test_parts_are_undone_one_by_one_in_any_order(pipe):
    stock = draw(pipe)
    for order in (("attention", "channels_last", "fuse_qkv"), ("fuse_qkv", "attention", "channels_last")):
        acceleration = accelerate(pipe, **{**OFF, **PARTS["all"]})
        for part in order:
            acceleration.undo(part)
            assert part not in acceleration.done
            torch.testing.assert_close(draw(pipe), stock, rtol=0, atol=ROUNDING)
            with pytest.raises(UserError, match=f"{part}: was not done; done are "):
                acceleration.undo(part)
        assert_stock(pipe)
        assert torch.equal(draw(pipe), stock)
        acceleration.undo()  # nothing left
    with pytest.raises(UserError, match="compile: was not done; done are none"):
        acceleration.undo("compile")


def test_leaving_the_block_is_undoing_even_through_an_error(pipe):
    with pytest.raises(KeyError, match="inside"), accelerate(pipe, **{**OFF, **PARTS["all"]}):
        raise KeyError("inside")
    assert_stock(pipe)


def test_one_inside_another_comes_back_to_the_outer_one(pipe):
    with accelerate(pipe, **{**OFF, "attention": "_native_math"}):
        with accelerate(pipe, **{**OFF, "attention": "_native_flash"}):
            pass
        with accelerate(pipe, **OFF):
            assert {type(module.processor) for module in find_attention(pipe.unet)} == {AttnProcessor2_0}
        for network in networks(pipe):
            backends = {module.processor._attention_backend.value for module in find_attention(network)}
            assert backends == {"_native_math"}
    assert_stock(pipe)


def test_two_pipelines_are_two(folder, pipe):
    other = load(folder)
    stock = draw(other)
    accelerate(pipe, **{**OFF, **PARTS["all"]})
    assert_stock(other)
    assert torch.equal(draw(other), stock)


def test_saving_an_accelerated_pipeline_writes_the_stock_one(pipe, folder, tmp_path):
    stock = draw(pipe)
    keys = {name: list(getattr(pipe, name).state_dict()) for name in ("unet", "vae")}
    accelerate(pipe, **{**OFF, **PARTS["all"]})
    NegativePrompts(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert_stock(again)
    for name, keys_of_part in keys.items():
        assert list(getattr(again, name).state_dict()) == keys_of_part
        written = (tmp_path / "saved" / name / "diffusion_pytorch_model.safetensors").stat().st_size
        assert written == (folder / name / "diffusion_pytorch_model.safetensors").stat().st_size
    assert torch.equal(draw(again), stock)


def test_a_pixel_pipeline_too(tmp_path):
    pipe = ConsistencyModelPipeline.from_pretrained(tiny.save_pixels(tmp_path / "pixels"))
    pipe.set_progress_bar_config(disable=True)
    stock = pixels(pipe)
    acceleration = accelerate(pipe, **{**OFF, **PARTS["all"]})
    assert acceleration.done["fuse_qkv"] == "4 attentions"
    torch.testing.assert_close(pixels(pipe), stock, rtol=0, atol=ROUNDING)
    acceleration.undo()
    assert_stock(pipe)
    assert torch.equal(pixels(pipe), stock)
    with pytest.raises(UserError, match="tiny_vae: ConsistencyModelPipeline has no VAE"):
        accelerate(pipe, tiny_vae=taesd())


@pytest.mark.parametrize(
    ("attention", "says"),
    [
        ("flush", "attention = flush: use auto, or one of diffusers' backends: "),
        ("flash", "attention = flash: it does not run on this cpu (Flash Attention backend 'flash' is not usable"),
    ],
)
def test_a_kernel_that_is_not_there_is_one_line_and_nothing_is_done(attention, says, pipe):
    stock = draw(pipe)
    with pytest.raises(UserError) as caught:
        accelerate(pipe, attention=attention, channels_last=True)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)
    assert_stock(pipe)
    assert torch.equal(draw(pipe), stock)


def test_a_vae_that_a_kernel_does_not_run_on_is_left_out(pipe, monkeypatch):
    try_backend = kernels.try_backend
    monkeypatch.setattr(
        kernels, "try_backend", lambda *call, **more: "too wide" if 8 in call else try_backend(*call, **more)
    )
    stock = draw(pipe)
    acceleration = accelerate(pipe, **{**OFF, "attention": "_native_math"})
    assert acceleration.skipped == {"vae attention": "_native_math does not run on its heads of 8"}
    assert {type(module.processor) for module in find_attention(pipe.vae)} == {AttnProcessor2_0}
    torch.testing.assert_close(draw(pipe), stock, rtol=0, atol=ROUNDING)
    acceleration.undo()
    assert_stock(pipe)


def test_without_a_network_it_is_one_line():
    class Nothing:
        components = {"scheduler": None}

    with pytest.raises(UserError, match="Nothing: has neither a unet nor a transformer"):
        accelerate(Nothing())


# -- compiled --------------------------------------------------------------------------------------------------


def test_compiled_block_by_block(pipe, caplog):
    """The pictures, no limit of recompilations in sight, the state dict, and the way back."""
    stock, keys = draw(pipe), list(pipe.unet.state_dict())
    acceleration = accelerate(pipe, **{**OFF, "fuse_qkv": True, "compile": {"backend": "eager"}})
    assert acceleration.done["compile"] == "8 blocks, each when it is first called"
    compiled = [m for network in networks(pipe) for m in network.modules() if m._compiled_call_impl is not None]
    assert len(compiled) == 8
    with caplog.at_level(logging.WARNING), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for prompt in ("a cat", "a cat", "two dogs"):
            got = draw(pipe, prompt)
            if prompt == "a cat":
                torch.testing.assert_close(got, stock, rtol=0, atol=ROUNDING)
    messages = [str(w.message) for w in caught] + [record.getMessage() for record in caplog.records]
    assert not [text for text in messages if "recompile" in text]
    assert list(pipe.unet.state_dict()) == keys
    acceleration.undo("compile")
    assert not [m for network in networks(pipe) for m in network.modules() if m._compiled_call_impl is not None]
    acceleration.undo()
    assert_stock(pipe)
    assert torch.equal(draw(pipe), stock)


@pytest.mark.parametrize(("choice", "blocks"), [(True, {}), ({"mode": "max-autotune"}, {"mode": "max-autotune"})])
def test_compiles_arguments_are_passed_on(choice, blocks, pipe, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: calls.append(options))
    accelerate(pipe, **{**OFF, "compile": choice})
    assert calls == [blocks] * 8


def test_auto_does_it_all_on_a_gpu(pipe, monkeypatch):
    """Said to be one: the CPU's networks are changed."""
    calls = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: calls.append(options))
    acceleration, networks = Acceleration(), {name: getattr(pipe, name) for name in ("unet", "vae")}
    speed._channels_last(acceleration, networks, torch.device("cuda"), "auto")
    speed._compile(acceleration, networks, torch.device("cuda"), "auto")
    assert acceleration.done == {"channels_last": "unet, vae", "compile": "8 blocks, each when it is first called"}
    assert acceleration.skipped == {}
    assert not pipe.unet.conv_in.weight.is_contiguous()
    assert calls == [{}] * 8
    acceleration.undo()
    assert_stock(pipe)


# -- a small decoder -------------------------------------------------------------------------------------------


def test_a_small_decoder_stands_in_for_the_vae(pipe, tmp_path):
    stock, latents = draw(pipe), draw(pipe, output_type="latent")
    taesd().save_pretrained(tmp_path / "taesd")
    for decoder in (str(tmp_path / "taesd"), taesd()):
        vae = pipe.vae
        with accelerate(pipe, tiny_vae=decoder, channels_last=True) as acceleration:
            assert isinstance(pipe.vae, AutoencoderTiny)
            assert "tiny_vae" in acceleration.done
            torch.testing.assert_close(draw(pipe, output_type="latent"), latents, rtol=0, atol=1e-5)
            expected = taesd().eval().decode(draw(pipe, output_type="latent")).sample
            torch.testing.assert_close(draw(pipe), (expected / 2 + 0.5).clamp(0, 1), rtol=0, atol=ROUNDING)
            assert vae.decoder.conv_in.weight.is_contiguous()  # the one that stays away is left alone
        assert pipe.vae is vae
        assert_stock(pipe)
        assert torch.equal(draw(pipe), stock)


def test_a_small_decoder_is_saved_as_it_is(pipe, tmp_path):
    accelerate(pipe, tiny_vae=taesd())
    got = draw(pipe)
    pipe.save_pretrained(tmp_path / "saved")
    again = load(tmp_path / "saved")
    assert isinstance(again.vae, AutoencoderTiny)
    torch.testing.assert_close(draw(again), got, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(
    ("decoder", "says"),
    [
        (lambda folder: taesd(channels=16), "it decodes 16 channels by 2, the pipeline's VAE 4 by 2"),
        (lambda folder: taesd(levels=3), "it decodes 4 channels by 4, the pipeline's VAE 4 by 2"),
        (lambda folder: str(folder / "nothing"), "no AutoencoderTiny can be loaded from it"),
        (lambda folder: str(folder / "vae"), "another network's"),  # diffusers would invent them
        (lambda folder: str(folder / "unet"), "another network's"),
    ],
)
def test_a_decoder_that_does_not_fit_is_one_line_and_nothing_is_done(decoder, says, pipe, folder):
    vae = pipe.vae
    with pytest.raises(UserError, match=re.escape(says)) as caught:
        accelerate(pipe, tiny_vae=decoder(folder))
    assert str(caught.value).startswith("tiny_vae")
    assert "\n" not in str(caught.value)
    assert pipe.vae is vae
    assert_stock(pipe)


# -- LoRA ------------------------------------------------------------------------------------------------------


def with_lora(pipe, targets=("to_q", "to_k", "to_v")) -> None:
    torch.manual_seed(0)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=list(targets)))


@pytest.mark.parametrize("targets", [("to_q", "to_k", "to_v"), ("attn1.to_q", "conv1")])
def test_a_live_lora_keeps_its_pictures(targets, pipe, folder, tmp_path):
    """Through the pipeline's own loader."""
    plain, source = draw(pipe), load(folder)
    with_lora(source, targets)
    source.save_lora_weights(tmp_path, get_peft_model_state_dict(source.unet))
    pipe.load_lora_weights(tmp_path)
    stock = draw(pipe)
    assert (stock - plain).abs().max() > 1e-4
    acceleration = accelerate(pipe, **{**OFF, **PARTS["all"]})
    left = [reason for name, reason in acceleration.skipped.items() if name.startswith("unet.")]
    assert len(left) == (8 if targets[0] == "to_q" else 4)
    assert all(reason.startswith("its projections are peft's Linear") for reason in left)
    torch.testing.assert_close(draw(pipe), stock, rtol=0, atol=ROUNDING)
    acceleration.undo()
    assert_stock(pipe)
    assert torch.equal(draw(pipe), stock)


def test_a_lora_loaded_fused_and_unloaded_afterwards_stays_in(pipe, folder):
    """As users do it: peft merges without a trace on the weight, which the fused product must not outlive."""
    other = load(folder)
    for one in (pipe, other):
        accelerate(pipe, **{**OFF, "fuse_qkv": True}) if one is pipe else None
        with_lora(one)
        one.fuse_lora()
        one.unload_lora_weights()
    expected = draw(other)
    torch.testing.assert_close(draw(pipe), expected, rtol=0, atol=ROUNDING)
    with torch.no_grad():
        assert all(fused_projection(module) is not None for module in find_attention(pipe.unet))


def test_where_nothing_can_be_fused_nothing_stays_installed(pipe):
    with_lora(pipe)
    acceleration = accelerate(pipe, **{**OFF, "fuse_qkv": True}, tiny_vae=taesd())
    assert "fuse_qkv" not in acceleration.done
    assert "fuse_qkv" in acceleration.skipped
    acceleration.undo()
    assert_stock(pipe)


# -- negative prompts ------------------------------------------------------------------------------------------


def test_scale_zero_is_the_plain_picture_to_the_bit(pipe):
    stock = draw(pipe)
    negative = NegativePrompts(pipe)
    assert torch.equal(draw(pipe), stock)
    assert torch.equal(draw(pipe, **negative("a dog", scale=0)), stock)
    assert torch.equal(draw(pipe, **negative("a dog", 0.0)), stock)
    torch.testing.assert_close(draw(pipe, **negative("a dog", torch.zeros(1))), stock, rtol=0, atol=ROUNDING)
    steered = draw(pipe, **negative("a dog"))
    assert (steered - stock).abs().max() > 1e-4
    assert torch.equal(draw(pipe, **negative("a dog", 0.2)), steered)  # the default
    assert (draw(pipe, **negative("", 0.5)) - stock).abs().max() > 1e-4  # an empty prompt is not nothing


def test_what_the_network_is_told(pipe):
    """It is told a and the pipeline's own encoding of the prompt, at every step."""
    negative = NegativePrompts(pipe)
    negatives = negative("a dog", 0.7)["cross_attention_kwargs"]
    assert negatives["negative_scale"] == 0.7
    expected = pipe.encode_prompt("a dog", "cpu", 1, False)[0]
    assert torch.equal(negatives["negative_hidden_states"], expected)
    assert negatives["negative_hidden_states"].shape == (1, 16, 8)
    assert not negatives["negative_hidden_states"].requires_grad
    calls = []
    pipe.unet.register_forward_pre_hook(lambda module, args, more: calls.append(more), with_kwargs=True)
    draw(pipe, ["a cat", "a cat"], steps=3, **negative("a dog", 0.7))
    assert len(calls) == 3
    for more in calls:
        assert more["cross_attention_kwargs"]["negative_scale"] == 0.7
        assert torch.equal(more["cross_attention_kwargs"]["negative_hidden_states"], expected)


def test_a_list_is_each_alone(pipe):
    """Prompt by prompt, negative by negative, scale by scale; several pictures a prompt stay in order."""
    negative = NegativePrompts(pipe)
    prompts, away, scales = ["a cat", "two dogs"], ["blurry", "a frame"], torch.tensor([0.3, 0.9])
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    whole = draw(pipe, prompts, latents=latents[:2], **negative(away, scales))
    for i in range(2):
        alone = draw(pipe, prompts[i], latents=latents[i : i + 1], **negative(away[i], float(scales[i])))
        torch.testing.assert_close(whole[i : i + 1], alone, rtol=0, atol=ROUNDING)
    arguments = {"num_images_per_prompt": 2, "latents": latents}
    several = draw(pipe, prompts, **arguments, **negative(away, scales.repeat_interleave(2), images_per_prompt=2))
    for i in range(4):
        one = draw(pipe, prompts[i // 2], latents=latents[i : i + 1], **negative(away[i // 2], float(scales[i // 2])))
        torch.testing.assert_close(several[i : i + 1], one, rtol=0, atol=ROUNDING)
    one_for_all = draw(pipe, prompts, **arguments, **negative("blurry", 0.5, images_per_prompt=2))
    each = draw(pipe, prompts, **arguments, **negative(["blurry"] * 2, 0.5, images_per_prompt=2))
    torch.testing.assert_close(one_for_all, each, rtol=0, atol=ROUNDING)
    with pytest.raises(ValueError, match=r"2 negative prompts for a batch of 4: .*images_per_prompt"):
        draw(pipe, prompts, **arguments, **negative(away, 0.5))


def test_with_guidance_on_one_prompt_steers_both_halves_and_a_list_is_refused(pipe):
    negative = NegativePrompts(pipe)
    plain = draw(pipe, ["a cat", "two dogs"], guidance_scale=3.0)
    steered = draw(pipe, ["a cat", "two dogs"], guidance_scale=3.0, **negative("blurry", 0.5))
    assert (steered - plain).abs().max() > 1e-4
    with pytest.raises(ValueError, match=r"2 negative prompts for a batch of 4: .*with guidance off"):
        draw(pipe, ["a cat", "two dogs"], guidance_scale=3.0, **negative(["blurry", "a frame"], 0.5))


def test_negative_prompts_leave_the_stock_pipeline(pipe, folder, tmp_path):
    stock = draw(pipe)
    before = pipe.unet.attn_processors
    with NegativePrompts(pipe) as negative:
        assert {type(module.processor) for module in find_attention(pipe.unet)} == {AttentionProcessor}
        assert_stock_vae(pipe)
        pipe.save_pretrained(tmp_path / "saved")
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())
    assert torch.equal(draw(pipe), stock)
    again = load(tmp_path / "saved")
    assert_stock(again)
    assert torch.equal(draw(again), stock)
    negative.remove()  # once more is nothing
    assert_stock(pipe)


def assert_stock_vae(pipe) -> None:
    assert {type(module.processor) for module in find_attention(pipe.vae)} == {AttnProcessor2_0}


def test_two_on_one_pipeline_do_not_remove_each_other(pipe):
    first, second = NegativePrompts(pipe), NegativePrompts(pipe)
    steered = draw(pipe, **second("blurry", 0.5))
    first.remove()
    assert torch.equal(draw(pipe, **second("blurry", 0.5)), steered)
    second.remove()
    assert_stock(pipe)


@pytest.mark.parametrize("negative_first", [False, True])
@pytest.mark.parametrize("negative_leaves_first", [False, True])
def test_beside_accelerate_in_any_order(negative_first, negative_leaves_first, pipe):
    stock = draw(pipe)
    with NegativePrompts(pipe) as alone:
        steered = draw(pipe, **alone("blurry", 0.5))
    if negative_first:
        negative = NegativePrompts(pipe)
    acceleration = accelerate(pipe, **{**OFF, **PARTS["all"]})
    if not negative_first:
        negative = NegativePrompts(pipe)
    torch.testing.assert_close(draw(pipe), stock, rtol=0, atol=ROUNDING)
    torch.testing.assert_close(draw(pipe, **negative("blurry", 0.5)), steered, rtol=0, atol=ROUNDING)
    if negative_leaves_first:
        negative.remove()
        torch.testing.assert_close(draw(pipe), stock, rtol=0, atol=ROUNDING)
        acceleration.undo()
    else:
        acceleration.undo()
        assert torch.equal(draw(pipe, **negative("blurry", 0.5)), steered)
        negative.remove()
    assert_stock(pipe)
    assert torch.equal(draw(pipe), stock)


def other_length(pipe, prompt: str, length: int) -> torch.Tensor:
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0][:, :length]


def test_prompts_of_other_lengths(pipe):
    """The call's own embeddings may be shorter than the negative one's."""
    negative = NegativePrompts(pipe)
    text = other_length(pipe, "a cat", 5)
    call = {"prompts": None, "prompt_embeds": text}
    plain = draw(pipe, **call)
    assert torch.equal(draw(pipe, **call, **negative("blurry", 0.0)), plain)
    with accelerate(pipe, **{**OFF, "attention": "_native_flash"}):  # which takes no masks
        flash = draw(pipe, **call, **negative("blurry", 0.5))
    steered = draw(pipe, **call, **negative("blurry", 0.5))
    torch.testing.assert_close(flash, steered, rtol=0, atol=ROUNDING)
    assert (steered - plain).abs().max() > 1e-4


def latent_consistency(pipe) -> LatentConsistencyModelPipeline:
    torch.manual_seed(0)
    unet = UNet2DConditionModel.from_config({**pipe.unet.config, "time_cond_proj_dim": 8}).eval()
    scheduler = LCMScheduler(**tiny.SD_BETAS)
    parts = {**pipe.components, "unet": unet, "scheduler": scheduler}
    return LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)


def xl(pipe) -> StableDiffusionXLPipeline:
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {k: getattr(pipe.text_encoder.config, k) for k in ("vocab_size", "bos_token_id", "eos_token_id")}
    second = CLIPTextModelWithProjection(
        CLIPTextConfig(**sizes, **words, max_position_embeddings=16, projection_dim=8)
    ).eval()
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 + 6 * 8,
        cross_attention_dim=16,
        transformer_layers_per_block=(1, 2),
        norm_num_groups=4,
    ).eval()
    return StableDiffusionXLPipeline(
        vae=pipe.vae,
        text_encoder=text_encoder_of_two_layers(pipe),
        text_encoder_2=second,
        tokenizer=pipe.tokenizer,
        tokenizer_2=pipe.tokenizer,
        unet=unet,
        scheduler=pipe.scheduler,
        add_watermarker=False,
    )


def text_encoder_of_two_layers(pipe):
    """SDXL reads the last hidden state but one."""
    config = pipe.text_encoder.config.to_dict() | {"num_hidden_layers": 2}
    return type(pipe.text_encoder)(CLIPTextConfig(**config)).eval()


@pytest.mark.parametrize("make", [latent_consistency, xl])
def test_other_pipelines_with_a_text(make, pipe):
    pipe = make(pipe)
    pipe.set_progress_bar_config(disable=True)
    call = {"steps": 2, "guidance_scale": 8.5} if make is latent_consistency else {"height": 16, "width": 16}
    stock = draw(pipe, ["a cat", "two dogs"], **call)
    with NegativePrompts(pipe) as negative:
        assert torch.equal(draw(pipe, ["a cat", "two dogs"], **call, **negative("blurry", 0)), stock)
        steered = draw(pipe, ["a cat", "two dogs"], **call, **negative(["blurry", "a frame"], 0.5))
        assert (steered - stock).abs().max() > 1e-4
        with accelerate(pipe, **{**OFF, **PARTS["all"]}):
            again = draw(pipe, ["a cat", "two dogs"], **call, **negative(["blurry", "a frame"], 0.5))
            torch.testing.assert_close(again, steered, rtol=0, atol=ROUNDING)
    assert_stock(pipe)
    assert torch.equal(draw(pipe, ["a cat", "two dogs"], **call), stock)


def test_a_pipeline_without_a_text_is_refused_in_one_line(tmp_path):
    pipe = ConsistencyModelPipeline.from_pretrained(tiny.save_pixels(tmp_path / "pixels"))
    with pytest.raises(UserError, match="ConsistencyModelPipeline: negative prompts need a UNet") as caught:
        NegativePrompts(pipe)
    assert "\n" not in str(caught.value)
    assert_stock(pipe)


def test_foreign_processors_are_refused_and_the_advice_works(pipe):
    pipe.unet.set_attn_processor(AttnProcessor())
    before = pipe.unet.attn_processors
    with pytest.raises(UserError, match=r"unet\.down_blocks.* has a AttnProcessor already") as caught:
        NegativePrompts(pipe)
    assert "\n" not in str(caught.value)
    assert all(pipe.unet.attn_processors[name] is processor for name, processor in before.items())
    (advice,) = re.findall(r"unet\.(\w+)\(AttnProcessor2_0\(\)\)", str(caught.value))
    getattr(pipe.unet, advice)(AttnProcessor2_0())
    NegativePrompts(pipe)


def test_one_foreign_processor_among_stock_ones_is_refused_and_all_stay(pipe):
    pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(AttnProcessor())
    with pytest.raises(UserError, match=r"unet\.mid_block"):
        NegativePrompts(pipe)
    kinds = [type(module.processor) for module in find_attention(pipe.unet)]
    assert sorted(kind.__name__ for kind in kinds) == ["AttnProcessor", *["AttnProcessor2_0"] * 7]


def test_signatures_are_said_in_the_docstrings():
    for name in inspect.signature(accelerate).parameters:
        assert name == "pipe" or f"{name}:" in accelerate.__doc__
