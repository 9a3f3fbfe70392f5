"""What a number was measured under, in one line; and that numbers of different protocols are not put side by side."""

from __future__ import annotations

import contextlib
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stepdistill.errors import UserError, reading
from stepdistill.readers import MOST_TEXT, read_bytes, read_json
from stepdistill.run import differences

if TYPE_CHECKING:
    from .evaluate import EvaluationSettings, _Tools


def seeds_of(settings: EvaluationSettings) -> list[int]:
    """The seeds of the repeats."""
    return list(range(settings.seed, settings.seed + settings.seeds))


def describe(tools: _Tools) -> dict[str, Any]:
    """All that the numbers depend on but the target, and :func:`protocol_line` and :func:`notes_of` of it."""
    from stepdistill.eval.speed.latency import device_name

    reference, prompts, settings = tools.reference, tools.prompts, tools.settings
    described = {
        "metric": tools.extractor.metric,
        "kernel_metric": tools.extractor.kernel_metric,
        "extractor": tools.extractor.name,
        "extractor_fingerprint": tools.extractor.fingerprint,
        "features": tools.extractor.num_features,
        "resize": tools.extractor.resize,
        "crop": tools.treatment.crop,
        "size": tools.treatment.resize,
        "clip_size": tools.clip_treatment.resize,
        "seeds": seeds_of(settings),
        "reference": {
            "source": reference.source,
            "n": reference.n,
            "features": len(reference.features),
            "resize": reference.resize,
            "fingerprint": reference.fingerprint,
        },
        "clip": None if tools.scorer is None else tools.scorer.tag,
        "prompts_fingerprint": None if prompts is None else hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "settings": settings.model_dump(mode="json"),
        "device": device_name(tools.device),
        "versions": tools.versions,
    }
    return {**described, "line": protocol_line(described), "notes": notes_of(described)}


def too_few(count: int, features: int, what: str) -> str | None:
    """What to tell of a distance over fewer pictures than its covariance needs; None where they are enough, or where
    their number is not known (0)."""
    if count > features or count == 0:
        return None
    return (
        f"{count:,} {what} are too few for a distance over {features:,} features: their covariance is singular and the "
        f"distance far too large; at least {features + 1:,} are needed"
    )


def notes_of(protocol: dict[str, Any]) -> list[str]:
    """What makes the numbers of a protocol less than they look, a sentence each."""
    settings, reference, features = protocol["settings"], protocol["reference"], protocol["features"]
    samples, asked = settings["samples"], settings["kid_subset_size"]
    notes = [too_few(samples, features, "samples"), too_few(reference["n"], features, "pictures of the reference")]
    size = min(asked, samples, reference["features"])
    if settings["kid"] and 0 < size < asked:
        notes.append(
            f"the kernel distance is over subsets of {size:,} in place of {asked:,}, for there are {samples:,} samples "
            f"and {reference['features']:,} features of the reference; {asked:,} of both are needed"
        )
    return [note for note in notes if note is not None]


def protocol_line(protocol: dict[str, Any]) -> str:
    """``metric: extractor and hash; n; crop; resize filters; reference and hash; CLIP model and prefix; seeds``."""
    settings, reference = protocol.get("settings") or {}, protocol.get("reference") or {}
    seeds = protocol.get("seeds") or [settings.get("seed", "?")]
    count = f", {reference['n']} pictures" if reference.get("n") else ""
    parts = [
        f"{protocol.get('metric', 'distance')}: extractor {protocol.get('extractor', '?')} "
        f"{str(protocol.get('extractor_fingerprint', '?'))[:12]}",
        f"n {settings.get('samples', '?')}{' a seed' if len(seeds) > 1 else ''}, "
        f"{settings.get('batch_size', '?')} at a time",
        f"crop {protocol.get('crop', 'none')}",
        f"resize {protocol.get('size', 'none')}, the extractor's {protocol.get('resize', '?')}",
        f"reference {reference.get('source', '?')} {str(reference.get('fingerprint', '?'))[:12]}{count}",
    ]
    if settings.get("quantise") == "floor":
        parts.append("pixels cut to bytes, not rounded")
    if settings.get("dtype", "float32") != "float32":
        parts.append(f"drawn in {settings['dtype']}")
    if settings.get("precision_recall"):
        used = min(reference.get("features", 0), settings["samples"])
        parts.append(f"precision and recall of {used} and {used} features, k {settings['neighbours']}")
    if protocol.get("clip"):
        parts.append(f"CLIP {protocol['clip']}, picture {protocol.get('clip_size', 'none')}")
    if settings.get("preset"):
        parts.insert(0, f"preset {settings['preset']}")
    parts.append(f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}")
    return "; ".join(parts)


def compared(protocol: dict[str, Any]) -> dict[str, Any]:
    """What two protocols must share for their numbers to stand side by side, as far as a file says it.

    Where they were measured, what else was measured and what files are called are not of it.
    """
    settings, reference = protocol.get("settings") or {}, protocol.get("reference") or {}
    kept = {key: protocol.get(key) for key in ("metric", "extractor", "resize", "crop", "size")}
    kept |= {key: settings.get(key) for key in ("samples", "batch_size", "labels", "dtype", "quantise")}
    kept["seeds"] = protocol.get("seeds") or ([settings["seed"]] if "seed" in settings else None)
    kept["extractor's hash"] = (protocol.get("extractor_fingerprint") or "")[:12] or None
    if reference.get("fingerprint"):
        kept["reference"] = f"{reference.get('source')} {reference['fingerprint'][:12]}"
    if "prompts_fingerprint" in protocol:
        kept["prompts"] = str(protocol["prompts_fingerprint"])[:12]
    if settings.get("kid"):
        kept["kid"] = f"{settings.get('kid_subsets')} subsets of {settings.get('kid_subset_size')}"
    if settings.get("precision_recall"):
        kept["neighbours"] = settings.get("neighbours")
    if protocol.get("clip"):
        kept["CLIP"] = f"{protocol['clip']}, picture {protocol.get('clip_size', 'none')}"
    return {key: value for key, value in kept.items() if value is not None}


def require_same(there: dict[str, Any], here: dict[str, Any], whose: str, remedy: str) -> None:
    """Refuse to put numbers of two protocols side by side; what one of them lacks or does not say is not compared.

    Raises:
        UserError: what differs, in one line.
    """
    a, b = compared(there), compared(here)
    odd = differences({k: v for k, v in a.items() if k in b}, {k: v for k, v in b.items() if k in a})
    if odd:
        raise UserError(f"{whose}: measured under another protocol: {'; '.join(odd[:3])}; {remedy}")


def check_ours(file: Path) -> None:
    """Refuse to write an evaluation over a JSON file of something else.

    Raises:
        UserError: it holds JSON without an evaluation's keys, or cannot be read.
    """
    if not file.exists() or read(file) is not None:
        return
    with reading(file, "name another --output"):
        text = read_bytes(file, MOST_TEXT)
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(text)
        raise UserError(
            f"{file}: is no evaluation of stepdistill's, or damaged, so it is not written over; name another --output, "
            "or delete it"
        )


def read(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
    """Protocol and rows of an ``evaluation.json``; None where there is none, or none whose content is of its kind."""
    try:
        content = read_json(file)
        protocol, rows = content.get("protocol") or {}, content["rows"]
        _check_protocol(protocol)
        for row in rows:
            _check_row(row)
        return protocol, rows
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


TEXTS = ("metric", "kernel_metric", "extractor", "extractor_fingerprint", "resize", "crop", "size", "clip_size", "clip")
TEXTS += ("line", "device", "prompts_fingerprint")
ROW_TEXTS = ("path", "fingerprint")
ROW_NUMBERS = ("passes_per_image", "frechet", "kid_mean", "kid_std", "precision", "recall", "diversity", "clip_score")
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
