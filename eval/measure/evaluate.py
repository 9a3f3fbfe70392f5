"""Measuring pipelines against one reference under one protocol, and remembering what was measured.

Every target draws from the same noise, labels or prompts.  A row of ``evaluation.json`` is keyed by a fingerprint of
the pipeline's files, its steps and the protocol; what has not changed is not measured again.  What is drawn is kept in
a work folder beside the output until its row is written (:mod:`.drawing`), so a stop costs one batch.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from stepdistill import assets, files
from stepdistill.config import Section, UserPath
from stepdistill.data.sources import given_prompts
from stepdistill.errors import UserError, reading, writing
from stepdistill.eval.extractors.base import Extractor, load_extractor
from stepdistill.eval.speed.latency import measure_latency
from stepdistill.eval.stock_pipeline import StockPipeline, pipeline_folder
from stepdistill.judges.clip import ClipScorer, ClipSettings, load_clip
from stepdistill.judges.rewards import Reward, RewardSettings, load_rewards
from stepdistill.readers import check_extent
from stepdistill.seeds import SEEDS, DistinctSeeds, Seed, generator
from stepdistill.settings import ImagesSettings, PromptColumnSettings

from . import protocols
from .frechet import ReferenceStatistics
from .metrics import check_diversity, numbers, over_seeds, pooled_diversity
from .preprocessing import Treatment
from .processes import Processes
from .references import load_reference
from .sampling import batches, draw, drawn, pictures_kept

STREAMS = 2
"""Generators for each batch: where samples start, and noise between steps."""
PACKAGES = ("stepdistill", "torch", "diffusers", "torchmetrics")


@dataclass(frozen=True)
class Target:
    """A pipeline to measure: its name in tables, its folder, and how it is called.

    ``steps`` and ``guidance_scale`` None mean what the folder's provenance says, ``null_label`` None its network's;
    ``variant`` is of the weights.
    """

    name: str
    path: str | Path
    steps: int | None = None
    guidance_scale: float | None = None
    null_label: int | None = None
    variant: str | None = None

    @classmethod
    def parse(cls, text: str) -> Target:
        """``[NAME=]PATH[@STEPS[@GUIDANCE]]``; by default called as its folder is.

        Raises:
            UserError: steps or a guidance scale that are no numbers, or an asset that is not shipped.
        """
        name, _, place = text.rpartition("=")
        path, *call = place.rsplit("@", 2)
        if len(call) == 2 and not call[0].isdigit():  # an @ of the path
            path, call = f"{path}@{call[0]}", call[1:]
        steps, guidance = [*call, None, None][:2]
        if steps is not None and not re.fullmatch("[1-9][0-9]*", steps):
            raise UserError(f"{text}: what follows @ is a number of steps, at least 1")
        if guidance is not None and not re.fullmatch(r"\d+(\.\d+)?", guidance):
            raise UserError(f"{text}: what follows the second @ is a guidance scale")
        return cls(
            name or Path(path).name,
            assets.resolve(os.path.expanduser(path)),
            None if steps is None else int(steps),
            None if guidance is None else float(guidance),
        )


class EvaluationSettings(Section):
    """What is measured, and how."""

    samples: int = Field(5000, ge=2, le=10**7, description="pictures drawn from each target")
    batch_size: int = Field(250, ge=1, le=65_536, description="pictures at a time; a part of the protocol, as noise is")
    seed: Seed = 0
    seeds: int = Field(
        1, ge=1, le=1000, description="repeats, with seed, seed + 1, ...; means and standard deviations of them"
    )
    extractor: UserPath = Field(
        "fashion_mnist",
        description="an asset's name, a file, inception, inception_tensorflow, dinov2:PATH, module:attribute",
    )
    reference: UserPath | None = Field(
        None, description="reference statistics, or with resize a folder of pictures; None: beside the extractor's file"
    )
    reference_files: Literal["shown", "stored"] = Field(
        "shown",
        description="a reference folder's pictures: as a viewer shows them (EXIF orientation, white under "
        "transparency), or the stored pixels, as clean-fid's and DMD2's code reads them",
    )
    drawn_side: int | None = Field(None, ge=1, le=65_536, description="refuse pictures that are not drawn at this side")
    quantise: Literal["round", "floor"] = Field("round", description="pixels to bytes")
    resize: int | None = Field(
        None, ge=1, le=8192, description="centre crop and PIL's Lanczos filter to this side before the extractor"
    )
    clip_resize: int | None = Field(None, ge=1, le=8192, description="the same before the CLIP model")
    kid: bool = Field(True, description="the kernel distance too, where the reference keeps features")
    kid_subsets: int = Field(100, ge=1, le=100_000)
    kid_subset_size: int = Field(1000, ge=2, le=10**6)
    precision_recall: bool = Field(False, description="improved precision and recall too")
    neighbours: int = Field(3, ge=1, le=1000, description="their k")
    diversity: bool = Field(False, description="the mean distance of pictures of one condition too")
    clip: ClipSettings | None = Field(None, description="the CLIP score too (prompt pipelines)")
    rewards: list[RewardSettings] = Field([], description="means of these over the pictures too")
    labels: Literal["uniform"] | list[int] = Field(
        "uniform", description="which labels, taken in turn: all of them, or the ones named"
    )
    prompts: UserPath | None = Field(
        None, description="a file or folder as a run's data.prompts, taken in turn; of several captions the first"
    )
    prompt_column: str | None = Field(None, description="its column; by default the first of text, prompt, caption")
    prompt_dataset: PromptColumnSettings | None = Field(None, description="a dataset's column in place of a file")
    prompt_images: ImagesSettings | None = Field(None, description="the captions of pictures in place of a file")
    distinct_prompts: bool = Field(False, description="refuse fewer prompts than samples")
    preset: str | None = Field(None, description="the preset that these settings are, and what differs from it")
    latency: bool = Field(False, description="time single calls, with the share of each part")
    latency_batch: int = Field(1, ge=1, le=65_536)
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="what the pipelines are loaded in")

    @field_validator("labels")
    @classmethod
    def _some_labels(cls, labels):
        if labels == []:
            raise ValueError("names no label; leave it out for all of them")
        return labels

    @model_validator(mode="after")
    def _seeds(self):
        if self.seed + self.seeds > SEEDS:
            raise ValueError(f"seed = {self.seed}: the last of {self.seeds} seeds is above {SEEDS - 1:,}; take a lower")
        return self


@dataclass(frozen=True)
class _Tools:
    """What a measurement needs, loaded once for all targets.

    ``work``: the folder for what was drawn; of one target while it is measured.
    """

    settings: EvaluationSettings
    extractor: Extractor
    reference: ReferenceStatistics
    treatment: Treatment
    clip_treatment: Treatment
    scorer: ClipScorer | None
    rewards: list[Reward]
    prompts: list[str] | None
    device: torch.device
    processes: Processes
    work: Path
    keep_samples: Path | None
    versions: dict[str, str]


def prompts_to_draw(settings: EvaluationSettings, notes: list[str] | None = None) -> list[str] | None:
    """The prompts that the settings name (None: none); ``notes`` gets what a user should know of them, a line each."""
    prompts = given_prompts(
        settings.prompts, settings.prompt_dataset, settings.prompt_column, settings.prompt_images, notes, ""
    )
    return prompts and [str(prompt) for prompt in prompts]


def unit_noise(seed: int, batch: int, count: int, shape: tuple[int, ...]) -> Tensor:
    """Unit normal noise (count, *shape), float32, a function of its arguments alone, drawn on the CPU."""
    return torch.randn(count, *shape, generator=step_generator(seed, batch, stream=0))


def step_generator(seed: int, batch: int, stream: int = 1) -> torch.Generator:
    """A CPU generator of (seed, batch, stream): stream 0 starts samples, 1 is for noise between steps.

    No two of one seed are alike.
    """
    return generator(_batch_seeds(seed)[STREAMS * batch + stream])


@functools.lru_cache
def _batch_seeds(seed: int) -> DistinctSeeds:
    def hashed(index: int) -> int:
        state = np.random.SeedSequence((seed, *divmod(index, STREAMS))).generate_state(1, np.uint64)[0]
        return int(state >> np.uint64(1))

    return DistinctSeeds(hashed)


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


def drawn_batch(
    stock: StockPipeline,
    steps: int,
    guidance: float | None,
    settings: EvaluationSettings,
    batch: int,
    indices: range,
    seed: int,
    prompts: list[str] | None = None,
) -> tuple[Tensor, list | None]:
    """(pixels (B, C, H, W) in [0, 1] on the CPU, their conditions) of samples ``indices``, from (seed, batch) alone."""
    conditions = conditions_for(stock, indices, prompts, settings.labels)
    noise = unit_noise(seed, batch, len(indices), stock.noise_shape)
    return stock.generate(conditions, noise, steps, step_generator(seed, batch), guidance).cpu(), conditions


def samples(
    stock: StockPipeline,
    steps: int,
    guidance: float | None,
    settings: EvaluationSettings,
    prompts: list[str] | None = None,
) -> Iterator[tuple[Tensor, list | None]]:
    """Batches of (pixels (B, C, H, W) in [0, 1] on the CPU, their conditions), ``settings.samples`` in all."""
    for batch, indices in enumerate(batches(settings.samples, settings.batch_size)):
        yield drawn_batch(stock, steps, guidance, settings, batch, indices, settings.seed, prompts)


def evaluate(
    targets: list[Target],
    settings: EvaluationSettings,
    out: str | Path,
    device: str | torch.device = "cpu",
    processes: Processes | None = None,
    keep_samples: Path | None = None,
    same_protocol: bool = False,
) -> list[dict[str, Any]]:
    """Measure every target; write ``evaluation.json`` after each, whole or not at all.

    Args:
        targets: the first is what the others are compared with in tables.
        out: the file, or a folder for ``evaluation.json``.
        processes: this one among those that share the drawing; the others' rows are empty.
        keep_samples: a folder for the pictures themselves, as PNG.
        same_protocol: refuse a file whose rows were measured under another protocol, in place of writing it anew.

    Returns:
        One row a target, in their order.  Keys: name, path, steps, guidance_scale, passes_per_image, parameters,
        samples, frechet, kid_mean, kid_std, precision, recall, diversity, clip_score, rewards, seconds,
        images_per_second (of one process), latency, fingerprint (None where not asked for); of several seeds the
        means of them, with std (by metric) and per_seed.

    Raises:
        UserError: a target, extractor, reference or setting that does not fit, another protocol's file or one that is
            no evaluation's, or another process that writes it.
    """
    file = output_file(out)
    protocols.check_ours(file)
    processes = processes or Processes(device=torch.device(device))
    work = _work_folder(file)
    with processes.locked(files.Lock(work, remedy="or name another --output")):
        rows = _evaluate(targets, settings, file, device, processes, keep_samples, same_protocol)
    if processes.main:
        with contextlib.suppress(OSError):
            work.rmdir()
    return rows


def _evaluate(
    targets: list[Target],
    settings: EvaluationSettings,
    file: Path,
    device: str | torch.device,
    processes: Processes,
    keep_samples: Path | None,
    same_protocol: bool,
) -> list[dict[str, Any]]:
    tools = _load_tools(settings, torch.device(device), processes, file, keep_samples)
    protocol = protocols.describe(tools)
    earlier = _earlier(file)
    if same_protocol and earlier[1]:
        remedy = "give another --output, or delete the file"
        protocols.require_same(earlier[0], protocol, str(file), remedy)
    known = {row["fingerprint"]: row for row in earlier[1]}
    keys = [_fingerprint(target, protocol) for target in targets]
    _check_names(targets, keep_samples)
    seeds = protocols.seeds_of(settings)
    rows = [
        known.get(key) if pictures_kept(tools, target, seeds) else None
        for target, key in zip(targets, keys, strict=True)
    ]
    # the first process's for all: the others may have read the file later, or run on another card
    keys, rows = processes.of_first((keys, rows))
    for position, (target, key) in enumerate(zip(targets, keys, strict=True)):
        if rows[position] is not None:
            if processes.main:
                print(f"{target.name}: unchanged, its numbers are taken from {file}")
            rows[position] = {**rows[position], "name": target.name, "path": str(target.path)}
        else:
            rows[position] = {**_measure(target, replace(tools, work=tools.work / key[:16])), "fingerprint": key}
        if processes.main:
            _write(file, protocol, [row for row in rows if row is not None])
            shutil.rmtree(tools.work / key[:16], ignore_errors=True)
    if processes.main:
        _clean(tools.work)
    return rows


def _work_folder(file: Path) -> Path:
    """Where what is drawn is kept until its row is written."""
    return file.with_name(f"{file.stem}.work")


def _clean(work: Path) -> None:
    """Delete what evaluations have drawn, and nothing else that lies there."""
    for part in work.iterdir():
        if re.fullmatch(r"[0-9a-f]{16}", part.name):
            shutil.rmtree(part, ignore_errors=True)


def output_file(out: str | Path) -> Path:
    """The file itself, or ``evaluation.json`` in a folder."""
    return Path(out) if Path(out).suffix == ".json" else Path(out) / "evaluation.json"


def _check_names(targets: list[Target], keep_samples: Path | None) -> None:
    named = [(target.name, target.steps) for target in targets]
    twice = next((own for own in named if named.count(own) > 1), None)
    if keep_samples is not None and twice is not None:
        raise UserError(f"two pipelines are called {twice[0]}; name them apart, as NAME=PATH, to keep their pictures")


def _load_tools(
    settings: EvaluationSettings,
    device: torch.device,
    processes: Processes,
    file: Path,
    keep_samples: Path | None,
) -> _Tools:
    extractor = load_extractor(settings.extractor, device)
    treatment = Treatment(settings.resize, settings.quantise, settings.reference_files)
    notes: list[str] = []
    prompts = prompts_to_draw(settings, notes)
    for note in notes if processes.main else []:
        print(f"note: prompts: {note}")
    if settings.distinct_prompts and prompts is not None and len(prompts) < settings.samples:
        raise UserError(
            f"prompts{f' {settings.prompts}' if settings.prompts else ''}: has {len(prompts)} prompts, this protocol "
            f"draws {settings.samples} pictures of as many; name a file with so many lines, or draw fewer samples"
        )
    reference = load_reference(settings.reference, settings.extractor, extractor, treatment, file.parent, processes)
    if settings.precision_recall and not len(reference.features):
        raise UserError(
            f"reference {reference.source}: holds moments alone, and precision and recall need features; name the "
            "folder of pictures, or leave them out"
        )
    return _Tools(
        settings=settings,
        extractor=extractor,
        reference=reference,
        treatment=treatment,
        clip_treatment=Treatment(settings.clip_resize, settings.quantise),
        scorer=None if settings.clip is None else load_clip(settings.clip, device),
        rewards=load_rewards(settings.rewards, device),
        prompts=prompts,
        device=device,
        processes=processes,
        work=_work_folder(file),
        keep_samples=keep_samples,
        versions={name: version(name) for name in PACKAGES},
    )


def _fingerprint(target: Target, protocol: dict[str, Any]) -> str:
    """SHA-256 of the folder's files (model card aside), the steps, the guidance and the protocol."""
    call = {"steps": target.steps, "guidance_scale": target.guidance_scale, "protocol": protocol}
    if target.null_label is not None:
        call["null_label"] = target.null_label
    if target.variant is not None:
        call["variant"] = target.variant
    digest = hashlib.sha256(json.dumps(call, sort_keys=True).encode())
    folder = pipeline_folder(target.path)
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.suffix != ".md":
            with reading(path, "export the folder again"):
                check_extent(path)
            digest.update(str(path.relative_to(folder)).encode())
            with open(path, "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def _earlier(file: Path) -> tuple[dict[str, Any], list[dict]]:
    """Protocol and rows of an earlier evaluation; nothing of a file that cannot be read."""
    found = protocols.read(file)
    if found is None:
        if file.exists():
            aside = files.free_name(file.with_name(f"{file.name}.damaged"))
            with writing(file):
                file.rename(aside)
            print(f"{file}: not readable, so everything is measured again; as it was it is {aside.name}")
        return {}, []
    return found[0], [row for row in found[1] if "fingerprint" in row]


def _write(file: Path, protocol: dict[str, Any], rows: list[dict]) -> None:
    files.write_json(file, {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "protocol": protocol, "rows": rows})


def _measure(target: Target, tools: _Tools) -> dict[str, Any]:
    """A target's row; {} in processes other than the first, which only draw."""
    settings, seeds = tools.settings, protocols.seeds_of(tools.settings)
    error = stock = None
    try:
        how = {"null_label": target.null_label, "variant": target.variant}
        stock = StockPipeline.load(target.path, tools.device, getattr(torch, settings.dtype), **how)
        steps, guidance = resolve(target, stock)
        if tools.scorer is not None and stock.condition_kind != "prompt":
            raise UserError(
                f"{target.name}: the CLIP score needs prompts, and {target.path} takes none; leave clip out"
            )
        conditions = conditions_for(stock, range(settings.samples), tools.prompts, settings.labels)
        check_diversity(target.name, conditions, settings)
        for seed in seeds:
            draw(target, stock, steps, guidance, seed, tools)
    except UserError as wrong:
        error = wrong
    tools.processes.agree(error)
    if not tools.processes.main:
        return {}
    looked = [drawn(tools, seed) for seed in seeds]
    seconds = sum(own.seconds for own in looked)
    count = settings.samples * len(seeds)
    latency = None
    if settings.latency:
        latency = measure_latency(stock, steps, settings.latency_batch, guidance).as_dict()
    return {
        "name": target.name,
        "path": str(target.path),
        "steps": steps,
        "guidance_scale": guidance,
        "passes_per_image": sum(own.passes for own in looked) / count,
        "parameters": [sum(p.numel() for p in network.parameters()) for network in stock.denoisers],
        "samples": settings.samples,
        **over_seeds([numbers(own, seed, tools) for own, seed in zip(looked, seeds, strict=True)]),
        "diversity": pooled_diversity(looked, conditions, tools),
        "seconds": seconds,
        "images_per_second": count / seconds,
        "latency": latency,
    }


def plural(steps: int) -> str:
    """``1 step``, ``25 steps``."""
    return f"{steps} step" if steps == 1 else f"{steps} steps"
