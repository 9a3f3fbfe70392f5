"""``evaluation.json``: the protocol that rows were measured under, and a row for each target."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

from stepdistill import files
from stepdistill.errors import UserError, reading, writing
from stepdistill.plain_files import MOST_TEXT, read_bytes, read_json


def output_file(out: str | Path) -> Path:
    """The file itself, or ``evaluation.json`` in a folder."""
    return Path(out) if Path(out).suffix == ".json" else Path(out) / "evaluation.json"


def write_results(file: Path, protocol: dict[str, Any], rows: list[dict]) -> None:
    """What :func:`read_results` reads.

    Raises:
        UserError: it cannot be written.
    """
    files.write_json(file, {"date": time.strftime("%Y-%m-%d %H:%M:%S"), "protocol": protocol, "rows": rows})


def read_earlier(file: Path) -> tuple[dict[str, Any], list[dict]]:
    """Protocol and rows of an earlier evaluation; nothing of a file that cannot be read, which is renamed.

    Raises:
        UserError: it cannot be renamed.
    """
    results = read_results(file)
    if results is None:
        if file.exists():
            aside = files.free_name(file.with_name(f"{file.name}.damaged"))
            with writing(file):
                file.rename(aside)
            print(f"{file}: not readable, so everything is measured again; as it was it is {aside.name}")
        return {}, []
    return results[0], [row for row in results[1] if "fingerprint" in row]


def check_replaceable(file: Path) -> None:
    """Refuse to write an evaluation over a JSON file of something else.

    Raises:
        UserError: it holds JSON without an evaluation's keys, or cannot be read.
    """
    if not file.exists() or read_results(file) is not None:
        return
    with reading(file, "name another --output"):
        text = read_bytes(file, MOST_TEXT)
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(text)
        raise UserError(
            f"{file}: is no evaluation of stepdistill's, or damaged, so it is not written over; name another --output, "
            "or delete it"
        )


def read_results(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Protocol and rows of an ``evaluation.json``; None where it cannot be read or holds something else."""
    try:
        content = read_json(file)
        protocol, rows = content.get("protocol") or {}, content["rows"]
        _check_protocol(protocol)
        for row in rows:
            _check_row(row)
        return protocol, rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


TEXTS: tuple[str, ...] = ("metric", "kernel_metric", "extractor", "extractor_fingerprint", "resize", "crop", "size")
TEXTS += ("clip", "clip_size", "line", "device", "prompts_fingerprint")
ROW_TEXTS = ("path", "fingerprint")
ROW_NUMBERS: tuple[str, ...] = ("passes_per_image", "frechet", "kid_mean", "kid_std", "precision", "recall")
ROW_NUMBERS += ("diversity", "clip_score")
ROW_NUMBERS += ("steps", "samples", "guidance_scale", "seconds", "images_per_second")


def _check_protocol(protocol: dict[str, Any]) -> None:
    """
    Raises:
        TypeError, AttributeError: a value of another kind than a protocol has.
    """
    _require(protocol, dict)
    for key in TEXTS:
        _require(protocol.get(key), str, None)
    settings, reference = protocol.get("settings") or {}, protocol.get("reference") or {}
    for key in ("samples", "batch_size", "seed", "neighbours"):
        _require(settings.get(key), int, None)
    for key, kind in (("source", str), ("fingerprint", str), ("n", int), ("features", int)):
        _require(reference.get(key), kind, None)
    for seed in protocol.get("seeds") or []:
        _require(seed, int)
    for note in protocol.get("notes") or []:
        _require(note, str)


def _check_row(row: dict[str, Any]) -> None:
    """
    Raises:
        TypeError, AttributeError, KeyError: a value of another kind than a row has.
    """
    _require(row["name"], str)
    for key in ROW_TEXTS:
        _require(row.get(key), str, None)
    std, rewards, latency = (row.get(key) or {} for key in ("std", "rewards", "latency"))
    numbers = [*(row.get(key) for key in ROW_NUMBERS), *rewards.values(), *(std.get("rewards") or {}).values()]
    numbers += [value for key, value in std.items() if key != "rewards"]
    if latency:
        numbers += [latency["seconds"], *latency["shares"].values()]
    for number in numbers:
        _require(number, int, float, None)
    for count in row.get("parameters") or []:
        _require(count, int)


def _require(value: Any, *kinds: type | None) -> None:
    """
    Raises:
        TypeError: a value of none of the kinds; None stands for itself, and True is no number.
    """
    named = tuple(type(None) if kind is None else kind for kind in kinds)
    if not isinstance(value, named) or isinstance(value, bool):
        raise TypeError(f"a {type(value).__name__}")
