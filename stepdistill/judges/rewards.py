"""Reward models as differentiable functions of pixels: human feedback learning's r_d (Hyper-SD, 2404.13686, eq. 13).

``aesthetic`` is LAION's predictor on a CLIP model's picture embeddings, ``image_reward`` is ImageReward through its own
library, ``pick_score`` (Pick-a-Pic, 2305.01569) and ``hps`` (Human Preference Score v2, 2306.09341) are the cosine of
picture and prompt by a CLIP that people's choices tuned, ``clip`` is that of any other CLIP, and ``module:attribute``
is your own.  All are frozen.  No pixel is clamped on the way, so values outside [-1, 1] keep their gradient; ReFL's
released code clamps and loses it.

``aesthetic`` was run with random weights against a hand-written forward, not with LAION's file, whose layout is that of
its author's ``simple_inference.py``.  ``pick_score`` and ``hps`` were run with small models of random weights, against
transformers, open_clip and the pictures' own transforms, not with the released weights.  :func:`load_reward` says more.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2.functional import center_crop, pad, resize

from stepdistill.config import Section, UserPath
from stepdistill.errors import UserError, described, reading, running
from stepdistill.objectives.feedback import hinge_loss
from stepdistill.plugins import import_attribute, made_by
from stepdistill.readers import read_json, read_weights
from stepdistill.stock.loading import load_network

from .clip import ClipScorer, ClipSettings
from .load import check_clip, load_clip

NEEDS = {
    "aesthetic": {
        "weights": "the predictor's file, sac+logos+ava1-l14-linearMSE.pth",
        "clip": "the CLIP model that the predictor was trained on, OpenAI's ViT-L-14-quickgelu",
    },
    "image_reward": {
        "weights": "the file ImageReward.pt",
        "config": "the file med_config.json from beside the weights",
    },
    "pick_score": {"weights": "the folder of PickScore_v1, with config.json and model.safetensors"},
    "hps": {"weights": "the file HPS_v2.1_compressed.pt, or HPS_v2_compressed.pt"},
    "clip": {"clip": "a CLIP model"},
}
"""What each kind of reward needs of the settings, and what that is."""

OPTIONAL = {"pick_score": ("config",), "hps": ("clip",)}
"""What a kind of reward takes beside that."""

HPS_MODEL = "ViT-H-14"
"""open_clip's name of the model that HPS v2 is."""


class RewardSettings(Section):
    """One reward: which, how much of it, from which files."""

    reward: str = Field(
        description="aesthetic, image_reward, pick_score, hps, clip, or module:attribute: an nn.Module or another "
        "callable of pixels and items, or a class or function without arguments that gives one"
    )
    weight: float = Field(1.0, gt=0)
    hinge: float | None = Field(
        None, description="a picture whose reward is this or more is left alone; without it the reward is maximised"
    )
    weights: UserPath | None = Field(
        None, description="a local file: aesthetic's predictor, image_reward's or hps's .pt; pick_score's folder"
    )
    config: UserPath | None = Field(
        None,
        description="image_reward's med_config.json; pick_score's tokenizer folder, that of "
        "laion/CLIP-ViT-H-14-laion2B-s32B-b79K, where the weights' folder has none",
    )
    clip: ClipSettings | None = Field(
        None,
        description="the model of clip, and of aesthetic's embeddings; hps's is ViT-H-14 unless clip.model names "
        "another of open_clip's, its file is weights and its prefix is empty",
    )

    @model_validator(mode="before")
    @classmethod
    def _hps_file(cls, raw: Any) -> Any:
        if isinstance(raw, dict) and raw.get("reward") == "hps" and isinstance(raw.get("clip"), dict):
            return {
                **raw,
                "clip": {"model": HPS_MODEL, "pretrained": raw.get("weights") or "missing", "prefix": ""} | raw["clip"],
            }
        return raw

    @model_validator(mode="after")
    def _its_own(self) -> RewardSettings:
        if self.reward not in NEEDS and ":" not in self.reward:
            raise ValueError(f"reward = {self.reward}: write {', '.join(NEEDS)} or module:attribute")
        needs = NEEDS.get(self.reward, {})
        for key in ("weights", "config", "clip"):
            given = getattr(self, key) is not None
            if key in needs and not given:
                raise ValueError(f"{key} is missing: reward = {self.reward} needs {needs[key]}")
            if given and key not in (*needs, *OPTIONAL.get(self.reward, ())):
                raise ValueError(f"{key} has no use with reward = {self.reward}; remove it")
        if self.reward == "hps" and self.clip is not None:
            if ":" in self.clip.model or self.clip.hub:
                raise ValueError(
                    f"clip.model = {self.clip.model}: reward = hps loads its weights into one of open_clip's model "
                    "names, without hub"
                )
            if self.clip.pretrained != self.weights:
                raise ValueError("clip.pretrained has no use with reward = hps, whose file is weights; remove it")
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
            UserError: the reward fails, is not (B,), or it needs prompts and these items are not.
        """
        with running(f"reward {self.name}: called on {len(pixels)} pictures it"):
            found = self.score(pixels, items)
        if not isinstance(found, Tensor) or found.shape != (len(pixels),) or not found.is_floating_point():
            raise UserError(
                f"reward {self.name}: gave {described(found)} for {len(pixels)} pictures; one number a picture, (B,), "
                "is needed"
            )
        return found

    def try_on(self, shape: tuple[int, int, int], items: list, device: str | torch.device = "cpu") -> None:
        """Ask for the rewards of two pictures (C, H, W) of noise.

        Raises:
            UserError: as :meth:`__call__`, or a reward is not finite.
        """
        pixels = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)).mul(2).sub(1).to(device)
        if not self(pixels, items).isfinite().all():
            raise UserError(f"reward {self.name}: gave a reward that is not finite for pictures of noise; mend it")

    def loss(self, pixels: Tensor, items: list) -> Tensor:
        """``weight`` times :func:`~stepdistill.objectives.feedback.hinge_loss`, a scalar."""
        return self.weight * hinge_loss(self(pixels, items), self.hinge)


class Brightness(nn.Module):
    """The mean of a picture's pixels, in [-1, 1], (B,): ``stepdistill.judges.rewards:Brightness``, for trials."""

    def forward(self, pixels: Tensor, items: list) -> Tensor:
        return pixels.flatten(1).mean(1)


class Sharpness(nn.Module):
    """The mean absolute difference of neighbouring pixels, (B,), which blur lowers:
    ``stepdistill.judges.rewards:Sharpness``."""

    def forward(self, pixels: Tensor, items: list) -> Tensor:
        across = (pixels[..., 1:] - pixels[..., :-1]).abs().flatten(1).mean(1)
        return (across + (pixels[..., 1:, :] - pixels[..., :-1, :]).abs().flatten(1).mean(1)) / 2


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


def check_models(value: Any, shape: tuple[int, int, int], items: list) -> None:
    """Refuse rewards and CLIP models, wherever they stand in a section, that are not there or whose files cannot be
    read; your own (``module:attribute``) are loaded and tried.

    Args:
        shape: (C, H, W) of the pictures; items: prompts or labels of two of them, [] for none.

    Raises:
        UserError: a file, folder or module is missing or no such model.
    """
    if isinstance(value, ClipSettings):
        check_clip(value, shape, items)
    elif isinstance(value, list):
        for own in value:
            check_models(own, shape, items)
    elif isinstance(value, Section):
        if isinstance(value, RewardSettings):
            _check_reward(value)
            if ":" in value.reward:
                load_reward(value).try_on(shape, items)
            elif value.weights is not None and Path(value.weights).is_file():
                _read_weights(value.weights, value.reward)
        for _, own in value:
            check_models(own, shape, items)


def _check_reward(settings: RewardSettings) -> None:
    if ":" in settings.reward:
        import_attribute(settings.reward, "reward")
    for key in ("weights", "config"):
        path = getattr(settings, key)
        if path is not None and not Path(path).exists():
            what = NEEDS[settings.reward].get(key, "it")
            raise UserError(f"reward {settings.reward}: {key} {path} is missing; download {what}, to that path")


def load_reward(settings: RewardSettings, device: str | torch.device = "cpu") -> Reward:
    """The reward that the settings name, on ``device``, frozen (eval, no parameter with a gradient).

    ``image_reward`` has its library's preprocessing (shorter side to 224 by bicubic, centre crop, CLIP's mean and
    standard deviation) on tensors instead of PIL images.  image-reward 1.5 itself was run beside transformers 4.55.4,
    with random weights of its architecture: rewards and gradients.  It was not run with ImageReward's weights, and it
    does not import beside the transformers that this package needs (4.56 and later dropped what it imports): there the
    library must be a patched copy, else this kind is refused.

    ``pick_score`` is the raw cosine, without the authors' factor of the exponential of ``logit_scale``, about 100: on
    a scale of 0.2, not of 20.  Its pictures are prepared as its processor does it, which is the same as
    ``image_reward``'s at the model's size.  It was checked on a small CLIPModel of random weights against transformers'
    own features and CLIPImageProcessor.

    ``hps`` is the cosine too, as ``hpsv2.score`` gives it.  Its pictures are prepared as that does it: longer side to
    the model's size by bicubic, then black at the two other sides.  A picture whose longer side is that size already
    is padded too; the library leaves it and cannot take it unless it is square.  It was checked on a small model of
    random weights in a file of HPS v2's layout: against open_clip, and against hpsv2 1.2's own model, tokenizer and
    transform, with the antialiasing that torchvision has had by default since 0.17.  The names and shapes of the two
    ViT-H-14 were compared at two layers.  The library runs in half precision, this does not.

    Neither was run with its released weights.  A function or object of your own that holds a module inside freezes that
    itself.

    Raises:
        UserError: files or packages are missing, or are not what the reward needs.
    """
    loaders = {
        "aesthetic": _aesthetic,
        "image_reward": _image_reward,
        "pick_score": _pick_score,
        "hps": _hps,
        "clip": _clip,
    }
    _check_reward(settings)
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
    with reading(f"reward {name}: weights {path}", "replace the file"):
        state = read_weights(path)
    if name == "hps" and isinstance(state, dict) and "state_dict" in state:
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"reward {name}: weights {path} holds no state dict; download {NEEDS[name]['weights']}")
    return state


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _image_reward(settings: RewardSettings, device: str | torch.device):
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
    mean, std = (torch.tensor(v, device=pixels.device).reshape(1, 3, 1, 1) for v in (ClipScorer.mean, ClipScorer.std))
    return ((cropped_square(pixels, 224) + 1) / 2 - mean) / std


def cropped_square(pixels: Tensor, size: int) -> Tensor:
    """(B, 1 or 3, H, W) to (B, 3, size, size), differentiable: shorter side to ``size`` by bicubic, centre crop."""
    images = resize(pixels.float().expand(-1, 3, -1, -1), [size], InterpolationMode.BICUBIC, antialias=True)
    return center_crop(images, [size])


def padded_square(pixels: Tensor, size: int) -> Tensor:
    """(B, 1 or 3, H, W) to (B, 3, size, size), differentiable: longer side to ``size`` by bicubic, black around it."""
    sides = [max(1, round(side * size / max(pixels.shape[-2:]))) for side in pixels.shape[-2:]]
    images = resize(pixels.float().expand(-1, 3, -1, -1), sides, InterpolationMode.BICUBIC, antialias=True)
    high, wide = (size - side for side in sides)
    return pad(images, [wide // 2, high // 2, wide - wide // 2, high - high // 2], fill=-1.0)


class _TransformersClip(nn.Module):
    """A transformers CLIPModel with the two methods that a ClipScorer calls; tokens are a tokenizer's output."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def encode_image(self, images: Tensor) -> Tensor:
        return self.model.get_image_features(pixel_values=images).pooler_output

    def encode_text(self, tokens: Any) -> Tensor:
        return self.model.get_text_features(**tokens).pooler_output


def _pick_score(settings: RewardSettings, device: str | torch.device):
    model = _pick_score_model(settings.weights)
    tokenizer = _pick_score_tokenizer(settings, model.config.text_config)
    size, length = model.config.vision_config.image_size, model.config.text_config.max_position_embeddings

    def tokens(prompts: list[str]):
        return tokenizer(prompts, padding=True, truncation=True, max_length=length, return_tensors="pt")

    towers = _frozen(_TransformersClip(model), device)
    scorer = ClipScorer(towers, None, tokens, f"PickScore {settings.weights}", device=device, size=(size, size))
    return lambda pixels, items: scorer.cosine(cropped_square(pixels, size), _prompts(items, pixels, "pick_score"))


def _pick_score_model(folder: str) -> Any:
    from transformers import CLIPModel

    remedy = f"download {NEEDS['pick_score']['weights']}, to that path"
    if not Path(folder).is_dir():
        raise UserError(f"reward pick_score: weights {folder} is no folder; {remedy}")
    what = f"reward pick_score: {folder}"
    with reading(what, remedy, "has no config.json of a model"):
        kind = read_json(Path(folder) / "config.json")["model_type"]
    if kind != "clip":
        raise UserError(f"{what} is a model of type {kind}, not clip; {remedy}")
    with reading(what, remedy, "cannot be loaded"):
        return load_network(CLIPModel, folder, what, remedy=remedy)


def _pick_score_tokenizer(settings: RewardSettings, text: Any) -> Any:
    """The tokenizer in ``config``, else in ``weights``; transformers makes an empty one of a folder without files."""
    from transformers import CLIPTokenizer

    folder = Path(settings.config or settings.weights)
    remedy = "name the folder of laion/CLIP-ViT-H-14-laion2B-s32B-b79K's tokenizer as config"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"reward pick_score: {folder} has no tokenizer (tokenizer.json, or vocab.json); {remedy}")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise UserError(
            f"reward pick_score: the tokenizer in {folder} cannot be read ({_reason(error)}); {remedy}"
        ) from None
    if len(tokenizer) != text.vocab_size or text.eos_token_id not in (2, tokenizer.eos_token_id):  # 2: it is the last
        raise UserError(
            f"reward pick_score: the tokenizer in {folder} has {len(tokenizer)} tokens, end at "
            f"{tokenizer.eos_token_id}, and the model {text.vocab_size}, end at {text.eos_token_id}; {remedy}"
        )
    return tokenizer


def _hps(settings: RewardSettings, device: str | torch.device):
    _read_weights(settings.weights, "hps")
    try:
        scorer = load_clip(
            settings.clip or ClipSettings(model=HPS_MODEL, pretrained=settings.weights, prefix=""), device
        )
    except UserError as error:
        raise UserError(f"reward hps (weights: {NEEDS['hps']['weights']}): {error}") from None
    size = scorer.size[0]
    return lambda pixels, items: scorer.cosine(padded_square(pixels, size), _prompts(items, pixels, "hps"))


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
        found = made_by(found, settings.reward, "reward")
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
