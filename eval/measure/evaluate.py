"""Measuring pipelines against one reference under one protocol, and remembering what was measured.

Every target draws from the same noise, labels or prompts.  A row of ``evaluation.json`` is keyed by a fingerprint of
the pipeline's files, its steps and the protocol; what has not changed is not measured again.  What is drawn stays in a
work folder next to the output until its row is written (:mod:`.sampling`), so a stop costs one batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from stepdistill.errors import UserError, reading
from stepdistill.eval.speed.latency import measure_latency
from stepdistill.eval.stock_pipeline import pipeline_folder
from stepdistill.locks import Lock
from stepdistill.readers import check_extent

from .draws import select_conditions
from .metrics import average_seeds, check_diversity, compute_diversity, compute_metrics
from .processes import Processes
from .protocols import require_same
from .results import check_replaceable, output_file, read_earlier, write_results
from .sampling import draw_share, has_pictures, load_features
from .settings import Protocol
from .targets import Target
from .tools import Tools, load_tools, record_protocol


def evaluate(
    targets: list[Target],
    protocol: Protocol,
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
        images_per_second (of one process), latency, fingerprint (None where the protocol leaves it out); of several
        seeds the means of them, with std (by metric) and per_seed.

    Raises:
        UserError: a target, extractor, reference or setting that does not fit, another protocol's file or one that is
            no evaluation's, or another process that writes it.
    """
    file = output_file(out)
    check_replaceable(file)
    processes = processes or Processes(device=torch.device(device))
    work = file.with_name(f"{file.stem}.work")
    with processes.hold(Lock(work, remedy="or name another --output")):
        tools = load_tools(protocol, torch.device(device), processes, file.parent, work, keep_samples)
        rows = _evaluate(targets, tools, file, same_protocol)
    if processes.main:
        with contextlib.suppress(OSError):
            work.rmdir()
    return rows


def _evaluate(targets: list[Target], tools: Tools, file: Path, same_protocol: bool) -> list[dict[str, Any]]:
    processes, record = tools.processes, record_protocol(tools)
    earlier_record, earlier_rows = read_earlier(file)
    if same_protocol and earlier_rows:
        require_same(earlier_record, record, str(file), "give another --output, or delete the file")
    earlier = {row["fingerprint"]: row for row in earlier_rows}
    fingerprints = [_fingerprint(target, record) for target in targets]
    if tools.keep_samples is not None:
        _check_distinct_names(targets)
    rows = [
        earlier.get(fingerprint) if has_pictures(tools, target) else None
        for target, fingerprint in zip(targets, fingerprints, strict=True)
    ]
    # the first process's for all: the others may have read the file later, or run on another card
    fingerprints, rows = processes.broadcast((fingerprints, rows))
    for position, (target, fingerprint) in enumerate(zip(targets, fingerprints, strict=True)):
        row, work = rows[position], tools.work / fingerprint[:16]
        if row is not None:
            if processes.main:
                print(f"{target.name}: unchanged, its numbers are taken from {file}")
            rows[position] = {**row, "name": target.name, "path": str(target.path)}
        else:
            rows[position] = {**_measure(target, replace(tools, work=work)), "fingerprint": fingerprint}
        if processes.main:
            write_results(file, record, [row for row in rows if row is not None])
            shutil.rmtree(work, ignore_errors=True)
    if processes.main:
        delete_batches(tools.work)
    return rows


def delete_batches(work: Path) -> None:
    """Delete the batches that evaluations have drawn into a work folder, and nothing else that lies in it."""
    for part in work.iterdir():
        if re.fullmatch(r"[0-9a-f]{16}", part.name):
            shutil.rmtree(part, ignore_errors=True)


def _check_distinct_names(targets: list[Target]) -> None:
    names = [(target.name, target.steps) for target in targets]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two pipelines are called {twice[0]}; name them apart, as NAME=PATH, to keep their pictures")


def _fingerprint(target: Target, record: dict[str, Any]) -> str:
    """SHA-256 of the folder's files (model card aside), the steps, the guidance and the protocol."""
    call: dict[str, Any] = {"steps": target.steps, "guidance_scale": target.guidance_scale, "protocol": record}
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


def _measure(target: Target, tools: Tools) -> dict[str, Any]:
    """A target's row; {} in processes other than the first, which only draw."""
    protocol, seeds = tools.protocol, tools.protocol.list_seeds()
    error: UserError | None = None
    try:
        stock = target.load(tools.device, getattr(torch, protocol.dtype))
        steps, guidance = target.resolve_call(stock)
        if tools.scorer is not None and stock.condition_kind != "prompt":
            raise UserError(
                f"{target.name}: the CLIP score needs prompts, and {target.path} takes none; leave clip out"
            )
        conditions = select_conditions(stock, range(protocol.samples), tools.prompts, protocol.labels)
        check_diversity(target.name, conditions, protocol)
        for seed in seeds:
            draw_share(target, stock, steps, guidance, seed, tools)
    except UserError as user_error:
        error = user_error
    tools.processes.agree(error)
    if not tools.processes.main:
        return {}
    batches = [load_features(tools, seed) for seed in seeds]
    seconds = sum(batch.seconds for batch in batches)
    count = protocol.samples * len(seeds)
    latency = None
    if protocol.latency:
        latency = measure_latency(stock, steps, protocol.latency_batch, guidance).as_dict()
    return {
        "name": target.name,
        "path": str(target.path),
        "steps": steps,
        "guidance_scale": guidance,
        "passes_per_image": sum(batch.passes for batch in batches) / count,
        "parameters": [sum(p.numel() for p in network.parameters()) for network in stock.denoisers],
        "samples": protocol.samples,
        **average_seeds([compute_metrics(batch, seed, tools) for batch, seed in zip(batches, seeds, strict=True)]),
        "diversity": compute_diversity(batches, conditions, tools),
        "seconds": seconds,
        "images_per_second": count / seconds,
        "latency": latency,
    }
