"""Rewards: the settings, the hinge around them, and each kind against a forward written by hand."""

import builtins
import inspect
import json
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from stepdistill.config import check, dump_yaml
from stepdistill.errors import UserError
from stepdistill.judges.clip import ClipScorer
from stepdistill.judges.rewards import Reward, RewardSettings, load_reward
from stepdistill.judges.rewards.aesthetic import AestheticHead
from stepdistill.judges.rewards.image_reward import prepare_pixels
from stepdistill.judges.rewards.pixels import crop_square, pad_square

F64 = torch.float64
WIDTH = 6
CLIP = {"model": "own_clip:make"}


class Tower(nn.Module):
    """Pictures of 4 x 4 and prompts of one letter to embeddings of length WIDTH, linearly."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.picture = nn.Parameter(torch.randn(WIDTH, 48, generator=generator))
        self.text = nn.Parameter(torch.randn(26, WIDTH, generator=generator))

    def encode_image(self, images):
        return images.flatten(1) @ self.picture.T

    def encode_text(self, tokens):
        return self.text[tokens]


@pytest.fixture
def tower(monkeypatch):
    tower = Tower()
    module = type(sys)("own_clip")
    module.make = lambda: ClipScorer(
        tower, None, lambda texts: torch.tensor([ord(t) - ord("a") for t in texts]), "tower", size=(4, 4)
    )
    monkeypatch.setitem(sys.modules, "own_clip", module)
    return tower


def head_state(width=WIDTH):
    """Weights of the public file's names and shapes, large enough that a score says something."""
    generator = torch.Generator().manual_seed(0)
    widths = [width, 1024, 128, 64, 16, 1]
    state = {}
    for place, inside, outside in zip((0, 2, 4, 6, 7), widths, widths[1:], strict=False):
        state[f"layers.{place}.weight"] = torch.randn(outside, inside, generator=generator) / inside**0.5
        state[f"layers.{place}.bias"] = torch.randn(outside, generator=generator)
    return state


@pytest.fixture
def aesthetic(tower, tmp_path):
    torch.save(head_state(), tmp_path / "head.pth")
    return RewardSettings(reward="aesthetic", weights=str(tmp_path / "head.pth"), clip=CLIP)


def some_pixels(count=3, size=4, channels=3, spread=0.5):
    pixels = spread * torch.randn(count, channels, size, size, generator=torch.Generator().manual_seed(1))
    return pixels.requires_grad_()


# -- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"reward": "aesthetic", "clip": CLIP}, "weights is missing: reward = aesthetic needs the predictor's file"),
        ({"reward": "aesthetic", "weights": "x"}, "clip is missing: reward = aesthetic needs the CLIP model"),
        ({"reward": "aesthetic", "weights": "x", "clip": CLIP, "config": "y"}, "config has no use with"),
        ({"reward": "image_reward", "config": "y"}, "weights is missing"),
        (
            {"reward": "image_reward", "weights": "x"},
            "config is missing: reward = image_reward needs the file med_config",
        ),
        ({"reward": "image_reward", "weights": "x", "config": "y", "clip": CLIP}, "clip has no use with"),
        ({"reward": "clip"}, "clip is missing"),
        ({"reward": "clip", "clip": CLIP, "weights": "x"}, "weights has no use with reward = clip; remove it"),
        ({"reward": "own:net", "weights": "x"}, "weights has no use with reward = own:net"),
        ({"reward": "hpsv3"}, "hpsv3: write aesthetic, image_reward, pick_score, hps, clip or module:attribute"),
        ({"reward": "pick_score"}, "weights is missing: reward = pick_score needs the folder of PickScore_v1"),
        ({"reward": "pick_score", "weights": "x", "clip": CLIP}, "clip has no use with reward = pick_score"),
        ({"reward": "hps"}, "weights is missing: reward = hps needs the file HPS_v2.1_compressed.pt"),
        ({"reward": "hps", "clip": {"model": "ViT-B-32"}}, "weights is missing: reward = hps"),
        ({"reward": "hps", "weights": "x", "config": "y"}, "config has no use with reward = hps"),
        ({"reward": "hps", "weights": "x", "clip": CLIP}, "clip.model = own_clip:make: reward = hps loads"),
        ({"reward": "hps", "weights": "x", "clip": {"hub": True}}, "without hub"),
        (
            {"reward": "hps", "weights": "x", "clip": {"pretrained": "y"}},
            "clip.pretrained has no use with reward = hps",
        ),
        ({"reward": "own:net", "weight": 0}, "weight = 0: should be greater than 0"),
    ],
)
def test_settings_say_what_a_kind_needs(raw, message):
    with pytest.raises(UserError) as error:
        check(RewardSettings, raw, "rewards")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_that_fit():
    settings = check(RewardSettings, {"reward": "own:net"}, "rewards")
    assert (settings.weight, settings.hinge) == (1.0, None)
    both = check(
        RewardSettings, {"reward": "image_reward", "weights": "a.pt", "config": "b.json", "hinge": 2}, "rewards"
    )
    assert (both.hinge, both.config) == (2.0, "b.json")


# -- the reward around a score -----------------------------------------------------------------------------------


def test_loss_is_weight_times_the_hinge():
    reward = Reward("mean", 0.5, 2.0, lambda pixels, items: 3 * pixels.mean((1, 2, 3)))
    pixels = torch.tensor([0.0, 0.5, 2 / 3, 1.0], dtype=F64)[:, None, None, None].expand(4, 1, 2, 2)
    pixels = pixels.clone().requires_grad_()
    loss = reward.loss(pixels, [])
    assert loss.item() == pytest.approx(0.5 * (2 + 0.5 + 0 + 0) / 4)
    (slope,) = torch.autograd.grad(loss, pixels)
    below = -0.5 * 3 / 4 / 4
    assert slope[:, 0, 0, 0].tolist() == pytest.approx([below, below, 0, 0])
    assert (slope[2:] == 0).all()


def test_without_a_hinge_every_picture_is_pushed():
    reward = Reward("mean", 2.0, None, lambda pixels, items: pixels.sum((1, 2, 3)))
    pixels = torch.full((2, 1, 1, 1), 100.0, requires_grad=True)
    reward.loss(pixels, []).backward()
    assert pixels.grad.flatten().tolist() == [-1.0, -1.0]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda p, i: p.mean((1, 2)), "gave torch.float32 of shape (3, 4) for 3 pictures"),
        (lambda p, i: p.mean(), "gave torch.float32 of shape () for 3 pictures"),
        (lambda p, i: 0.5, "gave a float for 3 pictures"),
    ],
)
def test_a_score_of_another_shape_is_one_line(score, message):
    with pytest.raises(UserError, match="reward mine: ") as error:
        Reward("mine", 1.0, None, score).loss(some_pixels(), [])
    assert message in str(error.value)


# -- aesthetic ---------------------------------------------------------------------------------------------------


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


# -- clip --------------------------------------------------------------------------------------------------------


def test_clip_is_the_cosine(tower):
    reward, pixels = load_reward(RewardSettings(reward="clip", clip={**CLIP})), some_pixels()
    scorer = sys.modules["own_clip"].make()
    rewards = reward(pixels, ["a", "k", "z"])
    assert torch.equal(rewards, scorer.cosine(pixels, ["a", "k", "z"]))
    embedded = torch.nn.functional.cosine_similarity(scorer.embed(pixels), tower.text[[0, 10, 25]])
    torch.testing.assert_close(rewards, embedded)
    rewards.sum().backward()
    assert (pixels.grad.abs().sum((1, 2, 3)) > 0).all()
    assert all(p.grad is None for p in tower.parameters())


@pytest.mark.parametrize("items", [[], [1, 2, 3], ["a", "b"]])
def test_what_is_no_prompt_for_each_picture_is_one_line(items, tower):
    reward = load_reward(RewardSettings(reward="clip", clip=CLIP))
    with pytest.raises(UserError, match="reward clip: needs a prompt for each picture"):
        reward(some_pixels(), items)


# -- image_reward: its library's API, its arithmetic replaced ----------------------------------------------------


class Tokens(dict):
    __getattr__ = dict.__getitem__


class Blip(nn.Module):
    def __init__(self):
        super().__init__()
        self.visual_encoder, self.text_encoder = nn.Linear(3, 4), nn.Embedding(128, 4)
        self.vision_proj = nn.Linear(4, 4)  # in the model, and not used by a score

    def tokenizer(self, prompts, padding, truncation, max_length, return_tensors):
        assert (padding, truncation, return_tensors) == ("max_length", True, "pt")
        ids = torch.tensor([[ord(c) for c in p[:max_length].ljust(max_length, "\0")] for p in prompts])
        return Tokens(input_ids=ids, attention_mask=(ids > 0).long())


class FakeImageReward(nn.Module):
    """image-reward 1.5's class: ``blip`` with its tokenizer, ``mlp``, ``score_gard`` that gives (B, 1)."""

    def __init__(self, med_config, device="cpu"):
        super().__init__()
        self.device, self.blip, self.mlp = device, Blip(), nn.Linear(4, 1)

    def score_gard(self, prompt_ids, prompt_attention_mask, image):
        assert image.shape[1:] == (3, 224, 224)
        assert prompt_ids.shape == prompt_attention_mask.shape == (len(image), 35)
        words = (self.blip.text_encoder(prompt_ids) * prompt_attention_mask[..., None]).sum(1)
        return self.mlp(self.blip.visual_encoder(image.mean((2, 3))) * words)


@pytest.fixture
def library(monkeypatch, tmp_path):
    """A stand-in for the package, with files; ``asked`` keeps what it loaded, as ``RM.load`` does, and not strictly."""
    module = type(sys)("ImageReward")
    module.calls = []

    def load(name="ImageReward-v1.0", device="cpu", download_root=None, med_config=None):
        model = FakeImageReward(med_config, device)
        model.load_state_dict(torch.load(name), strict=False)
        module.calls.append((name, device, med_config, model))
        return model

    module.load = load
    torch.manual_seed(0)
    torch.save(FakeImageReward("").state_dict(), tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "ImageReward", module)
    return module


@pytest.fixture
def image_reward(tmp_path):
    files = {"weights": str(tmp_path / "ImageReward.pt"), "config": str(tmp_path / "med_config.json")}
    return RewardSettings(reward="image_reward", hinge=1000.0, **files)


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


# -- pick_score: transformers itself on a model made here ---------------------------------------------------------


LETTERS = ["a red bus", "z", "dog " * 20]


def small_clip_config(size=32, **text):
    from transformers import CLIPConfig

    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"vocab_size": 190, "max_position_embeddings": 16, "bos_token_id": 188, "eos_token_id": 189}
    vision = {"image_size": size, "patch_size": 16, **small}
    return CLIPConfig(projection_dim=8, text_config={**small, **ends, **text}, vision_config=vision)


def save_pick_score(folder, words=True, dtype=torch.float32, **text):
    """A tiny CLIPModel with random weights, and the tokenizer of its letters, as transformers' own folder."""
    from tiny import tokenizer
    from transformers import CLIPModel

    torch.manual_seed(0)
    model = CLIPModel(small_clip_config(**text))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.to(dtype).save_pretrained(folder)
    if words:
        tokenizer(folder)
    return folder


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


# -- hps: open_clip itself on a model made here ------------------------------------------------------------------


SMALL = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}


@pytest.fixture
def small(monkeypatch):
    """A tiny model with random weights, under the name small of open_clip's models."""
    import open_clip
    from open_clip import factory

    monkeypatch.setitem(factory._MODEL_CONFIGS, "small", SMALL)
    torch.manual_seed(0)
    return open_clip.CLIP(**SMALL).eval()


@pytest.fixture
def hps(small, tmp_path):
    """The file's layout is HPS v2's, with more beside the tensors and at half precision."""
    state = {name: value.half() for name, value in small.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"step": 1}}, tmp_path / "hps.pt")
    small.load_state_dict(state)
    return check(
        RewardSettings, {"reward": "hps", "weights": str(tmp_path / "hps.pt"), "clip": {"model": "small"}}, "rewards"
    )


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


# -- one's own ---------------------------------------------------------------------------------------------------


class Brightness(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.full((), 2.0)), nn.Dropout(0.5)

    def forward(self, pixels, items):
        return self.scale * self.layer(pixels).mean((1, 2, 3))


class Counted:
    def __call__(self, pixels, items):
        return pixels.mean((1, 2, 3)) * 0 + torch.tensor([float(len(i)) for i in items])


class NeedsAPath(nn.Module):
    def __init__(self, path):
        super().__init__()


@pytest.fixture
def user_module(monkeypatch):
    module = type(sys)("own_reward")
    module.module, module.Brightness, module.make = Brightness(), Brightness, lambda: Brightness()
    module.function, module.counted = lambda pixels, items: 2 * pixels.mean((1, 2, 3)), Counted()
    module.NeedsAPath, module.number, module.makes_a_number = NeedsAPath, 3, lambda: 3
    module.makes_a_class = lambda: Brightness
    monkeypatch.setitem(sys.modules, "own_reward", module)
    return module


@pytest.mark.parametrize("attribute", ["module", "Brightness", "make", "function"])
def test_a_reward_of_ones_own(user_module, attribute):
    reward, pixels = load_reward(RewardSettings(reward=f"own_reward:{attribute}", weight=3.0)), some_pixels(channels=1)
    assert reward.name == f"own_reward:{attribute}"
    reward.loss(pixels, []).backward()
    torch.testing.assert_close(pixels.grad, torch.full_like(pixels, -3 * 2 / pixels.numel()))
    if attribute != "function":
        assert isinstance(reward.score, Brightness)
        assert not reward.score.training
        assert reward.score.scale.grad is None


def test_a_callable_object_gets_the_items(user_module):
    assert load_reward(RewardSettings(reward="own_reward:counted"))(some_pixels(), ["a", "bb", ""]).tolist() == [
        1,
        2,
        0,
    ]


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("number", "not an nn.Module or another callable"),
        ("makes_a_number", "not an nn.Module or another callable"),
        ("makes_a_class", "not an nn.Module or another callable"),
        ("NeedsAPath", "a class that needs arguments"),
        ("gone", "has no 'gone'"),
    ],
)
def test_what_is_no_reward_is_one_line(user_module, attribute, message):
    with pytest.raises(UserError, match="reward 'own_reward:") as error:
        load_reward(RewardSettings(reward=f"own_reward:{attribute}"))
    assert message in str(error.value)


# -- no clamp ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["aesthetic", "clip", "image_reward", "pick_score", "hps"])
def test_values_outside_the_range_keep_their_gradient(kind, tower, aesthetic, library, image_reward, hps, tmp_path):
    """The slope at a picture that is wholly out of range is the slope of a smooth function: by finite differences."""
    settings = {"aesthetic": aesthetic, "clip": RewardSettings(reward="clip", clip=CLIP), "image_reward": image_reward}
    settings["pick_score"] = RewardSettings(reward="pick_score", weights=str(save_pick_score(tmp_path / "pick")))
    reward = load_reward({**settings, "hps": hps}[kind])
    pixels = (1.5 + some_pixels(spread=0.1).detach().abs()).requires_grad_()
    (slope,) = torch.autograd.grad(reward(pixels, ["a", "k", "z"]).sum(), pixels)
    assert (slope.abs().sum((1, 2, 3)) > 0).all()
    direction = slope / slope.norm()
    with torch.no_grad():
        ahead, behind = (reward(pixels + step * direction, ["a", "k", "z"]).sum() for step in (0.05, -0.05))
    assert ((ahead - behind) / 0.1).item() == pytest.approx(slope.norm().item(), rel=0.05)
