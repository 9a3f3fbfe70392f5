"""A pipeline saved in one dtype, so that a plain ``from_pretrained`` gives parts that fit each other.

diffusers loads its models in float32 unless a ``dtype`` is passed; transformers loads a text encoder in the dtype that
its config names, and where it names none in that of the weights.  So every weight of a folder is stored in one dtype,
and the config of each text encoder says float32: plain loading computes in float32 whatever is stored, and
``from_pretrained(folder, dtype=torch.bfloat16)`` computes in bfloat16 throughout.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Collection
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import nn
from transformers import PreTrainedModel

from stepdistill.finiteness import check_module
from stepdistill.stock.folders import remove_places


def save_in_one_dtype(
    pipeline: DiffusionPipeline,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    in_float32: Collection[str] = (),
) -> None:
    """``pipeline.save_pretrained(folder)`` with all weights stored in ``dtype``; see the module.

    The pipeline's networks are copied where they have another dtype, and left as they are.

    Args:
        in_float32: parts that are stored in float32 all the same.

    Raises:
        UserError: weights that are not finite, or would not be in ``dtype``; nothing is written then.
    """
    networks = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    for name, network in networks.items():
        check_module(network, f"the {name} to be exported", "go back to an earlier checkpoint")
        converted = _in_dtype(network, torch.float32 if name in in_float32 else dtype)
        narrow = f"{dtype}".removeprefix("torch.")
        check_module(converted, f"the {name} in {narrow}", f"they are too large for {narrow}; export it in bfloat16")
        pipeline.register_modules(**{name: converted})
    try:
        pipeline.save_pretrained(folder, safe_serialization=True)
    finally:
        pipeline.register_modules(**networks)
    for name, network in networks.items():
        if isinstance(network, PreTrainedModel):
            _load_in_float32(folder / name / "config.json")
    remove_places(folder)


def _in_dtype(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    tensors = [*network.parameters(), *network.buffers()]
    if all(tensor.dtype == dtype for tensor in tensors if tensor.is_floating_point()):
        return network
    return nn.Module.to(copy.deepcopy(network), dtype)  # diffusers' own ``to`` warns of parts that there are none of


def _load_in_float32(file: Path) -> None:
    """Make a transformers config name float32 as the dtype to load in."""
    config = json.loads(file.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)  # the key's older name
    file.write_text(json.dumps({**config, "dtype": "float32"}, indent=2) + "\n", encoding="utf-8")
