"""HPS v2 by open_clip, on a small model of random weights."""

import inspect

import pytest
import torch
import yaml
from torchvision.transforms import InterpolationMode

from stepdistill.config import check, dump_yaml
from stepdistill.errors import UserError
from stepdistill.judges.clip import ClipScorer
from stepdistill.judges.rewards import RewardSettings, load_reward
from stepdistill.judges.rewards.pixels import pad_square


def hpsv2_transform(picture, size):
    """hpsv2's ``ResizeMaxSize`` with torchvision's functions, in a picture in [0, 1], and its normalisation."""
    from torchvision.transforms import functional

    high, wide = picture.shape[1:]
    scale = size / float(max(high, wide))
    if scale != 1.0:
        new = tuple(round(side * scale) for side in (high, wide))
        picture = functional.resize(picture, new, InterpolationMode.BICUBIC)
        below, right = size - new[0], size - new[1]
        picture = functional.pad(picture, [right // 2, below // 2, right - right // 2, below - below // 2], fill=0)
    return functional.normalize(picture, ClipScorer.mean, ClipScorer.std)


@pytest.mark.parametrize("size", [(32, 32), (64, 46), (46, 64), (20, 15), (9, 70)])
def test_hps_is_the_cosine_of_open_clip(size, small, hps):
    """The model called directly on pictures of hpsv2's transform; values and slopes, no prefix, no clamp."""
    from open_clip import SimpleTokenizer

    reward, prompts = load_reward(hps), ["A red bus", "cat", "dog " * 40]
    leaf = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(2)).requires_grad_()
    pictures = torch.stack([hpsv2_transform((picture + 1) / 2, 32) for picture in leaf])
    tokens = SimpleTokenizer(context_length=16)(prompts)
    expected = torch.diagonal(
        small.encode_image(pictures, normalize=True) @ small.encode_text(tokens, normalize=True).detach().T
    )
    rewards = reward(leaf, prompts)
    assert rewards.dtype == torch.float32
    torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-5)
    assert rewards.std() > 0.01
    slopes = [torch.autograd.grad(score.sum(), leaf)[0] for score in (rewards, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-5)
    assert (slopes[0].abs().sum((1, 2, 3)) > 0).all()
    assert torch.equal(reward(leaf[:, :1], prompts), reward(leaf[:, :1].expand(-1, 3, -1, -1), prompts))
    model = inspect.getclosurevars(reward.score).nonlocals["scorer"].model
    assert not model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad and p.grad is None for p in model.parameters())
    with pytest.raises(UserError, match="reward hps: needs a prompt for each picture"):
        reward(leaf, [])


def test_padded_square_pads_a_picture_of_the_size_too():
    """Where the library gives back a picture that is not square."""
    pixels = torch.full((1, 1, 32, 20), 0.5)
    expected = torch.full((1, 3, 32, 32), -1.0)
    expected[..., 6:26] = 0.5
    torch.testing.assert_close(pad_square(pixels, 32), expected)
    assert pad_square(torch.zeros(1, 1, 1, 100), 32).shape == (1, 3, 32, 32)


def test_hps_is_vit_h_14_without_a_prefix_unless_the_settings_say_otherwise(hps, monkeypatch):
    calls = []

    def load(settings, device):
        calls.append(settings)
        raise UserError("enough")

    monkeypatch.setattr("stepdistill.judges.rewards.hps.load_clip", load)
    for clip in ({}, {"clip": {}}, {"clip": {"model": "ViT-B-32", "prefix": "a "}}):
        settings = check(RewardSettings, {"reward": "hps", "weights": hps.weights, **clip}, "rewards")
        with pytest.raises(UserError, match="enough"):
            load_reward(settings)
    assert [(s.model, s.prefix) for s in calls] == [("ViT-H-14", ""), ("ViT-H-14", ""), ("ViT-B-32", "a ")]
    assert all(s.pretrained == hps.weights and not s.hub for s in calls)
    assert check(RewardSettings, yaml.safe_load(dump_yaml(hps)), "rewards") == hps  # what a run writes, it reads


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing; download the file HPS_v2.1_compressed.pt"),
        (b"<!DOCTYPE html>", "cannot be read"),
        ([1, 2], "holds no state dict"),
        ({"state_dict": [1]}, "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
        ({"state_dict": {"visual.proj": torch.zeros(16, 8)}}, "open_clip cannot load it"),
        ({"state_dict": {}}, "open_clip cannot load it"),
    ],
)
def test_a_wrong_hps_file_is_one_line(content, message, small, tmp_path):
    path = tmp_path / "hps.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    settings = {"reward": "hps", "weights": str(path), "clip": {"model": "small"}}
    with pytest.raises(UserError, match="reward hps") as error:
        load_reward(check(RewardSettings, settings, "rewards"))
    assert message in str(error.value)
    assert path.name in str(error.value)
    assert "HPS_v2" in str(error.value) or "replace the file" in str(error.value)
    assert "\n" not in str(error.value)
