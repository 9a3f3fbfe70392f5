"""CLIP-like models by what a config says: open_clip's, a small one of stepdistill's, or a user's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stepdistill import assets
from stepdistill.errors import UserError, first_line, running
from stepdistill.plugins import call_factory, import_attribute

from .clip import ClipScorer, ClipSettings
from .contrastive import MatchingNetwork


def load_clip(settings: ClipSettings, device: str | torch.device = "cpu") -> ClipScorer:
    """A frozen model: open_clip's from a local file or folder, or from the hub where ``hub`` allows it, or a user's.

    Prints its tag.

    Raises:
        UserError: the package or the weights are missing, or open_clip cannot load them.
    """
    if settings.model.endswith(".safetensors"):
        return _load_matching_network(settings, device)
    if _is_user_module(settings):
        return _import_scorer(settings, device)
    _check_weights(settings)
    open_clip: Any = _import_open_clip()
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            settings.model, pretrained=settings.pretrained, device=device
        )
        tokenizer = open_clip.get_tokenizer(settings.model)
    except Exception as error:  # open_clip raises many kinds; the user needs the model and the reason
        raise UserError(f"clip {settings.tag}: open_clip cannot load it ({first_line(error)})") from None
    print(f"CLIP: {settings.tag}")
    scorer = ClipScorer(_freeze(model), transform, tokenizer, settings.tag, settings.prefix, device)
    normalisation = getattr(getattr(model, "visual", None), "preprocess_cfg", None)
    if not normalisation:
        return scorer
    return replace(scorer, **{key: normalisation[key] for key in ("size", "mean", "std")})


def _is_user_module(settings: ClipSettings) -> bool:
    """Whether the model is named as ``module:attribute``."""
    return ":" in settings.model and not settings.model.startswith(("local-dir:", "hf-hub:"))


def _freeze(model: Any) -> Any:
    return model.eval().requires_grad_(False) if isinstance(model, nn.Module) else model


def _load_matching_network(settings: ClipSettings, device: str | torch.device) -> ClipScorer:
    scorer = MatchingNetwork.load(assets.resolve(settings.model)).to(device).make_scorer(device)
    print(f"CLIP: {scorer.tag}")
    return scorer


def _import_scorer(settings: ClipSettings, device: str | torch.device) -> ClipScorer:
    """The scorer at ``module:attribute``, or what that gives when it is called."""
    scorer = import_attribute(settings.model, "clip")
    if callable(scorer) and not isinstance(scorer, ClipScorer):
        scorer = call_factory(scorer, settings.model, "clip")
    if not isinstance(scorer, ClipScorer):
        raise UserError(
            f"clip {settings.model!r}: not a stepdistill.judges.clip.ClipScorer, nor a function that gives one"
        )
    print(f"CLIP: {scorer.tag}")
    model = scorer.model.to(device) if isinstance(scorer.model, nn.Module) else scorer.model
    return replace(scorer, model=_freeze(model), device=device)


def check_clip(settings: ClipSettings, shape: tuple[int, int, int], items: list) -> None:
    """Refuse a model whose file, folder or module is missing; a user's module is loaded and tried.

    Args:
        shape: (C, H, W) of the pictures; items: prompts of two of them; what is no prompt is not tried.

    Raises:
        UserError: it is missing, or fails.
    """
    if settings.model.endswith(".safetensors"):
        if not Path(assets.resolve(settings.model)).is_file():
            raise UserError(f"clip: {settings.model}: no such file")
    elif _is_user_module(settings):
        scorer = _import_scorer(settings, "cpu")
        if items and all(isinstance(item, str) for item in items):
            with running(f"clip {settings.model!r}: called on two pictures it"):
                cosine = scorer.cosine(torch.zeros(2, *shape), items)
            if not isinstance(cosine, Tensor) or cosine.shape != (2,) or not cosine.isfinite().all():
                raise UserError(f"clip {settings.model!r}: gave no finite number for each of two pictures; mend it")
    else:
        _check_weights(settings)


def _check_weights(settings: ClipSettings) -> None:
    folder = settings.model.removeprefix("local-dir:")
    if folder != settings.model:
        if not Path(folder).is_dir():
            raise UserError(f"clip: folder {folder} is missing; put open_clip's config and weights of a model there")
    elif not settings.hub and not Path(str(settings.pretrained)).is_file():  # hf-hub: has hub, by the settings' check
        raise UserError(
            f"clip: weight file {settings.pretrained} of {settings.model} is missing; download it from the model's "
            "page on the Hugging Face hub to that path, or set hub=true and a tag of open_clip's"
        )


def _import_open_clip() -> Any:
    try:
        import open_clip
    except ImportError as error:
        raise UserError(f"clip: needs the package open_clip_torch ({error}); pip install 'stepdistill[eval]'") from None
    return open_clip
