"""Protocols of papers by name.  A preset is data: settings, and what must be on this machine for it.

The protocol's line says what differs from the preset's settings; nothing is downloaded.
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

from .settings import Protocol


class Preset(Section):
    """A protocol: its settings, and in words which files the user has to bring."""

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
"""EDM's FID (2206.00364): 50,000 pictures as drawn, labels in turn, the resize inside of Inception."""

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
"""Settings that may be added to a preset's and leave its protocol what it is."""


def make_protocol(preset: str | None, options: dict[str, Any], overrides: list[str]) -> Protocol:
    """The protocol of a preset (or the defaults) with a user's options over it.

    Args:
        options: as :class:`Protocol` has them.
        overrides: ``key=value``, over both.

    Raises:
        UserError: no such preset, a setting that is wrong, or files that the preset needs and that are missing.
    """
    if preset is None:
        return check(Protocol, apply_overrides(options, overrides), "evaluate")
    if preset not in PRESETS:
        listed = "; ".join(f"{name}: {known.title}" for name, known in PRESETS.items())
        raise UserError(f"--preset {preset}: not known; use one of {listed}")
    chosen = PRESETS[preset]
    raw = apply_overrides(merge(chosen.settings, options), overrides)
    _check_files(preset, chosen, raw)
    protocol = check(Protocol, raw, f"preset {preset}")
    fixed = {key: value for key, value in chosen.settings.items() if key != "clip"}
    if "clip" in chosen.settings:
        fixed["clip"] = {**chosen.settings["clip"], "pretrained": "any"}
    plain = Protocol.model_validate(fixed)
    changes = differences(_fixed_part(plain, chosen), _fixed_part(protocol, chosen))
    text = ", ".join(change.replace(" there, ", " in the preset, ").replace(" now)", " here)") for change in changes)
    return protocol.model_copy(update={"preset": f"{preset}, but {text}" if changes else preset})


def _fixed_part(protocol: Protocol, preset: Preset) -> dict[str, Any]:
    """What a preset fixes: all but files' places and what may be measured besides."""
    part = {key: value for key, value in protocol.model_dump(mode="json").items() if key not in FREE}
    if "clip" not in preset.settings:
        part["clip"] = None
    kind = part["extractor"].partition(":")[0]
    if kind in ("inception", "inception_tensorflow"):
        part["extractor"] = kind
    if part["clip"] is not None:
        part["clip"] = {key: value for key, value in part["clip"].items() if key not in ("pretrained", "hub")}
    return part


def _check_files(name: str, preset: Preset, raw: dict[str, Any]) -> None:
    """
    Raises:
        UserError: files are missing; one line names each of them.
    """
    missing = []
    kind, _, place = str(raw.get("extractor")).partition(":")
    weights = weights_file(user_path(place, "extractor") if place else None)
    if kind in ("inception", "inception_tensorflow") and not weights.is_file():
        missing.append(f"Inception's weights {weights} (download {URL} to there)")
    needed = [
        ("--reference", preset.reference, raw.get("reference")),
        ("--prompts", preset.prompts, raw.get("prompts")),
    ]
    clip = raw.get("clip")
    model = str((clip or {}).get("model"))
    if clip and not clip.get("hub") and ":" not in model and not model.endswith(".safetensors"):
        needed.append(("--clip-weights", preset.clip, clip.get("pretrained")))
    for option, what, path in needed:
        if what is not None and path is None:
            missing.append(f"{option}: {what}")
        elif path is not None and not Path(assets.resolve(user_path(str(path), option))).exists():
            missing.append(f"{option} {path}: no such file; it is {what or 'a local one'}")
    if missing:
        raise UserError(f"--preset {name} needs on this machine, and downloads nothing: {'; '.join(missing)}")
