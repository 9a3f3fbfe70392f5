"""ImageReward through its library's interface, its arithmetic replaced."""

import builtins

import numpy as np
import pytest
import torch
from PIL import Image
from rewards import some_pixels
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from stepdistill.errors import UserError
from stepdistill.judges.clip import ClipScorer
from stepdistill.judges.rewards import load_reward
from stepdistill.judges.rewards.image_reward import prepare_pixels


def test_image_reward_goes_through_its_library(library, image_reward):
    reward, prompts = load_reward(image_reward, "cpu"), ["a red bus", "cat", "dog " * 20]
    ((name, device, med_config, model),) = library.calls
    assert (name, device, med_config) == (image_reward.weights, "cpu", image_reward.config)
    pixels = some_pixels(size=16)
    ids = torch.tensor([[ord(c) for c in p[:35].ljust(35, "\0")] for p in prompts])
    expected = model.score_gard(ids, (ids > 0).long(), prepare_pixels(pixels))[:, 0]
    rewards = reward(pixels, prompts)
    assert torch.equal(rewards, expected)
    assert rewards.shape == (3,)
    reward.loss(pixels, prompts).backward()
    assert (pixels.grad.abs().sum((1, 2, 3)) > 0).all()
    assert not model.training
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())
    with pytest.raises(UserError, match="reward image_reward: needs a prompt for each picture"):
        reward(pixels, [])


@pytest.mark.parametrize("size", [(224, 224), (96, 96), (300, 448), (448, 300)])
def test_preprocessing_is_the_librarys(size):
    """ImageReward.py's transform on PIL pictures, within what its 8 bits lose; our values are not cut to [0, 1]."""
    transform = Compose(
        [
            Resize(224, interpolation=InterpolationMode.BICUBIC),
            CenterCrop(224),
            ToTensor(),
            Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
        ]
    )
    coarse = np.random.default_rng(0).integers(40, 216, (5, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(coarse).resize(size[::-1], Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    torch.testing.assert_close(prepare_pixels(pixels)[0], transform(picture), rtol=0, atol=0.02)


def test_gray_pixels_are_taken_and_values_keep_their_gradient_outside_the_range():
    pixels = torch.full((2, 1, 8, 8), 1.5, requires_grad=True)
    rewards = prepare_pixels(pixels)
    torch.testing.assert_close(
        rewards[0, :, 0, 0], (1.25 - torch.tensor(ClipScorer.mean)) / torch.tensor(ClipScorer.std)
    )
    rewards.sum().backward()
    torch.testing.assert_close(pixels.grad.sum(), 2 * 224**2 * (0.5 / torch.tensor(ClipScorer.std)).sum())


def test_a_file_that_the_library_would_take_in_silence_is_refused(library, image_reward, tmp_path):
    state = torch.load(image_reward.weights)
    torch.save({k: v for k, v in state.items() if "text_encoder" not in k}, tmp_path / "ImageReward.pt")
    with pytest.raises(UserError, match=r"has no blip\.text_encoder\.weight \(1 such tensors\)"):
        load_reward(image_reward)
    torch.save({k: v for k, v in state.items() if "vision_proj" not in k}, tmp_path / "ImageReward.pt")
    load_reward(image_reward)  # what no score uses may be missing


@pytest.mark.parametrize(("key", "message"), [("weights", "weights {} is missing"), ("config", "config {} is missing")])
def test_a_missing_file_is_one_line(key, message, library, image_reward):
    settings = image_reward.model_copy(update={key: "nowhere.file"})
    with pytest.raises(UserError) as error:
        load_reward(settings)
    assert message.format("nowhere.file") in str(error.value)
    assert library.calls == []  # nothing is downloaded in its place


def test_a_library_that_fails_is_one_line(library, image_reward):
    def load(*_, **__):
        raise OSError("no bert-base-uncased\nand more")

    library.load = load
    with pytest.raises(UserError, match=r"ImageReward cannot load .*\(no bert-base-uncased\)") as error:
        load_reward(image_reward)
    assert "\n" not in str(error.value)


def test_a_missing_library_is_one_line(library, image_reward, monkeypatch):
    real = builtins.__import__

    def without(name, *arguments, **more):
        if name == "ImageReward":
            raise ImportError("cannot import name 'apply_chunking_to_forward'")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"apply_chunking_to_forward.*pip install image-reward") as error:
        load_reward(image_reward)
    assert "\n" not in str(error.value)
