"""Protocols of papers by name.  A preset is data: settings, and what must lie on this machine for it.

What differs from a preset's own settings is said in the protocol's line; nothing is downloaded.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field

from stepdistill import assets
from stepdistill.config import Section, apply_overrides, check, merge, user_path
from stepdistill.errors import UserError
from stepdistill.eval.extractors.inception import URL, weights_file
from stepdistill.run import differences

from .evaluate import EvaluationSettings


class Preset(Section):
    """A protocol: its settings, and in words what the user's own files are."""

    title: str
    settings: dict[str, Any]
    reference: str | None = Field(None, description="what --reference is; None: shipped")
    prompts: str | None = Field(None, description="what --prompts is; None: takes none")
    clip: str | None = Field(None, description="what --clip-weights is; None: no CLIP score")


CLIP_WEIGHTS = "open_clip_pytorch_model.bin of laion/CLIP-ViT-g-14-laion2B-s12B-b42K"
COCO = {
    "batch_size": 16,
    "seed": 10,
    "extractor": "inception",
    "quantise": "floor",
    "reference_files": "stored",
    "clip_resize": 256,
    "clip": {"model": "ViT-g-14", "prefix": "A photo depicts "},
    "distinct_prompts": True,
    "kid": False,
}
"""What DMD2's two protocols share (2405.14867, its main/coco_eval): pixels cut to bytes, centre crop to the shorter
side, PIL's Lanczos filter, clean-fid's "clean" Inception; CLIP scores by ViT-g-14 of 256x256 pictures, mean cosine."""
EDM = {"samples": 50000, "extractor": "inception_tensorflow", "labels": "uniform", "kid": False}
"""EDM's FID (2206.00364): 50,000 pictures as drawn, labels in turn, Inception's own resize inside."""

PRESETS = {
    "coco30k": Preset(
        title="zero-shot COCO-30k as DMD2's code measures Stable Diffusion 1.5",
        settings={**COCO, "samples": 30000, "drawn_side": 512, "resize": 256},
        reference="the folder of COCO's val2014 pictures, 40,504 of them, or statistics made of it",
        prompts="30,000 captions of COCO's val2014, one a line, such as DMD2's captions_coco14_test.txt",
        clip=CLIP_WEIGHTS,
    ),
    "coco10k-sdxl": Preset(
        title="COCO-10k as DMD2's code measures SDXL, without its patch FID",
        settings={**COCO, "samples": 10000, "batch_size": 4, "drawn_side": 1024, "resize": 512},
        reference="the folder of COCO's val2014 pictures, or statistics made of it",
        prompts="10,000 captions of COCO's val2014, one a line",
        clip=CLIP_WEIGHTS,
    ),
    "imagenet64": Preset(
        title="ImageNet 64x64 as EDM measures it, labels in turn",
        settings={**EDM, "batch_size": 100, "drawn_side": 64},
        reference="EDM's imagenet-64x64.npz (arrays mu and sigma)",
    ),
    "cifar10": Preset(
        title="CIFAR-10 as EDM measures it, labels in turn",
        settings={**EDM, "batch_size": 250, "drawn_side": 32},
        reference="EDM's cifar10-32x32.npz (arrays mu and sigma)",
    ),
    "fashion_mnist": Preset(
        title="the quickstart's: shipped feature network and statistics of Fashion-MNIST at 16x16",
        settings={"samples": 5000, "batch_size": 250, "seed": 1234, "extractor": "fashion_mnist"},
    ),
}

FREE = {
    "prompts",
    "prompt_column",
    "reference",
    "preset",
    "rewards",
    "latency",
    "latency_batch",
    "precision_recall",
    "neighbours",
}
FREE |= {"diversity", "seeds", "kid", "kid_subsets", "kid_subset_size"}
"""Settings that may be set beside a preset's and leave its protocol what it is."""


def make_settings(preset: str | None, given: dict[str, Any], overrides: list[str]) -> EvaluationSettings:
    """The settings of a preset (or the defaults) with what was given over them.

    Args:
        given: as :class:`EvaluationSettings` has them.
        overrides: ``key=value``, over both.

    Raises:
        UserError: no such preset, a setting that is wrong, or files that the preset needs and that are not there.
    """
    if preset is None:
        return check(EvaluationSettings, apply_overrides(given, overrides), "evaluate")
    if preset not in PRESETS:
        listed = "; ".join(f"{name}: {own.title}" for name, own in PRESETS.items())
        raise UserError(f"--preset {preset}: not known; use one of {listed}")
    own = PRESETS[preset]
    raw = apply_overrides(merge(own.settings, given), overrides)
    _check_files(preset, own, raw)
    settings = check(EvaluationSettings, raw, f"preset {preset}")
    fixed = {key: value for key, value in own.settings.items() if key != "clip"}
    if "clip" in own.settings:
        fixed["clip"] = {**own.settings["clip"], "pretrained": "any"}
    plain = EvaluationSettings.model_validate(fixed)
    changed = differences(_protocol(plain, own), _protocol(settings, own))
    said = ", ".join(text.replace(" there, ", " in the preset, ").replace(" now)", " here)") for text in changed)
    return settings.model_copy(update={"preset": f"{preset}, but {said}" if changed else preset})


def _protocol(settings: EvaluationSettings, preset: Preset) -> dict[str, Any]:
    """What a preset fixes: all but files' places and what is measured beside."""
    kept = {key: value for key, value in settings.model_dump(mode="json").items() if key not in FREE}
    if "clip" not in preset.settings:
        kept["clip"] = None
    kind = kept["extractor"].partition(":")[0]
    if kind in ("inception", "inception_tensorflow"):
        kept["extractor"] = kind
    if kept["clip"] is not None:
        kept["clip"] = {key: value for key, value in kept["clip"].items() if key not in ("pretrained", "hub")}
    return kept


def _check_files(name: str, preset: Preset, raw: dict[str, Any]) -> None:
    """One line that names every file that is missing.

    Raises:
        UserError: there is one.
    """
    missing = []
    kind, _, place = str(raw.get("extractor")).partition(":")
    weights = weights_file(user_path(place, "extractor") if place else None)
    if kind in ("inception", "inception_tensorflow") and not weights.is_file():
        missing.append(f"Inception's weights {weights} (download {URL} to there)")
    wanted = [
        ("--reference", preset.reference, raw.get("reference")),
        ("--prompts", preset.prompts, raw.get("prompts")),
    ]
    clip = raw.get("clip")
    model = str((clip or {}).get("model"))
    if clip and not clip.get("hub") and ":" not in model and not model.endswith(".safetensors"):
        wanted.append(("--clip-weights", preset.clip, clip.get("pretrained")))
    for option, what, path in wanted:
        if what is not None and path is None:
            missing.append(f"{option}: {what}")
        elif path is not None and not Path(assets.resolve(user_path(str(path), option))).exists():
            missing.append(f"{option} {path}: no such file; it is {what or 'a local one'}")
    if missing:
        raise UserError(f"--preset {name} needs on this machine, and downloads nothing: {'; '.join(missing)}")
