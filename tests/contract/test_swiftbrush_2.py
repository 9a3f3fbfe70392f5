"""SwiftBrush version 2 as a user runs it: A in full, B as LoRA with the CLIP loss, from a one-step model; merged."""

import json
import sys

import pytest
import tiny
import torch
import yaml
from console import stepdistill
from diffusers import AutoencoderTiny, DiffusionPipeline

from stepdistill.judges.clip import ClipScorer


class Brightness(torch.nn.Module):
    def encode_image(self, images):
        return torch.stack([images.mean((1, 2, 3)), torch.ones(len(images))], 1)

    def encode_text(self, tokens):
        return tokens


def scorer():
    light = torch.tensor([1.0, 0.1])
    return ClipScorer(Brightness(), None, lambda texts: light.expand(len(texts), 2), "brightness", size=(8, 8))


@pytest.fixture
def folder(tmp_path):
    sys.modules["brightness_clip"] = type(sys)("brightness_clip")
    sys.modules["brightness_clip"].scorer = scorer
    tiny.save_stable_diffusion(tmp_path / "teacher")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    torch.manual_seed(1)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
        scaling_factor=1.0,
    ).save_pretrained(tmp_path / "taesd")
    raw = {
        "method": "swiftbrush",
        "output": str(tmp_path / "start"),
        "teacher": {"path": str(tmp_path / "teacher")},
        "data": {"prompts": str(tmp_path / "prompts.txt")},
        "roles": {"lora": {"rank": 2}},
        "optimizer": {"student": {"lr": 1e-2}, "fake_score": {"lr": 1e-2}},
        "train": {"updates": 3, "batch_size": 2, "log_every": 1, "sample_count": 2, "trackers": []},
        "evaluation": {"enabled": False},
    }
    (tmp_path / "start.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path


def test_from_a_one_step_model_to_a_merged_student(folder):
    assert stepdistill("distill", folder / "start.yaml").code == 0
    shared = [folder / "start.yaml", f"roles.student_from={folder}/start/student"]
    full = stepdistill("distill", *shared, f"output={folder}/full")
    assert full.code == 0, full.err[-2000:]
    clip = f"{{model: 'brightness_clip:scorer', tau: 1.0, decoder: {folder}/taesd}}"
    settings = ["roles.weights=shared", "roles.student_lora={rank: 4, alpha: 8}", f"swiftbrush.clip={clip}"]
    lora = stepdistill("distill", *shared, *settings, f"output={folder}/lora")
    assert lora.code == 0, lora.err[-2000:]
    rows = [json.loads(line) for line in (folder / "lora/metrics.jsonl").read_text().splitlines()]
    assert all(row["loss/clip"] > 0 and row["sample_grad/clip"] > 0 for row in rows)
    assert (folder / "lora/student/lora/pytorch_lora_weights.safetensors").is_file()

    merged = stepdistill("merge", folder / "full/student", folder / "lora/student", "--output", folder / "merged")
    assert merged.code == 0, merged.err
    a, b, m = (
        DiffusionPipeline.from_pretrained(folder / name).unet.state_dict()
        for name in ("full/student", "lora/student", "merged")
    )
    assert any(not torch.equal(a[k], b[k]) for k in a)
    for key, value in m.items():
        torch.testing.assert_close(value, 0.5 * (a[key] + b[key]))


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("swiftbrush.clip={model: 'brightness_clip:scorer', decoder: nowhere}", "no AutoencoderTiny can be loaded"),
        ("swiftbrush.clip={model: ViT-B-32, pretrained: nowhere.pt}", "nowhere.pt of ViT-B-32 is missing"),
        ("roles.student_from=nowhere", "its unet cannot be loaded"),
        ("roles.student_lora={rank: 2}", "student_lora needs a LoRA student"),
    ],
)
def test_what_is_missing_is_one_line_and_nothing_is_written(folder, override, says):
    result = stepdistill("distill", folder / "start.yaml", override, f"output={folder}/run")
    assert result.code == 2
    assert says in result.error
    assert not (folder / "run").exists()
