"""What a measurement needs, loaded once for all targets: networks, reference, prompts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from stepdistill.data.sources import read_named_prompts
from stepdistill.errors import UserError
from stepdistill.eval.extractors.base import Extractor
from stepdistill.eval.extractors.load import load_extractor
from stepdistill.eval.speed.latency import device_name
from stepdistill.judges.clip import ClipScorer
from stepdistill.judges.load import load_clip
from stepdistill.judges.rewards import Reward, load_rewards

from .preprocessing import Preprocessing
from .processes import Processes
from .protocols import format_protocol, list_notes
from .reference_statistics import ReferenceStatistics
from .references import load_reference
from .settings import Protocol

PACKAGES = ("stepdistill", "torch", "diffusers", "torchmetrics")


@dataclass(frozen=True)
class Tools:
    """Attributes:
    preprocessing, clip_preprocessing: of pictures before the extractor, and before the CLIP model.
    prompts: in turn, None for pipelines that take none.
    work: the folder for batches that were drawn; that of one target while it is measured.
    keep_samples: a folder for the pictures themselves; None: they are deleted.
    versions: of the packages that take part, for the record.
    """

    protocol: Protocol
    extractor: Extractor
    reference: ReferenceStatistics
    preprocessing: Preprocessing
    clip_preprocessing: Preprocessing
    scorer: ClipScorer | None
    rewards: list[Reward]
    prompts: list[str] | None
    device: torch.device
    processes: Processes
    work: Path
    keep_samples: Path | None
    versions: dict[str, str]


def load_tools(
    protocol: Protocol,
    device: torch.device,
    processes: Processes,
    folder: Path,
    work: Path,
    keep_samples: Path | None,
) -> Tools:
    """
    Args:
        folder: where statistics of a reference folder are saved.

    Raises:
        UserError: something that the protocol names is missing, or does not fit the rest.
    """
    extractor = load_extractor(protocol.extractor, device)
    preprocessing = Preprocessing(protocol.resize, protocol.quantise, protocol.reference_files)
    notes: list[str] = []
    prompts = read_prompts(protocol, notes)
    for note in notes if processes.main else []:
        print(f"note: prompts: {note}")
    if protocol.distinct_prompts and prompts is not None and len(prompts) < protocol.samples:
        raise UserError(
            f"prompts{f' {protocol.prompts}' if protocol.prompts else ''}: has {len(prompts)} prompts, this protocol "
            f"draws {protocol.samples} pictures of as many; name a file with so many lines, or draw fewer samples"
        )
    reference = load_reference(protocol.reference, protocol.extractor, extractor, preprocessing, folder, processes)
    if protocol.precision_recall and not len(reference.features):
        raise UserError(
            f"reference {reference.source}: holds moments alone, and precision and recall need features; name the "
            "folder of pictures, or leave them out"
        )
    return Tools(
        protocol=protocol,
        extractor=extractor,
        reference=reference,
        preprocessing=preprocessing,
        clip_preprocessing=Preprocessing(protocol.clip_resize, protocol.quantise),
        scorer=None if protocol.clip is None else load_clip(protocol.clip, device),
        rewards=load_rewards(protocol.rewards, device),
        prompts=prompts,
        device=device,
        processes=processes,
        work=work,
        keep_samples=keep_samples,
        versions={name: version(name) for name in PACKAGES},
    )


def read_prompts(protocol: Protocol, notes: list[str] | None = None) -> list[str] | None:
    """The prompts that a protocol names (None: none); ``notes`` gets what a user should know of them, a line each."""
    prompts = read_named_prompts(
        protocol.prompts, protocol.prompt_dataset, protocol.prompt_column, protocol.prompt_images, notes, ""
    )
    return prompts and [str(prompt) for prompt in prompts]


def record_protocol(tools: Tools) -> dict[str, Any]:
    """All that the numbers depend on but the target, with :func:`format_protocol` and :func:`list_notes` of it."""
    reference, prompts, protocol = tools.reference, tools.prompts, tools.protocol
    record = {
        "metric": tools.extractor.metric,
        "kernel_metric": tools.extractor.kernel_metric,
        "extractor": tools.extractor.name,
        "extractor_fingerprint": tools.extractor.fingerprint,
        "features": tools.extractor.num_features,
        "resize": tools.extractor.resize,
        "crop": tools.preprocessing.crop,
        "size": tools.preprocessing.resize,
        "clip_size": tools.clip_preprocessing.resize,
        "seeds": protocol.list_seeds(),
        "reference": {
            "source": reference.source,
            "n": reference.n,
            "features": len(reference.features),
            "resize": reference.resize,
            "fingerprint": reference.fingerprint,
        },
        "clip": None if tools.scorer is None else tools.scorer.tag,
        "prompts_fingerprint": None if prompts is None else hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "settings": protocol.model_dump(mode="json"),
        "device": device_name(tools.device),
        "versions": tools.versions,
    }
    return {**record, "line": format_protocol(record), "notes": list_notes(record)}
