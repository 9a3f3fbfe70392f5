"""Diffusers folders: nothing that they name is imported or built before it is looked at, and all of it is there."""

from __future__ import annotations

import json
import shutil
import sys
import time

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from stepdistill.errors import UserError
from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.families import load_family
from stepdistill.pipelines import merge_students

WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    tiny.save_stable_diffusion(folder / "text")
    tiny.save_pixels(folder / "label", labels=3)
    return folder


@pytest.fixture
def text(good, tmp_path):
    return shutil.copytree(good / "text", tmp_path / "text")


def assert_refused(folder, *says) -> str:
    """All readers of pipelines refuse the folder in one line with these parts; gives the first one's."""
    messages = []
    for read in (load_family, StockPipeline.load, lambda path: merge_students(path, path, 0.5, folder / "merged")):
        with pytest.raises(UserError) as caught:
            read(str(folder))
        messages.append(str(caught.value))
        for part in says:
            assert part in messages[-1]
        assert "\n" not in messages[-1]
        assert len(messages[-1]) < 600
    return messages[0]


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def edit_weights(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def test_good_folders_load(good):
    for name in ("text", "label"):
        family, stock = load_family(str(good / name)), StockPipeline.load(good / name)
        expected = load_file(good / name / "unet" / WEIGHTS["unet"])
        for network in (family.network, stock.first.unet):
            state = network.state_dict()
            assert state.keys() == expected.keys()
            assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_no_module_that_an_index_names_is_imported(text, tmp_path, monkeypatch):
    code = tmp_path / "code"
    code.mkdir()
    (code / "looks_harmless.py").write_text("from pathlib import Path\nPath(__file__).with_name('ran').touch()\n")
    monkeypatch.syspath_prepend(code)
    edit_json(text / "model_index.json", unet=["looks_harmless", "UNet2DConditionModel"])
    assert_refused(
        text, "unet is of the library looks_harmless", "only classes of diffusers and transformers are loaded"
    )
    assert "looks_harmless" not in sys.modules
    assert not (code / "ran").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"_class_name": None}, "names no pipeline class"),
        ({"_class_name": ["pipeline", "Mine"]}, "names no pipeline class"),
        ({"unet": ["diffusers"]}, "unet = ['diffusers'] is not a library and a class"),
        ({"unet": [3, 4]}, "unet = [3, 4] is not a library"),
        ({"unet": ["diffusers.models", "UNet2DModel"]}, "is not a library and a class"),
        ({"../x": ["diffusers", "UNet2DModel"]}, "../x = ['diffusers', 'UNet2DModel'] is not a library"),
        ({"unet": ["transformers", "Nothing"]}, ""),
    ],
)
def test_an_index_of_other_things_is_refused(text, changes, says):
    edit_json(text / "model_index.json", **changes)
    assert_refused(text, says)


@pytest.mark.parametrize("content", ["", "[]", "3", '"a"', "{", "[" * 100_000, "\udc80", '{"a": ' + "9" * 5000 + "}"])
def test_an_index_of_another_type_is_refused(text, content):
    (text / "model_index.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    assert_refused(text, "model_index.json")


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_tensor_that_is_missing_is_named(text, part):
    name = min(load_file(text / part / WEIGHTS[part]))
    edit_weights(text / part / WEIGHTS[part], lambda tensors: tensors.pop(name))
    assert_refused(text, f"its {part} has no weights ", name.removeprefix("text_model."))


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_tensor_of_another_shape_is_named(text, part):
    name = min(load_file(text / part / WEIGHTS[part]))
    edit_weights(text / part / WEIGHTS[part], lambda tensors: tensors.update({name: torch.zeros(3, 3)}))
    assert_refused(text, name.removeprefix("text_model."))


@pytest.mark.parametrize("part", WEIGHTS)
def test_a_tensor_too_many_is_named(text, part):
    edit_weights(text / part / WEIGHTS[part], lambda tensors: tensors.update(odd=torch.zeros(3)))
    assert_refused(text, f"its {part} has weights that its config does not know, odd")


def test_weights_that_older_versions_wrote_are_passed_over(text):
    """Stable Diffusion 1.5's text encoder holds its positions."""
    file = text / "text_encoder" / WEIGHTS["text_encoder"]
    expected = load_family(str(text)).encode_conditions(["a cat"])["text"]
    edit_weights(file, lambda t: t.update({"text_model.embeddings.position_ids": torch.arange(16)[None]}))
    assert torch.equal(load_family(str(text)).encode_conditions(["a cat"])["text"], expected)


@pytest.mark.parametrize(
    ("file", "changes", "says"),
    [
        ("unet/config.json", {"layers_per_block": 10**6}, "layers_per_block = 1000000"),
        ("unet/config.json", {"layers_per_block": [1, 10**9]}, "layers_per_block = 1000000000"),
        ("unet/config.json", {"cross_attention_dim": 10**12}, "cross_attention_dim = 1000000000000"),
        ("unet/config.json", {"block_out_channels": [8] * 5000}, "block_out_channels with 5,000 entries"),
        ("text_encoder/config.json", {"num_hidden_layers": 10**7}, "num_hidden_layers = 10000000"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**10}, "num_train_timesteps = 10000000000"),
    ],
)
def test_sizes_that_no_network_has_are_refused_at_once(text, file, changes, says):
    edit_json(text / file, **changes)
    started = time.monotonic()
    assert_refused(text, file.rpartition("/")[2], says, "is more than any network has")
    assert time.monotonic() - started < 5


@pytest.mark.parametrize("changes", [{"sample_size": "wide"}, {"act_fn": "nothing"}, {"down_block_types": 3}])
def test_a_config_that_builds_nothing_is_one_line(text, changes):
    edit_json(text / "unet" / "config.json", **changes)
    with pytest.raises(UserError, match=r"^teacher .*/text"):
        load_family(str(text))


def test_a_teacher_that_cannot_be_called_is_one_line(text):
    edit_json(text / "vae" / "config.json", scaling_factor="large")
    with pytest.raises(UserError, match=r"^teacher .*/text: cannot be called .*; look at the configs of its parts"):
        load_family(str(text))
