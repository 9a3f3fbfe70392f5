"""The aesthetic predictor against a forward written by hand."""

import inspect

import pytest
import torch
from rewards import CLIP, WIDTH, head_state, some_pixels
from safetensors.torch import save_file

from stepdistill.errors import UserError
from stepdistill.judges.clip import ClipScorer
from stepdistill.judges.rewards import RewardSettings, load_reward
from stepdistill.judges.rewards.aesthetic import AestheticHead


def by_hand(pixels, tower, state):
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (ClipScorer.mean, ClipScorer.std))
    x = (((pixels + 1) / 2 - mean) / std).reshape(len(pixels), -1) @ tower.picture.detach().T
    x = x / x.square().sum(1, keepdim=True).sqrt()
    for place in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{place}.weight"].T + state[f"layers.{place}.bias"]
    return x[:, 0]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_aesthetic_is_the_forward_by_hand(suffix, tower, tmp_path):
    """On pictures of the model's size, where the resize does nothing; without prompts."""
    state, path = head_state(), tmp_path / f"head{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    reward = load_reward(RewardSettings(reward="aesthetic", weights=str(path), clip=CLIP, weight=0.25, hinge=100.0))
    assert (reward.name, reward.weight, reward.hinge) == ("aesthetic", 0.25, 100.0)
    pixels = some_pixels()
    rewards, expected = reward(pixels, []), by_hand(pixels, tower, state)
    torch.testing.assert_close(rewards, expected, rtol=1e-4, atol=1e-4)
    assert rewards.std() > 0.1
    (slope,) = torch.autograd.grad(reward.loss(pixels, []), pixels)
    (by_hand_slope,) = torch.autograd.grad(-0.25 * expected.mean(), pixels)
    torch.testing.assert_close(slope, by_hand_slope, rtol=1e-3, atol=1e-5)


def test_head_does_not_see_the_embeddings_length_and_drops_nothing_out(aesthetic):
    reward = load_reward(aesthetic)
    head = inspect.getclosurevars(reward.score).nonlocals["head"]
    embeddings = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(7 * embeddings), head(embeddings))
    assert torch.equal(head(embeddings), head(embeddings))
    plain = head(embeddings)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head(embeddings), plain)
    assert head(torch.zeros(1, WIDTH)).isfinite().all()


def test_frozen_weights_learn_nothing_and_the_pixels_do(aesthetic, tower):
    reward, pixels = load_reward(aesthetic), some_pixels()
    head = inspect.getclosurevars(reward.score).nonlocals["head"]
    assert isinstance(head, AestheticHead)
    assert not head.training
    reward.loss(pixels, []).backward()
    assert (pixels.grad.abs().sum((1, 2, 3)) > 0).all()
    for parameter in (*head.parameters(), *tower.parameters()):
        assert not parameter.requires_grad
        assert parameter.grad is None


def relu_layout():
    """The author's variant with activations, whose linear layers have other places."""
    state = head_state()
    return {f"layers.{new}.{kind}": state[f"layers.{old}.{kind}"]
            for old, new in ((0, 0), (2, 3), (4, 6), (6, 9), (7, 11)) for kind in ("weight", "bias")}  # fmt: skip


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is missing; download the predictor's file"),
        (b"<!DOCTYPE html>", "cannot be read"),
        (b"", "cannot be read"),
        ([1, 2], "holds no state dict"),
        ({"epoch": 3}, "holds no state dict"),
        ({"layers.0.weight": torch.zeros(3)}, "nor of its layout"),
        (relu_layout(), "nor of its layout"),
        ({k: v for k, v in head_state().items() if "7" not in k}, "nor of its layout"),
        (head_state(WIDTH + 1), "reads embeddings of length 7, and the CLIP model tower gives 6"),
    ],
)
def test_a_wrong_file_is_one_line(content, message, tower, tmp_path):
    path = tmp_path / "head.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(UserError, match="reward aesthetic: ") as error:
        load_reward(RewardSettings(reward="aesthetic", weights=str(path), clip=CLIP))
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_broken_safetensors_file_is_one_line(tower, tmp_path):
    (tmp_path / "head.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match="cannot be read"):
        load_reward(RewardSettings(reward="aesthetic", weights=str(tmp_path / "head.safetensors"), clip=CLIP))
