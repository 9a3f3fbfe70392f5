"""Reward models as differentiable functions of pixels: human feedback learning's r_d (Hyper-SD, 2404.13686, eq. 13).

``aesthetic`` is LAION's predictor on a CLIP model's picture embeddings, ``image_reward`` is ImageReward through its own
library, ``clip`` is the cosine of picture and prompt, and ``module:attribute`` is your own.  All are frozen.  No pixel
is clamped on the way, so values outside [-1, 1] keep their gradient; ReFL's released code clamps and loses it.

``aesthetic`` was run with random weights against a hand-written forward, not with LAION's file, whose layout is that of
its author's ``simple_inference.py``.  For ``image_reward`` see :func:`load_reward`.
"""

from __future__ import annotations

import inspect
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, resize

from stepdistill.clip import ClipScorer, ClipSettings, load_clip
from stepdistill.config import Section
from stepdistill.errors import UserError
from stepdistill.objectives.feedback import hinge_loss
from stepdistill.plugins import import_attribute

NEEDS = {
    "aesthetic": {
        "weights": "the predictor's file, sac+logos+ava1-l14-linearMSE.pth",
        "clip": "the CLIP model that the predictor was trained on, OpenAI's ViT-L-14-quickgelu",
    },
    "image_reward": {
        "weights": "the file ImageReward.pt",
        "config": "the file med_config.json from beside the weights",
    },
    "clip": {"clip": "a CLIP model"},
}
"""What each kind of reward needs of the settings, and what that is."""


class RewardSettings(Section):
    """One reward: which, how much of it, from which files."""

    reward: str = Field(
        description="aesthetic, image_reward, clip, or module:attribute: an nn.Module or another callable of pixels "
        "and items, or a class or function without arguments that gives one"
    )
    weight: float = Field(1.0, gt=0)
    hinge: float | None = Field(
        None, description="a picture whose reward is this or more is left alone; without it the reward is maximised"
    )
    weights: str | None = Field(None, description="a local file: aesthetic's predictor, image_reward's .pt")
    config: str | None = Field(None, description="image_reward's med_config.json")
    clip: ClipSettings | None = Field(None, description="the model of clip, and of aesthetic's embeddings")

    @model_validator(mode="after")
    def _its_own(self) -> RewardSettings:
        if self.reward not in NEEDS and ":" not in self.reward:
            raise ValueError(f"reward = {self.reward}: write {', '.join(NEEDS)} or module:attribute")
        needs = NEEDS.get(self.reward, {})
        for key in ("weights", "config", "clip"):
            given = getattr(self, key) is not None
            if key in needs and not given:
                raise ValueError(f"{key} is missing: reward = {self.reward} needs {needs[key]}")
            if given and key not in needs:
                raise ValueError(f"{key} has no use with reward = {self.reward}; remove it")
        return self


@dataclass
class Reward:
    """A frozen reward: ``score`` maps pixels and items to (B,), higher is better."""

    name: str
    weight: float
    hinge: float | None
    score: Callable[[Tensor, list], Tensor]

    def __call__(self, pixels: Tensor, items: list) -> Tensor:
        """Rewards (B,), differentiable in the pixels.

        Args:
            pixels: (B, 1 or 3, H, W) in [-1, 1], not clamped; items: the B prompts or labels, [] without conditions.

        Raises:
            UserError: the reward is not (B,), or it needs prompts and these items are not.
        """
        found = self.score(pixels, items)
        if not isinstance(found, Tensor) or found.shape != (len(pixels),):
            what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
            raise UserError(f"reward {self.name}: gave {what} for {len(pixels)} pictures; one number a picture, (B,)")
        return found

    def loss(self, pixels: Tensor, items: list) -> Tensor:
        """``weight`` times :func:`~stepdistill.objectives.feedback.hinge_loss`, a scalar."""
        return self.weight * hinge_loss(self(pixels, items), self.hinge)


class Brightness(nn.Module):
    """The mean of a picture's pixels, in [-1, 1], (B,): ``stepdistill.rewards:Brightness``, to try things with."""

    def forward(self, pixels: Tensor, items: list) -> Tensor:
        return pixels.flatten(1).mean(1)


class AestheticHead(nn.Module):
    """LAION's aesthetic predictor: embeddings (B, E) of any length to scores (B,), about 1 to 10.

    Five linear layers with dropout and no activation between them, on the embedding over its L2 norm; in float32 also
    under autocast, whose bfloat16 would round a score of 5 to steps of 0.03.
    """

    def __init__(self, width: int = 768):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, embeddings: Tensor) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):
            return self.layers(nn.functional.normalize(embeddings.float(), dim=-1)).squeeze(-1)


def load_reward(settings: RewardSettings, device: str | torch.device = "cpu") -> Reward:
    """The reward that the settings name, on ``device``, frozen (eval, no parameter with a gradient).

    ``image_reward`` has its library's preprocessing (shorter side to 224 by bicubic, centre crop, CLIP's mean and
    standard deviation) on tensors instead of PIL images.  image-reward 1.5 itself was run beside transformers 4.55.4,
    with random weights of its architecture: rewards and gradients.  It was not run with ImageReward's weights, and it
    does not import beside the transformers that this package needs (4.56 and later dropped what it imports): there the
    library must be a patched copy, else this kind is refused.  A function or object of your own that holds a module
    inside freezes that itself.

    Raises:
        UserError: files or packages are missing, or are not what the reward needs.
    """
    loaders = {"aesthetic": _aesthetic, "image_reward": _image_reward, "clip": _clip}
    score = loaders.get(settings.reward, _own)(settings, device)
    return Reward(settings.reward, settings.weight, settings.hinge, score)


def load_rewards(settings: list[RewardSettings], device: str | torch.device = "cpu") -> list[Reward]:
    """:func:`load_reward` for each; a second one of a name is called ``name#2``, and so on."""
    loaded: list[Reward] = []
    for own in settings:
        reward = load_reward(own, device)
        count = sum(other.name.split("#")[0] == reward.name for other in loaded)
        loaded.append(replace(reward, name=f"{reward.name}#{count + 1}") if count else reward)
    return loaded


def _frozen(model: nn.Module, device: str | torch.device) -> nn.Module:
    return model.eval().requires_grad_(False).to(device)


def _prompts(items: list, pixels: Tensor, name: str) -> list[str]:
    if len(items) != len(pixels) or not all(isinstance(item, str) for item in items):
        raise UserError(f"reward {name}: needs a prompt for each picture, and this run has none; name another reward")
    return items


def _clip(settings: RewardSettings, device: str | torch.device):
    scorer = load_clip(settings.clip, device)
    return lambda pixels, items: scorer.cosine(pixels, _prompts(items, pixels, "clip"))


def _aesthetic(settings: RewardSettings, device: str | torch.device):
    state = _read_weights(settings.weights, "aesthetic")
    first = state.get("layers.0.weight")
    head = AestheticHead(first.shape[1] if first is not None and first.ndim == 2 else 768)
    try:
        head.load_state_dict(state)
    except RuntimeError:
        raise UserError(
            f"reward aesthetic: {settings.weights} is not {NEEDS['aesthetic']['weights']}, nor of its layout "
            "(layers.0, 2, 4, 6 and 7 of widths E, 1024, 128, 64, 16, 1)"
        ) from None
    scorer, head = load_clip(settings.clip, device), _frozen(head, device)
    _check_width(scorer, head, settings, device)
    return lambda pixels, items: head(scorer.embed(pixels))


@torch.no_grad()
def _check_width(scorer: ClipScorer, head: AestheticHead, settings: RewardSettings, device) -> None:
    wanted, given = head.layers[0].in_features, scorer.embed(torch.zeros(1, 3, *scorer.size, device=device)).shape[-1]
    if wanted != given:
        raise UserError(
            f"reward aesthetic: {settings.weights} reads embeddings of length {wanted}, and the CLIP model "
            f"{scorer.tag} gives {given}; name the model that the predictor was trained on"
        )


def _read_weights(path: str, name: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a file by ``torch.save``, on the CPU; no code in it is run."""
    if not Path(path).is_file():
        raise UserError(f"reward {name}: weights {path} is missing; download {NEEDS[name]['weights']}, to that path")
    try:
        if path.endswith(".safetensors"):
            state = load_file(path)
        else:  # only a zip, torch.save's format since 1.6, can be mapped instead of read
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # unpickling raises many kinds; the user needs the file and the reason
        raise UserError(f"reward {name}: weights {path} cannot be read ({_reason(error)}); replace the file") from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"reward {name}: weights {path} holds no state dict; download {NEEDS[name]['weights']}")
    return state


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _image_reward(settings: RewardSettings, device: str | torch.device):
    if not Path(settings.config).is_file():
        raise UserError(
            f"reward image_reward: config {settings.config} is missing; download med_config.json to that path"
        )
    state = _read_weights(settings.weights, "image_reward")
    library = _image_reward_library()
    try:
        model = library.load(settings.weights, device=device, med_config=settings.config)
    except Exception as error:  # the library raises many kinds; the user needs the file and the reason
        raise UserError(
            f"reward image_reward: ImageReward cannot load {settings.weights} with {settings.config} "
            f"({_reason(error)}); it also wants the tokenizer bert-base-uncased in the Hugging Face cache"
        ) from None
    used = ("mlp.", "blip.visual_encoder.", "blip.text_encoder.")  # the library loads any file, with no complaint
    missing = [name for name, _ in model.named_parameters() if name.startswith(used) and name not in state]
    if missing:
        raise UserError(
            f"reward image_reward: {settings.weights} has no {missing[0]} ({len(missing)} such tensors); "
            f"download {NEEDS['image_reward']['weights']}"
        )
    model = _frozen(model, device)

    def score(pixels: Tensor, items: list) -> Tensor:
        tokens = model.blip.tokenizer(
            _prompts(items, pixels, "image_reward"),
            padding="max_length",
            truncation=True,
            max_length=35,
            return_tensors="pt",
        )
        pictures = image_reward_pixels(pixels)
        return model.score_gard(tokens.input_ids.to(device), tokens.attention_mask.to(device), pictures).squeeze(-1)

    return score


def image_reward_pixels(pixels: Tensor) -> Tensor:
    """ImageReward's preprocessing, differentiable: (B, 1 or 3, H, W) in [-1, 1] to (B, 3, 224, 224), normalised."""
    images = resize(pixels.float().expand(-1, 3, -1, -1), [224], InterpolationMode.BICUBIC, antialias=True)
    mean, std = (torch.tensor(v, device=pixels.device).reshape(1, 3, 1, 1) for v in (ClipScorer.mean, ClipScorer.std))
    return ((center_crop(images, [224]) + 1) / 2 - mean) / std


def _image_reward_library() -> Any:
    try:
        import ImageReward
    except ImportError as error:
        raise UserError(
            f"reward image_reward: needs the package image-reward ({_reason(error)}); pip install image-reward "
            "clip-anytorch.  Version 1.5 does not import beside transformers 4.56 or later: patch it, or name your own "
            "reward as module:attribute"
        ) from None
    return ImageReward


def _own(settings: RewardSettings, device: str | torch.device):
    found = import_attribute(settings.reward, "reward")
    if inspect.isclass(found) or (inspect.isroutine(found) and _takes_nothing(found)):
        if not _takes_nothing(found):
            raise UserError(f"reward {settings.reward!r}: a class that needs arguments; name a function that makes one")
        found = found()
    if not callable(found) or inspect.isclass(found):
        raise UserError(
            f"reward {settings.reward!r}: not an nn.Module or another callable of pixels and items, nor a class or "
            "function without arguments that gives one"
        )
    return _frozen(found, device) if isinstance(found, nn.Module) else found


def _takes_nothing(function: Callable) -> bool:
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError):  # needs arguments, or is a builtin that does not say
        return False
    return True
