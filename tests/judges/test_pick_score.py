"""PickScore by transformers, on a small model of random weights."""

import inspect
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rewards import save_pick_score, some_pixels
from safetensors.torch import save_file
from torch import nn

from stepdistill.errors import UserError
from stepdistill.judges.clip import ClipScorer
from stepdistill.judges.rewards import RewardSettings, load_reward
from stepdistill.judges.rewards.pixels import crop_square

LETTERS = ["a red bus", "z", "dog " * 20]


def pick_score_by_hand(folder, words, pictures, prompts):
    """transformers' own features, their cosine by hand; no logit_scale."""
    from transformers import CLIPModel, CLIPTokenizer

    model = CLIPModel.from_pretrained(folder, dtype=torch.float32)
    tokens = CLIPTokenizer.from_pretrained(words)(
        prompts, padding=True, truncation=True, max_length=16, return_tensors="pt"
    )
    seen = model.get_image_features(pixel_values=pictures).pooler_output
    read = model.get_text_features(**tokens).pooler_output.detach()
    return ((seen / seen.norm(dim=1, keepdim=True)) * (read / read.norm(dim=1, keepdim=True))).sum(1)


@pytest.mark.parametrize(("dtype", "eos"), [(torch.float32, 189), (torch.float16, 2)])
def test_pick_score_is_the_raw_cosine_of_transformers(dtype, eos, tmp_path):
    """Pictures cropped by hand: twice the model's size, so 64 x 96 halves to 32 x 48; values and slopes."""
    folder = save_pick_score(tmp_path / "model", dtype=dtype, eos_token_id=eos)
    reward = load_reward(RewardSettings(reward="pick_score", weights=str(folder), hinge=10.0))
    leaf = torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(2)).requires_grad_()
    half = nn.functional.interpolate(leaf, (32, 48), mode="bicubic", antialias=True)[..., 8:40]
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (ClipScorer.mean, ClipScorer.std))
    expected = pick_score_by_hand(folder, folder, (half / 2 + 0.5 - mean) / std, LETTERS)
    rewards = reward(leaf, LETTERS)
    assert rewards.dtype == torch.float32
    torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-5)
    assert rewards.std() > 0.01
    slopes = [torch.autograd.grad(score.sum(), leaf)[0] for score in (rewards, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-6)
    assert (slopes[0].abs().sum((1, 2, 3)) > 0).all()
    gray = reward(leaf[:, :1], LETTERS)
    assert torch.equal(gray, reward(leaf[:, :1].expand(-1, 3, -1, -1), LETTERS))
    with pytest.raises(UserError, match="reward pick_score: needs a prompt for each picture"):
        reward(leaf, [])


def test_pick_score_is_frozen_and_takes_the_tokenizer_from_config(tmp_path):
    both, alone = save_pick_score(tmp_path / "both"), save_pick_score(tmp_path / "alone", words=False)
    pixels, scores = some_pixels(size=40), []
    for folder, extra in ((both, {}), (alone, {"config": str(both)})):
        reward = load_reward(RewardSettings(reward="pick_score", weights=str(folder), **extra))
        scorer = inspect.getclosurevars(reward.score).nonlocals["scorer"]
        scores.append(reward(pixels, LETTERS))
        scores[-1].sum().backward()
        assert not scorer.model.training
        for parameter in scorer.model.parameters():
            assert parameter.dtype == torch.float32
            assert not parameter.requires_grad
            assert parameter.grad is None
    assert torch.equal(*scores)


@pytest.mark.parametrize("size", [(32, 32), (64, 97), (75, 40), (20, 30)])
def test_cropped_square_is_the_processors(size):
    """CLIPImageProcessor on 8-bit pictures; both round the crop's place alike."""
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    coarse = np.random.default_rng(0).integers(40, 216, (5, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    expected = processor(images=[picture], return_tensors="pt")["pixel_values"]
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    mean, std = (torch.tensor(v).reshape(3, 1, 1) for v in (ClipScorer.mean, ClipScorer.std))
    torch.testing.assert_close((crop_square(pixels, 32) / 2 + 0.5 - mean) / std, expected, rtol=0, atol=0.02)


def without_a_tensor(folder):
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    save_file(
        {k: v for k, v in state.items() if "_projection" not in k}, folder / "model.safetensors", {"format": "pt"}
    )


def other_shape(folder):
    from safetensors.torch import load_file

    state = load_file(folder / "model.safetensors")
    state["visual_projection.weight"] = torch.zeros(3, 3)
    save_file(state, folder / "model.safetensors", {"format": "pt"})


def other_words(folder):
    words = json.loads((folder / "vocab.json").read_text())
    words["new"] = len(words)
    (folder / "vocab.json").write_text(json.dumps(words))


def other_end(folder):
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["eos_token_id"] = 7
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no such file"),
        (lambda f: (f / "config.json").write_text("{"), "has no config.json of a model"),
        (lambda f: (f / "config.json").write_text("[]"), "has no config.json of a model"),
        (lambda f: (f / "config.json").write_text('{"model_type": "bert"}'), "is a model of type bert, not clip"),
        (lambda f: (f / "model.safetensors").unlink(), "cannot be loaded"),
        (lambda f: (f / "model.safetensors").write_bytes(b"\0" * 20), "cannot be loaded"),
        (without_a_tensor, "has no weights text_projection.weight (2 such tensors)"),
        (other_shape, "has weights of another shape, visual_projection.weight"),
        (lambda f: (f / "vocab.json").unlink(), "has no tokenizer (tokenizer.json, or vocab.json)"),
        (lambda f: (f / "vocab.json").write_text("{"), "cannot be read"),
        (other_words, "has 191 tokens, end at 189, and the model 190, end at 189"),
        (other_end, "has 190 tokens, end at 189, and the model 190, end at 7"),
    ],
)
def test_a_wrong_pick_score_folder_is_one_line(spoil, message, tmp_path):
    folder = save_pick_score(tmp_path / "model")
    spoil(folder)
    with pytest.raises(UserError, match="reward pick_score: ") as error:
        load_reward(RewardSettings(reward="pick_score", weights=str(folder)))
    assert message in str(error.value)
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)
    assert "PickScore_v1, with config.json" in str(error.value) or "as config" in str(error.value)


def test_no_pick_score_folder_is_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path, fault in ((tmp_path / "nowhere", "missing"), (tmp_path / "file", "no folder")):
        with pytest.raises(UserError, match=f"weights {path} is {fault}; download the folder of PickScore_v1"):
            load_reward(RewardSettings(reward="pick_score", weights=str(path)))
