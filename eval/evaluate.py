"""Measuring pipelines against one reference under one protocol, and remembering what was measured.

Every target draws from the same noise, labels or prompts.  A row of ``evaluation.json`` is keyed by a fingerprint of
the pipeline's files, its steps and the protocol; what has not changed is not measured again.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator
from torch import Tensor
from tqdm import tqdm

from stepdistill import assets
from stepdistill.clip import ClipScorer, ClipSettings, load_clip
from stepdistill.config import Section
from stepdistill.data import read_prompts
from stepdistill.errors import UserError
from stepdistill.rewards import Reward, RewardSettings, load_rewards

from .distances import ReferenceStatistics, unit_uint8
from .features import Extractor, load_extractor, reference_beside
from .latency import counted_passes, device_name, measure_latency
from .stock import StockPipeline, pipeline_folder

PACKAGES = ("stepdistill", "torch", "diffusers", "torchmetrics")


@dataclass(frozen=True)
class Target:
    """A pipeline to measure: its name in tables, its folder, and how it is called.

    ``steps`` and ``guidance_scale`` None mean what the folder's provenance says.
    """

    name: str
    path: str | Path
    steps: int | None = None
    guidance_scale: float | None = None


class EvaluationSettings(Section):
    """What is measured, and how."""

    samples: int = Field(5000, ge=2, description="pictures drawn from each target")
    batch_size: int = Field(250, ge=1, description="pictures at a time; a part of the protocol, as noise is")
    seed: int = Field(0, ge=0)
    extractor: str = Field("fashion_mnist", description="an asset's name, a file, inception, module:attribute")
    reference: str | None = Field(None, description="reference statistics; None: beside the extractor's file")
    kid: bool = Field(True, description="the kernel distance too")
    kid_subsets: int = Field(100, ge=1)
    kid_subset_size: int = Field(1000, ge=2)
    clip: ClipSettings | None = Field(None, description="the CLIP score too (prompt pipelines)")
    rewards: list[RewardSettings] = Field([], description="means of these over the pictures too")
    labels: Literal["uniform"] | list[int] = Field(
        "uniform", description="which labels, taken in turn: all of them, or the ones named"
    )
    prompts: str | None = Field(None, description="a file with one prompt a line, taken in turn")
    latency: bool = Field(False, description="time single calls, with the share of each part")
    latency_batch: int = Field(1, ge=1)
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="what the pipelines are loaded in")

    @field_validator("labels")
    @classmethod
    def _some_labels(cls, labels):
        if labels == []:
            raise ValueError("names no label; leave it out for all of them")
        return labels


@dataclass
class _Tools:
    """What a measurement needs, loaded once for all targets."""

    settings: EvaluationSettings
    extractor: Extractor
    reference: ReferenceStatistics
    scorer: ClipScorer | None
    rewards: list[Reward]
    prompts: list[str] | None
    device: torch.device


def unit_noise(seed: int, batch: int, count: int, shape: tuple[int, ...]) -> Tensor:
    """Unit normal noise (count, *shape), float32, a function of its arguments alone, drawn on the CPU."""
    return torch.randn(count, *shape, generator=step_generator(seed, batch, stream=0))


def step_generator(seed: int, batch: int, stream: int = 1) -> torch.Generator:
    """A CPU generator seeded by (seed, batch, stream): stream 0 starts samples, 1 is for noise between steps."""
    state = np.random.SeedSequence((seed, batch, stream)).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))


def conditions_for(
    stock: StockPipeline,
    indices: range,
    prompts: list[str] | None = None,
    labels: Literal["uniform"] | list[int] = "uniform",
) -> list | None:
    """The conditions of samples ``indices``: labels or prompts in turn, None for an unconditional pipeline.

    Raises:
        UserError: a prompt pipeline without prompts.
    """
    match stock.condition_kind:
        case "none":
            return None
        case "label":
            known = stock.labels if labels == "uniform" else labels
            return [known[index % len(known)] for index in indices]
    if not prompts:
        raise UserError(f"pipeline {stock.path}: draws from prompts; set prompts to a file with one a line")
    return [prompts[index % len(prompts)] for index in indices]


def resolve(target: Target, stock: StockPipeline) -> tuple[int, float | None]:
    """The steps and guidance scale that ``target`` is called with.

    Raises:
        UserError: neither the target nor the folder says how many steps.
    """
    steps = target.steps if target.steps is not None else stock.default_steps
    if steps is None:
        raise UserError(f"{target.name} ({target.path}): says nothing of its steps; give their number")
    guidance = target.guidance_scale if target.guidance_scale is not None else stock.default_guidance
    return steps, guidance


def samples(
    stock: StockPipeline,
    steps: int,
    guidance: float | None,
    settings: EvaluationSettings,
    prompts: list[str] | None = None,
) -> Iterator[tuple[Tensor, list | None]]:
    """Batches of (pixels (B, C, H, W) in [0, 1] on the CPU, their conditions), ``settings.samples`` in all."""
    for batch, start in enumerate(range(0, settings.samples, settings.batch_size)):
        indices = range(start, min(start + settings.batch_size, settings.samples))
        conditions = conditions_for(stock, indices, prompts, settings.labels)
        noise = unit_noise(settings.seed, batch, len(indices), stock.noise_shape)
        generator = step_generator(settings.seed, batch)
        yield stock.generate(conditions, noise, steps, generator, guidance).cpu(), conditions


def evaluate(
    targets: list[Target], settings: EvaluationSettings, out: str | Path, device: str | torch.device = "cpu"
) -> list[dict[str, Any]]:
    """Measure every target; write ``evaluation.json`` after each, whole or not at all.

    Args:
        targets: the first is what the others are compared with in tables.
        out: the file, or a folder for ``evaluation.json``.

    Returns:
        One row a target, in their order.  Keys: name, path, steps, guidance_scale, passes_per_image, parameters,
        samples, frechet, kid_mean, kid_std, clip_score, rewards, seconds, images_per_second, latency,
        fingerprint (None where not asked for).

    Raises:
        UserError: a target, extractor, reference or setting that does not fit.
    """
    file = Path(out) if Path(out).suffix == ".json" else Path(out) / "evaluation.json"
    tools = _load_tools(settings, torch.device(device))
    protocol = _protocol(tools)
    known = {row["fingerprint"]: row for row in _earlier_rows(file)}
    keys = [_fingerprint(target, protocol) for target in targets]
    rows: list[dict | None] = [known.get(key) for key in keys]
    for position, (target, key) in enumerate(zip(targets, keys, strict=True)):
        if rows[position] is not None:
            print(f"{target.name}: unchanged, its numbers are taken from {file}")
            rows[position] = {**rows[position], "name": target.name, "path": str(target.path)}
        else:
            rows[position] = {**_measure(target, tools), "fingerprint": key}
        _write(file, protocol, [row for row in rows if row is not None])
    return rows


def _load_tools(settings: EvaluationSettings, device: torch.device) -> _Tools:
    extractor = load_extractor(settings.extractor, device)
    path = reference_beside(settings.extractor) if settings.reference is None else assets.resolve(settings.reference)
    if path is None:
        raise UserError(
            f"reference is not set, and extractor {settings.extractor!r} ships with none; make one of your real "
            "pictures and name its file"
        )
    reference = ReferenceStatistics.load(path)
    reference.check(extractor)
    return _Tools(
        settings=settings,
        extractor=extractor,
        reference=reference,
        scorer=None if settings.clip is None else load_clip(settings.clip, device),
        rewards=load_rewards(settings.rewards, device),
        prompts=None if settings.prompts is None else read_prompts(settings.prompts),
        device=device,
    )


def _protocol(tools: _Tools) -> dict[str, Any]:
    """All that the numbers depend on but the target."""
    reference, prompts = tools.reference, tools.prompts
    return {
        "metric": tools.extractor.metric,
        "kernel_metric": tools.extractor.kernel_metric,
        "extractor": tools.extractor.name,
        "extractor_fingerprint": tools.extractor.fingerprint,
        "resize": tools.extractor.resize,
        "reference": {
            "source": reference.source,
            "n": reference.n,
            "resize": reference.resize,
            "fingerprint": reference.fingerprint,
        },
        "clip": None if tools.scorer is None else tools.scorer.tag,
        "prompts_fingerprint": None if prompts is None else hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "settings": tools.settings.model_dump(mode="json"),
        "device": device_name(tools.device),
        "versions": {name: version(name) for name in PACKAGES},
    }


def _fingerprint(target: Target, protocol: dict[str, Any]) -> str:
    """SHA-256 of the folder's files (model card aside), the steps, the guidance and the protocol."""
    call = {"steps": target.steps, "guidance_scale": target.guidance_scale, "protocol": protocol}
    digest = hashlib.sha256(json.dumps(call, sort_keys=True).encode())
    folder = pipeline_folder(target.path)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".md":
            digest.update(str(path.relative_to(folder)).encode())
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _earlier_rows(file: Path) -> list[dict]:
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
        return [row for row in rows if "fingerprint" in row]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError):
        print(f"{file}: not readable, so everything is measured again")
        return []


def _write(file: Path, protocol: dict[str, Any], rows: list[dict]) -> None:
    content = {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "protocol": protocol, "rows": rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    temporary.replace(file)


def _measure(target: Target, tools: _Tools) -> dict[str, Any]:
    settings = tools.settings
    stock = StockPipeline.load(target.path, tools.device, getattr(torch, settings.dtype))
    steps, guidance = resolve(target, stock)
    if tools.scorer is not None and stock.condition_kind != "prompt":
        raise UserError(f"{target.name}: the CLIP score needs prompts, and {target.path} takes none; leave clip out")
    features, scores, rewards, seconds, passes = _draw(target, stock, steps, guidance, tools)
    kid_mean, kid_std = (None, None)
    if settings.kid:
        kid_mean, kid_std = tools.reference.kernel(
            features, settings.kid_subsets, settings.kid_subset_size, settings.seed
        )
    latency = None
    if settings.latency:
        latency = measure_latency(stock, steps, settings.latency_batch, guidance).as_dict()
    return {
        "name": target.name,
        "path": str(target.path),
        "steps": steps,
        "guidance_scale": guidance,
        "passes_per_image": passes,
        "parameters": [sum(p.numel() for p in network.parameters()) for network in stock.denoisers],
        "samples": settings.samples,
        "frechet": tools.reference.frechet(features),
        "kid_mean": kid_mean,
        "kid_std": kid_std,
        "clip_score": None if scores is None else float(scores.mean()),
        "rewards": rewards,
        "seconds": seconds,
        "images_per_second": settings.samples / seconds,
        "latency": latency,
    }


def _draw(
    target: Target, stock: StockPipeline, steps: int, guidance: float | None, tools: _Tools
) -> tuple[Tensor, Tensor | None, dict[str, float], float, float]:
    """Features (N, F), CLIP scores (N,) or None, mean rewards, seconds of drawing alone, passes per picture."""
    features, scores, seconds = [], [], 0.0
    rewards: dict[str, float] = {reward.name: 0.0 for reward in tools.rewards}

    batches = samples(stock, steps, guidance, tools.settings, tools.prompts)
    title = f"{target.name}, {plural(steps)}"
    with counted_passes(stock) as passed, tqdm(total=tools.settings.samples, desc=title, unit="img") as bar:
        started = time.perf_counter()
        for pixels, conditions in batches:
            seconds += time.perf_counter() - started
            if not pixels.isfinite().all():
                raise UserError(
                    f"{target.name} ({target.path}): drew pixels that are not numbers; its weights are broken, "
                    "or its dtype too narrow"
                )
            tools.reference.check(tools.extractor, tuple(pixels.shape[1:]))
            features.append(tools.extractor(unit_uint8(pixels).to(tools.device)))
            if tools.scorer is not None:
                scores.append(tools.scorer(unit_uint8(pixels), conditions))
            for reward in tools.rewards:
                given = 2 * pixels.to(tools.device) - 1
                rewards[reward.name] += float(reward(given, conditions or []).sum()) / tools.settings.samples
            bar.update(len(pixels))
            started = time.perf_counter()
    scored = torch.cat(scores) if scores else None
    return torch.cat(features), scored, rewards, seconds, passed[0] / tools.settings.samples


def plural(steps: int) -> str:
    """``1 step``, ``25 steps``."""
    return f"{steps} step" if steps == 1 else f"{steps} steps"
