"""The parts that families are made of: conditions of one length, latents of any rank and scale, calls of pipelines."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import tiny
import torch
from diffusers import AutoencoderKL, ConsistencyModelPipeline, DiffusionPipeline
from torch import nn

from stepdistill.errors import UserError
from stepdistill.families import FAMILIES, calls_of, claiming_family, family_of, latents, load_family
from stepdistill.families.calls import StockCalls
from stepdistill.families.condition_encoders import Labels, NoConditions
from stepdistill.families.latents import Pixels, VAELatents
from stepdistill.families.unet2d import UNet2DCalls
from stepdistill.stock.loading import read_index

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    return {
        "unet2d": tiny.save_pixels(root / "unet2d", "v", labels=3, null=True),
        "stable_diffusion": tiny.save_stable_diffusion(root / "stable_diffusion"),
    }


# -- folders -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unet2d", "stable_diffusion"])
def test_each_folder_is_claimed_by_one_family(folders, name):
    index = read_index(folders[name], "a folder")
    assert [family.name for family in FAMILIES if family.claims(index)] == [name]
    assert claiming_family(index).name == name


def test_a_pipeline_that_no_family_knows_is_claimed_by_none():
    index = {"_class_name": "DiTPipeline", "transformer": ["diffusers", "DiTTransformer2DModel"]}
    assert claiming_family(index) is None
    with pytest.raises(UserError, match="supported are pipelines around UNet2DModel or UNet2DConditionModel"):
        family_of(index, "X")


@pytest.mark.parametrize("name", ["unet2d", "stable_diffusion"])
def test_a_teachers_networks_are_named_as_their_folders(folders, name):
    family = load_family(str(folders[name]))
    assert family.networks()[family.component] is family.network
    assert all((folders[name] / part).is_dir() for part in family.networks())


# -- conditions --------------------------------------------------------------------------------------------


def test_labels_are_all_but_the_null_one():
    assert Labels(4, 0).labels == (1, 2, 3)
    assert Labels(4, None).labels == (0, 1, 2, 3)
    assert Labels(4, 2).null(3, CPU)["label"].tolist() == [2, 2, 2]
    assert Labels(4, None).encode([3, 1], CPU)["label"].tolist() == [3, 1]
    with pytest.raises(UserError, match="no null label"):
        Labels(4, None).null(1, CPU)


def test_a_teacher_without_conditions_has_no_null_one():
    assert NoConditions().encode([], CPU) == {}
    with pytest.raises(UserError, match="cannot be guided"):
        NoConditions().null(1, CPU)


def test_prompts_of_any_length_have_one_shape_and_the_null_one_is_the_empty_prompt(folders):
    family = load_family(str(folders["stable_diffusion"]))
    text = family.encode_conditions(["a", "a" * 100, ""])["text"]
    assert text.shape == (3, 16, 8)
    torch.testing.assert_close(family.null_condition(2)["text"], text[2:].expand(2, -1, -1))
    assert family.prompts_cut(["a", "a" * 100, ""]) == [1]


# -- latents -----------------------------------------------------------------------------------------------


def vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=16,
        scaling_factor=0.5,
    ).eval()


PER_CHANNEL = [0.5, 1.0, 2.0, 4.0], [0.1, -0.2, 0.0, 0.3]


@pytest.mark.parametrize(("scale", "shift"), [(None, 0.0), (1.5, 0.1), PER_CHANNEL])
@torch.no_grad()
def test_latents_are_shifted_and_scaled_and_decoding_undoes_it(scale, shift):
    network, pixels = vae(), torch.rand(3, 3, 16, 16) * 2 - 1
    part = VAELatents(network, (3, 16, 16), scale, shift)
    law = network.encode(pixels).latent_dist
    factor = torch.as_tensor(0.5 if scale is None else scale).reshape(-1, 1, 1)
    offset = torch.as_tensor(shift).reshape(-1, 1, 1)
    mean, std = part.posterior(pixels)
    torch.testing.assert_close(mean, (law.mean - offset) * factor)
    torch.testing.assert_close(std, law.std * factor)
    torch.testing.assert_close(part.decoder()(mean), network.decode(law.mean).sample)


def test_latents_per_channel_are_of_any_rank():
    video = torch.ones(2, 4, 5, 3, 3)
    assert latents._per_channel([1.0, 2.0, 3.0, 4.0], video).shape == (1, 4, 1, 1, 1)


@torch.no_grad()
def test_pictures_are_decoded_and_encoded_a_few_at_once(monkeypatch):
    """The same pictures, and never more pixels in one call than may be."""
    network = vae()
    part = VAELatents(network, (3, 16, 16))
    samples, pixels = torch.randn(5, 4, 8, 8), torch.rand(5, 3, 16, 16)
    decoded, encoded = part.decode(samples), part.encode(pixels)
    counts = []
    monkeypatch.setattr(latents, "PIXELS_AT_ONCE", 2 * 16 * 16)
    for name in ("decode", "encode"):
        method = getattr(network, name)
        monkeypatch.setattr(network, name, lambda x, method=method: counts.append(len(x)) or method(x))
    torch.testing.assert_close(part.decode(samples), decoded, rtol=0, atol=1e-5)
    torch.testing.assert_close(part.encode(pixels), encoded, rtol=0, atol=1e-5)
    assert counts == [2, 2, 1] * 2


def test_pixels_are_what_is_denoised():
    part, samples = Pixels((3, 4, 4)), torch.randn(2, 3, 4, 4)
    assert part.encode(samples) is samples
    assert torch.equal(part.decode(3 * samples), (3 * samples).clamp(-1, 1))
    assert part.networks() == {}
    with pytest.raises(UserError, match="no VAE"):
        part.posterior(samples)
    with pytest.raises(UserError, match="pixels already"):
        part.decoder("taesd")


# -- features ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unet2d", "stable_diffusion"])
@torch.no_grad()
def test_features_are_the_blocks_outputs_in_a_whole_forward(folders, name):
    family = load_family(str(folders[name]))
    x, time = torch.randn(2, *family.sample_shape), torch.tensor([3, 500])
    condition = family.encode_conditions([1, 2] if name == "unet2d" else ["a", "b"])
    outputs = {}

    def keep(module, _inputs, output):
        outputs[module] = output[0] if isinstance(output, tuple) else output

    blocks = family.feature_blocks(family.network)
    handles = [block.register_forward_hook(keep) for block in blocks]
    family.forward(family.network, x, time, condition)
    for handle in handles:
        handle.remove()
    every = family.features(family.network, x, time, condition, every=True)
    (last,) = family.features(family.network, x, time, condition, every=False)
    assert all(torch.equal(feature, outputs[block]) for feature, block in zip(every, blocks, strict=True))
    assert torch.equal(last, outputs[family.network.mid_block])
    assert not any(module._forward_hooks for module in family.network.modules())


# -- calls -------------------------------------------------------------------------------------------------


class Prompted:
    """A pipeline of a class that no family knows."""

    def __init__(self, **parts):
        self.components = parts
        self.transformer = parts.get("transformer")

    def __call__(self, prompt, latents=None, num_inference_steps=50, output_type="pil"):
        raise NotImplementedError


def test_a_pipeline_that_no_family_knows_is_called_by_its_signature():
    network = nn.Identity()
    network.config = {"in_channels": 4, "sample_size": [2, 3]}
    calls = calls_of(Prompted(transformer=network, text_encoder_2="encoder", text_encoder=None))
    assert type(calls) is StockCalls
    assert (calls.component, calls.network, calls.condition_kind) == ("transformer", network, "prompt")
    assert (calls.noise_shape, calls.labels(None), calls.vae, calls.text_encoders) == ((4, 2, 3), [], None, ["encoder"])
    noise = torch.zeros(2, 4, 2, 3)
    arguments = calls.arguments(["a", "b"], noise, 3, torch.Generator(), guidance_scale=2.0, eta=None)
    assert arguments == {"prompt": ["a", "b"], "latents": noise, "num_inference_steps": 3, "output_type": "pt"}
    assert calls.example() == {"prompt": "a photo of a cat"}
    with pytest.raises(UserError, match="Prompted: has neither a unet nor a transformer"):
        calls_of(Prompted()).network.train()


def test_the_families_pipelines_say_how_they_are_called(folders):
    calls = calls_of(DiffusionPipeline.from_pretrained(folders["unet2d"]))
    assert isinstance(calls, UNet2DCalls)
    assert (calls.condition_kind, calls.null_label, calls.labels(3), calls.noise_shape) == (
        "label",
        3,
        [0, 1, 2],
        (1, 8, 8),
    )
    assert calls.example() == {"class_labels": [0]}
    assert "Label 3 stands for no class" in calls.notes()[0]
    text = calls_of(DiffusionPipeline.from_pretrained(folders["stable_diffusion"]))
    assert (text.condition_kind, text.labels(None), text.example()) == ("prompt", [], {"prompt": "a photo of a cat"})
    assert text.shared_parts == ("text_encoder", "tokenizer", "vae")


def test_an_unconditional_pipeline_is_called_by_a_number_of_pictures():
    calls = calls_of(ConsistencyModelPipeline(tiny.unet(), tiny.scheduler("v")))
    assert (calls.condition_kind, calls.labels(None), calls.example()) == ("none", [], {"batch_size": 1})
    assert calls.arguments(None, torch.zeros(2, 1, 8, 8), 1)["batch_size"] == 2
    assert calls.notes() == []


def test_a_network_without_a_size_has_no_noise():
    with pytest.raises(UserError, match="no sample_size or in_channels"):
        StockCalls.noise_shape_of(SimpleNamespace(get={"in_channels": 3}.get))
