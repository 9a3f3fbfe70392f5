"""Teachers in half precision: every call of a network computes, LoRAs are merged in float32."""

from __future__ import annotations

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import nn

from stepdistill import precision
from stepdistill.data.teacher_pairs import PairRecipe, PairSet, make_pairs
from stepdistill.families import load_family, random_sizes
from stepdistill.roles.lora import LoRA
from stepdistill.roles.roles import Roles
from stepdistill.roles.settings import LoRASettings, RolesSettings

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
CLOSE = 0.03
"""Relative; bfloat16 has eight bits."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("teachers")
    return {
        "unet2d": str(tiny.save_pixels(root / "unet2d", "v", labels=3, null=True)),
        "stable_diffusion": str(tiny.save_stable_diffusion(root / "stable_diffusion")),
    }


def inputs(family):
    x = torch.randn(2, *family.sample_shape, generator=torch.Generator().manual_seed(0))
    items = ["a cat", "a dog"] if family.condition_kind == "prompt" else [0, 2]
    return x, torch.tensor([999, 300]), family.encode_conditions(items)


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference relative to the largest value of ``b``."""
    return ((a - b).abs().max() / b.abs().max()).item()


def test_half_precision_weights_compute_in_bfloat16_and_float32_ones_as_requested():
    rows = [(torch.float32, None, None), (torch.float32, torch.bfloat16, torch.bfloat16), (torch.float64, None, None)]
    rows += [(dtype, requested, torch.bfloat16) for dtype in HALF.values() for requested in (None, torch.bfloat16)]
    for dtype, requested, expected in rows:
        assert precision.autocast_dtype(nn.Linear(2, 2).to(dtype), requested) == expected
    mixed = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2).to(torch.float16))
    assert precision.autocast_dtype(mixed) == torch.bfloat16


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", ["unet2d", "stable_diffusion"])
def test_a_teacher_in_half_precision_says_what_the_float32_one_says(folders, name, dtype):
    family, exact = load_family(folders[name], dtype=HALF[dtype]), load_family(folders[name])
    assert family.network.conv_in.weight.dtype == HALF[dtype]
    with torch.no_grad():
        expected = exact.denoiser()(*inputs(exact)).x0
        for weights in ("full", "shared", "mixed"):
            roles = Roles(load_family(folders[name], dtype=HALF[dtype]), RolesSettings(weights=weights))
            for role in (roles.teacher, roles.student, roles.fake_score):
                prediction = role(*inputs(family)).x0
                assert prediction.dtype == torch.float32
                assert far(prediction, expected) < CLOSE
        assert far(family.denoiser()(*inputs(family)).x0, expected) < CLOSE
        samples = torch.randn(2, *family.sample_shape, generator=torch.Generator().manual_seed(1))
        assert far(family.decode(samples), exact.decode(samples)) < CLOSE
        pixels = exact.decode(samples)
        assert far(family.encode_images(pixels), exact.encode_images(pixels)) < CLOSE


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("weights", ["full", "shared", "mixed"])
def test_gradients_of_a_half_precision_teachers_student_are_finite_and_float32(folders, weights, dtype):
    family = load_family(folders["stable_diffusion"], dtype=HALF[dtype])
    student = Roles(family, RolesSettings(weights=weights), torch.bfloat16, gradient_checkpointing=True).student
    student(*inputs(family)).x0.square().mean().backward()
    gradients = [p.grad for p in student.parameters().values() if p.grad is not None]
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients)
    assert sum(gradient.abs().sum() for gradient in gradients) > 0


# -- pairs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALF)
def test_pairs_of_a_half_precision_teacher_are_those_of_the_float32_one(folders, tmp_path, dtype):
    prompts, pairs = ["a cat", "a dog"], []
    for index, (family, requested) in enumerate(
        [
            (load_family(folders["stable_diffusion"], dtype=HALF[dtype]), torch.bfloat16),
            (load_family(folders["stable_diffusion"]), torch.bfloat16),
            (load_family(folders["stable_diffusion"]), None),
        ]
    ):
        recipe = PairRecipe(4, 4, steps=3, guidance_scale=1.5, seed=0)
        make_pairs(family, prompts, recipe, tmp_path / str(index), batch=4, autocast_dtype=requested)
        pairs.append(PairSet(tmp_path / str(index), family, prompts, recipe))
    half, bf16, exact = pairs
    assert torch.equal(half.noise, exact.noise)
    assert far(half.x0, exact.x0) < 2 * CLOSE
    assert 0 < far(bf16.x0, exact.x0) < 2 * CLOSE  # the run's precision is that of its pairs
    assert load_file(tmp_path / "0/pairs-00000.safetensors")["x0"].dtype == torch.float32


# -- merging -----------------------------------------------------------------------------------------------


def stirred(role, seed: int = 3, scale: float = 1e-2) -> None:
    """Give the adapter of ``role`` a delta of the size that a few updates make."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in role.parameters().values():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


@pytest.mark.parametrize("dtype", ["float32", *HALF])
@pytest.mark.parametrize("name", ["unet2d", "stable_diffusion"])
def test_a_merged_lora_is_the_float32_sum(folders, name, dtype):
    family = load_family(folders[name], dtype=getattr(torch, dtype))
    base = {key: value.float() for key, value in family.network.state_dict().items()}
    student = Roles(family, RolesSettings(weights="shared", lora=LoRASettings(rank=4, alpha=6.0))).student
    stirred(student)
    merged, layers = student.plain_state_dict(), 0
    assert merged.keys() == base.keys()
    for path, module in student.network.named_modules():
        if "student" not in getattr(module, "lora_A", ()):
            continue
        layers += 1
        down, up = (part["student"].weight.double() for part in (module.lora_A, module.lora_B))
        delta = 6 / 4 * torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1))
        exact = base[f"{path}.weight"].double().flatten(1) + delta
        value = merged.pop(f"{path}.weight")
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double().flatten(1), exact, rtol=0, atol=1e-6)
    assert layers > 10
    assert all(torch.equal(value.float(), base[key]) for key, value in merged.items())


def test_a_lora_on_a_lora_is_merged_in_float32_too(folders, tmp_path):
    """``lora_under`` below a new adapter, on a bfloat16 base, one of them counted half."""
    family = load_family(folders["stable_diffusion"], dtype=torch.bfloat16)
    base = {key: value.float() for key, value in family.network.state_dict().items()}
    first = Roles(family, RolesSettings(weights="shared", lora=LoRASettings(rank=2))).student
    stirred(first)
    first.switch.lora("student").save(tmp_path, "unet")
    again = load_family(folders["stable_diffusion"], dtype=torch.bfloat16)
    settings = RolesSettings(weights="shared", lora=LoRASettings(rank=4), lora_under=str(tmp_path))
    second = Roles(again, settings).student
    stirred(second, seed=5)
    below, above = first.switch.lora("student"), LoRA(4, 4.0, second.switch.scaled_loras("student")[1][0].factors)
    with second.switch.scaled("student", 0.5):
        merged = second.plain_state_dict()
    for path in below.factors:
        expected = base[f"{path}.weight"] + below.delta(path) + 0.5 * above.delta(path)
        torch.testing.assert_close(merged[f"{path}.weight"], expected, rtol=0, atol=1e-6)


def test_the_second_base_of_a_student_on_another_model_is_not_rounded(folders, tmp_path):
    """``student_from`` under a bfloat16 teacher: the earlier student's weights are exactly what they were."""
    exact = load_family(folders["unet2d"])
    with torch.no_grad():
        for parameter in exact.network.parameters():
            parameter.add_(1e-4)
    exact.pipeline(exact.network, exact.scheduler).save_pretrained(tmp_path / "earlier")
    family = load_family(folders["unet2d"], dtype=torch.bfloat16)
    settings = RolesSettings(weights="shared", lora=LoRASettings(rank=2), student_from=str(tmp_path / "earlier"))
    merged = Roles(family, settings).student.plain_state_dict()
    expected = exact.network.state_dict()
    for key in merged.keys() - {"class_embedding.weight"}:  # the null label's row is the teacher's
        torch.testing.assert_close(merged[key], expected[key], rtol=0, atol=1e-7)


# -- benchmarks --------------------------------------------------------------------------------------------


def test_a_teacher_of_random_weights_has_the_configs_dtype(monkeypatch):
    small = {"block_out_channels": (32, 32), "cross_attention_dim": 8, "sample_size": 8, "layers_per_block": 1}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    monkeypatch.setitem(random_sizes.PIPELINE_SIZES, "tiny", small | blocks)
    monkeypatch.setitem(random_sizes.TEXT_ENCODERS, "tiny", [(8, 1, 2)])
    monkeypatch.setitem(random_sizes.VAE_CHANNELS, "tiny", (32, 32, 32, 32))
    family = random_sizes.random_family("tiny", torch.float16)
    dtypes = {name: next(network.parameters()).dtype for name, network in family.networks().items()}
    assert dtypes == dict.fromkeys(("unet", "vae", "text_encoder"), torch.float16)
    with torch.no_grad():
        condition = family.encode_conditions(["a cat"])
        assert family.denoiser()(torch.randn(1, 4, 8, 8), torch.tensor([5]), condition).output.isfinite().all()
