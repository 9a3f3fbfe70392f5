"""Protocols by name: what they are, what they need, what is said of changes, and one run through whole."""

import json
import sys
import types

import numpy as np
import pytest
import torch
from console import stepdistill
from PIL import Image

from stepdistill.errors import UserError
from stepdistill.eval.extractors import inception
from stepdistill.eval.extractors.small import FeatureNetwork
from stepdistill.eval.measure.presets import PRESETS, make_protocol
from stepdistill.eval.measure.settings import Protocol
from stepdistill.eval.run_evaluation import MeasuredRun
from stepdistill.judges.clip import ClipScorer
from stepdistill.trainers.plans.resolve import read_job


@pytest.fixture
def files(tmp_path, monkeypatch):
    """What the presets want on the machine, as empty files; by setting."""
    monkeypatch.setattr(inception, "default_location", lambda: tmp_path / "inception.pt")
    for name in ("inception.pt", "stats.npz", "captions.txt", "clip.bin"):
        (tmp_path / name).touch()
    return {
        "reference": str(tmp_path / "stats.npz"),
        "prompts": str(tmp_path / "captions.txt"),
        "clip": {"pretrained": str(tmp_path / "clip.bin")},
    }


def test_coco30k_is_dmd2s(files):
    settings = make_protocol("coco30k", files, [])
    assert settings.preset == "coco30k"
    assert (settings.samples, settings.drawn_side, settings.resize, settings.clip_resize) == (30000, 512, 256, 256)
    assert (settings.extractor, settings.quantise, settings.distinct_prompts) == ("inception", "floor", True)
    assert (settings.clip.model, settings.clip.prefix, settings.clip.hub) == ("ViT-g-14", "A photo depicts ", False)
    larger = make_protocol("coco10k-sdxl", files, [])
    assert (larger.samples, larger.drawn_side, larger.resize, larger.clip_resize) == (10000, 1024, 512, 256)


@pytest.mark.parametrize(("name", "side"), [("imagenet64", 64), ("cifar10", 32)])
def test_edms_are_fifty_thousand_with_labels_in_turn(files, name, side):
    settings = make_protocol(name, {"reference": files["reference"]}, [])
    assert (settings.samples, settings.drawn_side, settings.labels) == (50000, side, "uniform")
    assert (settings.extractor, settings.resize, settings.clip) == ("inception_tensorflow", None, None)


def test_fashion_mnist_is_what_the_quickstart_does():
    job = read_job("configs/quickstart.yaml")
    run = MeasuredRun.from_config(job.config, job.method.make_record(job.config))
    protocol = run.make_protocol(job.config.evaluation.samples)
    preset = make_protocol("fashion_mnist", {}, [])
    differing = {key for key in Protocol.model_fields if getattr(protocol, key) != getattr(preset, key)}
    assert differing == {"preset", "extractor", "reference"}  # the same files by other names
    assert protocol.extractor == "asset:fashion_mnist/features.safetensors"


def test_what_is_not_there_is_named_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(inception, "default_location", lambda: tmp_path / "inception.pt")
    with pytest.raises(UserError) as error:
        make_protocol("coco30k", {"prompts": str(tmp_path / "none.txt")}, [])
    message = str(error.value)
    assert "\n" not in message
    for words in (
        f"Inception's weights {tmp_path / 'inception.pt'} (download {inception.URL}",
        "--reference: the folder of COCO's val2014",
        f"--prompts {tmp_path / 'none.txt'}: no such file",
        "--clip-weights: open_clip_pytorch_model.bin of laion/CLIP-ViT-g-14-laion2B-s12B-b42K",
    ):
        assert words in message
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(UserError, match=r"imagenet64 needs .*EDM's imagenet-64x64\.npz"):
        make_protocol("imagenet64", {}, [])
    with pytest.raises(UserError, match="use one of coco30k: zero-shot COCO-30k"):
        make_protocol("coco", {}, [])


def test_a_change_of_protocol_is_said_and_others_are_not(files):
    free = ["seeds=3", "precision_recall=true", "diversity=true", "latency=true", "kid=true"]
    assert make_protocol("coco30k", files, free).preset == "coco30k"
    assert make_protocol("coco30k", {**files, "extractor": f"inception:{files['reference']}"}, []).preset == "coco30k"
    changed = make_protocol("coco30k", {**files, "samples": 5000, "seed": 1}, ["clip.prefix=''"])
    assert changed.preset == (
        "coco30k, but clip.prefix ('A photo depicts ' in the preset, '' here), samples (30000 in the preset, "
        "5000 here), seed (10 in the preset, 1 here)"
    )
    assert make_protocol("imagenet64", {"reference": files["reference"]}, ["resize=32"]).preset.startswith(
        "imagenet64, but"
    )
    with pytest.raises(UserError, match="preset coco30k: unknown key 'sample'"):
        make_protocol("coco30k", files, ["sample=3"])


def test_presets_do_not_change():
    with pytest.raises(ValueError, match="frozen"):
        PRESETS["coco30k"].title = "another"
    for name, preset in PRESETS.items():  # every preset's settings are settings
        raw = preset.settings | ({"clip": {**preset.settings["clip"], "pretrained": "f"}} if preset.clip else {})
        assert Protocol.model_validate(raw).samples >= 5000, name
        assert (preset.prompts is None) == (not preset.settings.get("distinct_prompts", False))


class ByBrightness(torch.nn.Module):
    """A text-image model for the test: a picture is (its mean, 1), a text (its length, 1)."""

    def encode_image(self, images):
        return torch.stack([images.mean((1, 2, 3)), torch.ones(len(images))], 1)

    def encode_text(self, tokens):
        return torch.stack([tokens[:, 0].float(), torch.ones(len(tokens))], 1)


@pytest.fixture
def coco(tmp_path, monkeypatch):
    """The command's arguments for coco30k at toy size, and the sizes and texts that the CLIP model was given."""
    seen = {"sizes": set(), "texts": []}

    def transform(image):
        seen["sizes"].add(image.size)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    def tokenizer(texts):
        seen["texts"] += texts
        return torch.tensor([[len(text)] for text in texts])

    module = types.ModuleType("toy_clip")
    module.scorer = lambda: ClipScorer(ByBrightness(), transform, tokenizer, "toy", prefix="A photo depicts ")
    monkeypatch.setitem(sys.modules, "toy_clip", module)
    torch.manual_seed(0)
    network = FeatureNetwork(3, num_features=4, width=8, name="rgb").save(tmp_path / "rgb.safetensors")
    generator = np.random.default_rng(0)
    (tmp_path / "val2014").mkdir()
    for i in range(8):
        array = generator.integers(0, 256, (30, 40 + i, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / "val2014" / f"{i}.jpg")
    (tmp_path / "captions.txt").write_text("".join(f"thing {'x' * i}\n" for i in range(7)))
    small = {"drawn_side": 16, "resize": 20, "clip_resize": 24, "batch_size": 4}
    return seen, [
        *("--preset", "coco30k", "--samples", 6, "--extractor", network, "--reference", tmp_path / "val2014"),
        *("--prompts", tmp_path / "captions.txt", "--clip-model", "toy_clip:scorer"),
        *(word for key, value in small.items() for word in ("--set", f"{key}={value}")),
    ]


def test_coco_runs_through_at_toy_size(tmp_path, coco, stable_diffusion_folder):
    seen, arguments = coco
    output = tmp_path / "numbers" / "x.json"
    result = stepdistill("evaluate", f"sd={stable_diffusion_folder}@1", *arguments, "--output", output)
    assert result.code == 0, result.err
    assert seen["sizes"] == {(24, 24)}
    assert seen["texts"] == [f"A photo depicts thing {'x' * i}".strip() for i in range(6)]
    content = json.loads(output.read_text())
    line = content["protocol"]["line"]
    assert line in result.out
    for words in (
        "preset coco30k, but ",
        "samples (30000 in the preset, 6 here)",
        "frechet[rgb]: extractor rgb ",
        "n 6, 4 at a time",
        "crop centre, to the shorter side",
        "resize PIL lanczos to 20x20, the extractor's none",
        "pixels cut to bytes, not rounded",
        "reference val2014 ",
        ", 8 pictures",
        "CLIP toy, picture PIL lanczos to 24x24",
        "seed 10",
    ):
        assert words in line
    (row,) = content["rows"]
    assert -1 <= row["clip_score"] <= 1
    assert (row["kid_mean"], row["passes_per_image"]) == (None, 2)
    assert sorted(p.name.partition("-")[0] for p in output.parent.iterdir()) == ["reference", "x.json"]


def test_coco_wants_its_sizes_and_as_many_prompts_as_pictures(tmp_path, coco, stable_diffusion_folder):
    _, arguments = coco
    command = ["evaluate", f"sd={stable_diffusion_folder}@1", *arguments, "--output", tmp_path / "x.json"]
    result = stepdistill(*command, "--set", "drawn_side=512")
    assert result.code == 2
    assert "draws 16x16 pictures, and this protocol is of 512x512" in result.err
    result = stepdistill(*command, "--set", "samples=8")
    assert "has 7 prompts, this protocol draws 8 pictures" in result.err
    assert not (tmp_path / "x.json").exists()


def test_a_run_has_its_own_protocol(tmp_path):
    (tmp_path / "config.yaml").touch()
    for option in (["--preset", "fashion_mnist"], ["--seeds", 2], ["--diversity"], ["--set", "samples=3"]):
        result = stepdistill("evaluate", tmp_path, *option)
        assert result.code == 2
        assert f"name {tmp_path}/student" in result.error
