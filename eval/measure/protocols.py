"""The record of what a number was measured under: in one line, and compared, so that numbers of different protocols
are not put into one table."""

from __future__ import annotations

from typing import Any

from stepdistill.errors import UserError
from stepdistill.run import differences


def note_shortage(count: int, features: int, what: str) -> str | None:
    """What to tell of a distance over fewer pictures than its covariance needs; None where they are enough, or where
    their number is not known (0)."""
    if count > features or count == 0:
        return None
    return (
        f"{count:,} {what} are too few for a distance over {features:,} features: their covariance is singular and the "
        f"distance far too large; at least {features + 1:,} are needed"
    )


def list_notes(record: dict[str, Any]) -> list[str]:
    """What makes the numbers of a protocol less than they look, a sentence each."""
    settings, reference, features = record["settings"], record["reference"], record["features"]
    samples, subset_size = settings["samples"], settings["kid_subset_size"]
    notes = [
        note_shortage(samples, features, "samples"),
        note_shortage(reference["n"], features, "pictures of the reference"),
    ]
    size = min(subset_size, samples, reference["features"])
    if settings["kid"] and 0 < size < subset_size:
        notes.append(
            f"the kernel distance is over subsets of {size:,} in place of {subset_size:,}, for there are {samples:,} "
            f"samples and {reference['features']:,} features of the reference; {subset_size:,} of both are needed"
        )
    return [note for note in notes if note is not None]


def format_protocol(record: dict[str, Any]) -> str:
    """``metric: extractor and hash; n; crop; resize filters; reference and hash; CLIP model and prefix; seeds``."""
    settings, reference = record.get("settings") or {}, record.get("reference") or {}
    seeds = record.get("seeds") or [settings.get("seed", "?")]
    count = f", {reference['n']} pictures" if reference.get("n") else ""
    parts = [
        f"{record.get('metric', 'distance')}: extractor {record.get('extractor', '?')} "
        f"{str(record.get('extractor_fingerprint', '?'))[:12]}",
        f"n {settings.get('samples', '?')}{' a seed' if len(seeds) > 1 else ''}, "
        f"{settings.get('batch_size', '?')} at a time",
        f"crop {record.get('crop', 'none')}",
        f"resize {record.get('size', 'none')}, the extractor's {record.get('resize', '?')}",
        f"reference {reference.get('source', '?')} {str(reference.get('fingerprint', '?'))[:12]}{count}",
    ]
    if settings.get("quantise") == "floor":
        parts.append("pixels cut to bytes, not rounded")
    if settings.get("dtype", "float32") != "float32":
        parts.append(f"drawn in {settings['dtype']}")
    if settings.get("precision_recall"):
        used = min(reference.get("features", 0), settings["samples"])
        parts.append(f"precision and recall of {used} and {used} features, k {settings['neighbours']}")
    if record.get("clip"):
        parts.append(f"CLIP {record['clip']}, picture {record.get('clip_size', 'none')}")
    if settings.get("preset"):
        parts.insert(0, f"preset {settings['preset']}")
    plural = "s" if len(seeds) > 1 else ""
    parts.append(f"seed{plural} {', '.join(map(str, seeds))}")
    return "; ".join(parts)


def comparable_part(record: dict[str, Any]) -> dict[str, Any]:
    """What two protocols must share for their numbers to stand in one table, as far as a file says it.

    Where they were measured, what else was measured and what files are called are not a part of it.
    """
    settings, reference = record.get("settings") or {}, record.get("reference") or {}
    part = {key: record.get(key) for key in ("metric", "extractor", "resize", "crop", "size")}
    part |= {key: settings.get(key) for key in ("samples", "batch_size", "labels", "dtype", "quantise")}
    part["seeds"] = record.get("seeds") or ([settings["seed"]] if "seed" in settings else None)
    part["extractor's hash"] = (record.get("extractor_fingerprint") or "")[:12] or None
    if reference.get("fingerprint"):
        part["reference"] = f"{reference.get('source')} {reference['fingerprint'][:12]}"
    if "prompts_fingerprint" in record:
        part["prompts"] = str(record["prompts_fingerprint"])[:12]
    if settings.get("kid"):
        part["kid"] = f"{settings.get('kid_subsets')} subsets of {settings.get('kid_subset_size')}"
    if settings.get("precision_recall"):
        part["neighbours"] = settings.get("neighbours")
    if record.get("clip"):
        part["CLIP"] = f"{record['clip']}, picture {record.get('clip_size', 'none')}"
    return {key: value for key, value in part.items() if value is not None}


def require_same(earlier: dict[str, Any], current: dict[str, Any], source: str, remedy: str) -> None:
    """Refuse to put numbers of two protocols into one table; what one of them lacks or does not say is not compared.

    Raises:
        UserError: what differs, in one line that starts with ``source``.
    """
    a, b = comparable_part(earlier), comparable_part(current)
    odd = differences({k: v for k, v in a.items() if k in b}, {k: v for k, v in b.items() if k in a})
    if odd:
        raise UserError(f"{source}: measured under another protocol: {'; '.join(odd[:3])}; {remedy}")
