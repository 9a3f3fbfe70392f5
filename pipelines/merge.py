"""Two students of one architecture as one: linear interpolation of their weights (SwiftBrush v2, 2408.14176 eq. 6).

There A is trained in full by score distillation and B as a LoRA with the CLIP loss, both from the same start, and
lambda = 0.5.  An exported LoRA student has its adapter merged into the weights already, as it must be: interpolating
the factors is not the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepdistill import __version__
from stepdistill.errors import UserError
from stepdistill.families import calls_of
from stepdistill.stock.folders import check_replaceable, without_places
from stepdistill.stock.loading import load_pipeline

from .export import stamped, write_pipeline


def interpolate(a: dict[str, Tensor], b: dict[str, Tensor], weight: float) -> dict[str, Tensor]:
    """``weight a + (1 - weight) b``, tensor by tensor, in float32 or better and the dtype of ``a``.

    At weights 1 and 0 exactly ``a`` and ``b``.  Integer tensors are taken from ``a``.

    Raises:
        ValueError: other names or shapes.
    """
    different = [k for k in a.keys() | b.keys() if k not in a or k not in b or a[k].shape != b[k].shape]
    if different:
        raise ValueError(min(different))
    mixed = {}
    for key, value in a.items():
        if not value.is_floating_point():
            mixed[key] = value.clone()
            continue
        dtype = torch.promote_types(value.dtype, torch.float32)
        mixed[key] = torch.lerp(b[key].to(dtype), value.to(dtype), weight).to(value.dtype)
    return mixed


def _load(path: str) -> tuple[Any, Any]:
    if not Path(path).is_dir():
        raise UserError(f"{path}: no such folder; name an exported student")
    pipeline = load_pipeline(path, path, "export the student again")
    return pipeline, calls_of(pipeline).network


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in dict(config).items() if not k.startswith("_")}


def merge_students(a: str, b: str, weight: float, output: str | Path) -> Path:
    """Write the student ``weight A + (1 - weight) B`` at ``output``, in float32; everything else is A's.

    Raises:
        UserError: not two pipelines of one class, architecture and scheduler, or ``output`` cannot be written.
    """
    check_replaceable(output, (a, b))
    (pipeline, network), (other, other_network) = _load(a), _load(b)
    if type(pipeline) is not type(other):
        raise UserError(f"{a} is a {type(pipeline).__name__} and {b} a {type(other).__name__}; they cannot be merged")
    config, other_config = _plain(pipeline.scheduler.config), _plain(other.scheduler.config)
    different = sorted(k for k in config | other_config if config.get(k) != other_config.get(k))
    if type(pipeline.scheduler) is not type(other.scheduler) or different:
        what = different[0] if different else "class"
        raise UserError(f"{a} and {b} are sampled differently (scheduler: {what}); merge equals")
    try:
        network.load_state_dict(interpolate(network.state_dict(), other_network.state_dict(), weight))
    except ValueError as error:
        raise UserError(f"{a} and {b} have networks of other shapes ({error}); they cannot be merged") from None
    origins = [part.config.get("_stepdistill") or {} for part in (network, other_network)]
    sampling = {"steps": 1, "times": None, "call": {"num_inference_steps": 1}, **origins[0]}
    facts = {
        **{key: sampling[key] for key in ("steps", "times", "call")},
        "version": __version__,
        "method": "interpolation",
        "teacher": origins[0].get("teacher"),
        "weight": weight,
        "of": [{"path": path, "method": origin.get("method")} for path, origin in zip((a, b), origins, strict=True)],
    }
    facts = without_places(facts)
    stamped(network, facts)
    stamped(pipeline.scheduler, facts)
    return write_pipeline(pipeline, output, facts, inputs=(a, b))
