import builtins

import numpy as np
import pytest
import torch

from stepdistill.config import check
from stepdistill.errors import UserError
from stepdistill.judges.clip import ClipScorer, ClipSettings, cosine_scores
from stepdistill.judges.load import load_clip


class Colours:
    """Embeds a picture as its mean colour, and a text as the colour that its last word names."""

    words = {"red": (1.0, 0.0, 0.0), "green": (0.0, 1.0, 0.0), "blue": (0.0, 0.0, 1.0)}

    def encode_image(self, images):
        return images.mean((2, 3))

    def encode_text(self, tokens):
        return 5 * tokens


def scorer():
    def transform(picture):
        return torch.from_numpy(np.array(picture)).float().permute(2, 0, 1)

    def tokenizer(texts):
        assert all(text.startswith("a picture of ") for text in texts)
        return torch.tensor([Colours.words[text.split()[-1]] for text in texts])

    return ClipScorer(Colours(), transform, tokenizer, "colours", "a picture of ")


def test_scores_are_plain_cosines():
    pixels = torch.zeros(4, 3, 5, 7)
    pixels[0, 0] = pixels[1, 1] = pixels[2, 0] = 1.0
    pixels[3, 0], pixels[3, 1] = 1.0, 1.0
    scores = scorer()((255 * pixels).byte(), ["red", "green", "blue", "red"])
    torch.testing.assert_close(scores, torch.tensor([1.0, 1.0, 0.0, 0.5**0.5]))


def test_scores_may_be_negative():
    class Opposite(Colours):
        def encode_text(self, tokens):
            return -tokens

    images = torch.ones(1, 3, 2, 2)
    assert cosine_scores(Opposite(), images, torch.ones(1, 3)).item() == pytest.approx(-1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "ViT-B-32", "pretrained": "nowhere.pt"}, "weight file nowhere.pt of ViT-B-32 is missing"),
        ({"model": "local-dir:nowhere"}, "folder nowhere is missing"),
    ],
)
def test_missing_weights_are_one_line(settings, message):
    with pytest.raises(UserError) as error:
        load_clip(ClipSettings(**settings))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_package_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "weights.pt").write_bytes(b"")
    real = builtins.__import__

    def without(name, *arguments, **more):
        if name == "open_clip":
            raise ImportError("no open_clip here")
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"open_clip_torch .*pip install"):
        load_clip(ClipSettings(pretrained=str(tmp_path / "weights.pt")))


def test_the_hub_must_be_asked_for(monkeypatch, capsys):
    """Without ``hub`` a tag is taken as a file that is missing; with it open_clip gets the tag."""
    import sys
    import types

    calls = []
    fake = types.ModuleType("open_clip")
    fake.create_model_and_transforms = lambda *a, **k: calls.append((a, k)) or (torch.nn.Identity(), None, "transform")
    fake.get_tokenizer = lambda name: f"tokenizer of {name}"
    monkeypatch.setitem(sys.modules, "open_clip", fake)
    with pytest.raises(UserError, match="is missing"):
        load_clip(ClipSettings(pretrained="laion2b_s12b_b42k"))
    assert calls == []
    loaded = load_clip(ClipSettings(pretrained="laion2b_s12b_b42k", hub=True))
    assert calls == [(("ViT-g-14",), {"pretrained": "laion2b_s12b_b42k", "device": "cpu"})]
    assert (loaded.transform, loaded.tokenizer) == ("transform", "tokenizer of ViT-g-14")
    assert "ViT-g-14 laion2b_s12b_b42k" in capsys.readouterr().out


def test_weights_must_be_named():
    with pytest.raises(UserError, match="pretrained is missing"):
        check(ClipSettings, {"model": "ViT-g-14"}, "evaluation.clip")
    with pytest.raises(UserError, match="allow it with hub=true"):
        check(ClipSettings, {"model": "hf-hub:owner/name"}, "evaluation.clip")
    assert check(ClipSettings, {"model": "hf-hub:owner/name", "hub": True}, "evaluation.clip").pretrained is None


# -- the differentiable cosine ---------------------------------------------------------------------------------


def small_open_clip(folder):
    """A tiny CLIP with random weights as open_clip's own local folder."""
    import json

    import open_clip
    from safetensors.torch import save_file

    config = {
        "model_cfg": {
            "embed_dim": 8,
            "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
            "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        },
        "preprocess_cfg": {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4]},
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = open_clip.CLIP(**config["model_cfg"])
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return folder


def test_cosine_is_the_score_with_a_gradient(tmp_path, capsys):
    """open_clip itself: on pictures of the model's size the loss's cosine is the evaluation's score."""
    folder = small_open_clip(tmp_path / "clip")
    scorer = load_clip(ClipSettings(model=f"local-dir:{folder}", prefix="a "))
    assert scorer.size == (32, 32)
    assert tuple(scorer.mean) == (0.4, 0.5, 0.6)
    pixels = torch.randint(0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    prompts = ["cat", "red bus", "dog"]
    leaf = (pixels.float() / 127.5 - 1).requires_grad_()
    cosine = scorer.cosine(leaf, prompts)
    torch.testing.assert_close(cosine.detach(), scorer(pixels, prompts), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(cosine.sum(), leaf)
    assert gradient.abs().sum((1, 2, 3)).min() > 0
    assert not any(p.requires_grad for p in scorer.model.parameters())
    larger = scorer.cosine(torch.nn.functional.interpolate(leaf, scale_factor=2, mode="nearest"), prompts)
    torch.testing.assert_close(larger, cosine, rtol=0, atol=0.2)


def test_gray_pictures_and_values_outside_the_range_keep_their_gradient(tmp_path):
    scorer = load_clip(ClipSettings(model=f"local-dir:{small_open_clip(tmp_path / 'clip')}"))
    leaf = torch.full((2, 1, 16, 16), 1.3).requires_grad_()
    (gradient,) = torch.autograd.grad(scorer.cosine(leaf, ["cat", "dog"]).sum(), leaf)
    assert (gradient != 0).any()


def own_scorer():
    return ClipScorer(Colours(), None, None, "own")


def test_a_model_of_ones_own(capsys):
    import sys

    sys.modules["own_clip"] = type(sys)("own_clip")
    sys.modules["own_clip"].make, sys.modules["own_clip"].wrong = own_scorer, 3
    scorer = load_clip(ClipSettings(model="own_clip:make"))
    assert scorer.tag == "own"
    assert "CLIP: own" in capsys.readouterr().out
    for spec, message in (
        ("own_clip:wrong", "not a stepdistill.judges.clip.ClipScorer"),
        ("own_clip:gone", "has no 'gone'"),
    ):
        with pytest.raises(UserError, match=message):
            load_clip(ClipSettings(model=spec))
    with pytest.raises(UserError, match="cannot be imported"):
        load_clip(ClipSettings(model="no_such_module_here:make"))
