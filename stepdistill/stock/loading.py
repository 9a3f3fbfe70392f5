"""Diffusers folders: checked before anything that they name is imported or built, and loaded whole or not at all.

``from_pretrained`` gives a transformers model random numbers in place of weights that are missing, leaves those of a
diffusers model without storage, passes over weights that the model has not, and before diffusers 0.42.1 it imports
whatever module a ``model_index.json`` names.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any, TypeVar

import diffusers
import torch
import transformers
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin
from torch import nn
from transformers import PreTrainedModel

from stepdistill.digests import check_folder
from stepdistill.errors import UserError, reading, show_value
from stepdistill.finiteness import check_module
from stepdistill.plain_files import read_json, regular

from .folders import INDEX, check_stamp
from .variants import choose_variant, find_variants

LIBRARIES = {"diffusers": diffusers, "transformers": transformers}
CONFIGS = ("config.json", "scheduler_config.json", "preprocessor_config.json")
MOST = 10_000_000
"""The largest integer of a part's config: larger ones are damage, and building such a network never ends."""
MOST_PARTS = 1000
"""Layers and blocks of a network, and entries of a list."""
MOST_TIMESTEPS = 100_000

Parts = dict[str, tuple[str, str]]
"""Library and class by the part's name."""
Network = TypeVar("Network", bound=nn.Module)


def read_index(folder: Path, what: str) -> dict[str, Any]:
    """A folder's ``model_index.json``, once it names nothing but classes of diffusers and transformers.

    Args:
        what: the folder's name in errors, such as ``teacher PATH``.

    Raises:
        UserError: not there, not what such a file is, or it names other code.
    """
    if not (folder / INDEX).exists():
        raise UserError(f"{what}: not a diffusers folder (no {INDEX} in it)")
    with reading(f"{what}: {INDEX}", "write the folder again with save_pretrained"):
        index = read_json(folder / INDEX)
    check_index(index, what)
    return index


def check_index(index: Any, what: str) -> None:
    """Refuse what is no model index, or names other code than diffusers' and transformers'.

    Raises:
        UserError: the entry that is wrong.
    """
    remedy = "write the folder again with save_pretrained"
    name = index.get("_class_name") if isinstance(index, dict) else None
    if not isinstance(name, str) or not _is_name(name):
        raise UserError(f"{what}: {INDEX} names no pipeline class of diffusers; {remedy}")
    for part, entry in index.items():
        if part.startswith("_") or not isinstance(entry, list):
            continue
        pair = entry == [None, None] or (len(entry) == 2 and all(isinstance(x, str) and _is_name(x) for x in entry))
        if not pair or not re.fullmatch(r"\w+", part):
            raise UserError(f"{what}: {INDEX}: {part} = {show_value(entry)} is not a library and a class; {remedy}")
        if entry[0] is not None and not _is_known(entry[0]):
            raise UserError(
                f"{what}: {INDEX}: {part} is of the library {entry[0]}; loading it would run that code, and only "
                "classes of diffusers and transformers are loaded"
            )


def _is_name(text: str) -> bool:
    return re.fullmatch(r"[A-Za-z]\w*", text) is not None


def _is_known(library: str) -> bool:
    """diffusers, transformers, or a package of diffusers' own pipelines (``stable_diffusion``'s safety checker)."""
    return library in LIBRARIES or importlib.util.find_spec(f"diffusers.pipelines.{library}") is not None


def read_parts(index: dict[str, Any]) -> Parts:
    """The parts that a checked index lists."""
    return {
        name: (entry[0], entry[1])
        for name, entry in index.items()
        if not name.startswith("_") and isinstance(entry, list) and entry[0] is not None
    }


def load_pipeline(
    folder: str | Path,
    what: str,
    remedy: str = "write the folder again",
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    variant_key: str | None = None,
    **replacements: Any,
) -> DiffusionPipeline:
    """``DiffusionPipeline.from_pretrained`` on a folder of this machine whose parts are all there, whole.

    Args:
        what: the folder's name in errors.
        dtype: of every network.
        variant: of the parts that have it; by default the plain weights, or the only ones.
        variant_key: what names the variant, for errors; then the only ones are not taken without it.
        replacements: parts to use in place of the folder's; None leaves a part out.

    Raises:
        UserError: as :func:`read_index`; a part's config or weights are missing, damaged, not finite, of another
            network, or not those that stepdistill exported here.
    """
    folder = Path(folder)
    index = read_index(folder, what)
    parts = {name: part for name, part in read_parts(index).items() if name not in replacements}
    check_folder(folder, what, parts.keys())
    with reading(what, remedy, "cannot be loaded"):
        networks = {name: _network_class(*part) for name, part in parts.items()}
        variants = {name: find_variants(folder / name) for name, network in networks.items() if network is not None}
        variant = choose_variant(variants, variant, what, variant_key)
        loaded = dict(replacements)
        for name, network in networks.items():
            if network is None:
                check_config(folder / name, f"{what}: its {name}")
            else:
                loaded[name] = load_network(network, folder / name, f"{what}: its {name}", dtype, variant)
        pipeline = DiffusionPipeline.from_pretrained(folder, local_files_only=True, dtype=dtype, **loaded)
    for name, part in pipeline.components.items():
        if isinstance(part, ConfigMixin):
            check_stamp(part.config, f"{what}: its {name}")
    return pipeline


def _network_class(library: str, class_name: str) -> type[nn.Module] | None:
    """The class of a network whose loading tells which weights are missing; None for other parts."""
    module = LIBRARIES.get(library) or getattr(diffusers.pipelines, library)
    part = getattr(module, class_name, None)
    return part if isinstance(part, type) and issubclass(part, ModelMixin | PreTrainedModel) else None


def check_config(folder: Path, what: str) -> None:
    """Refuse a part whose config is not JSON, or says sizes that no network has.

    Raises:
        UserError: the key that is wrong.
    """
    for name in CONFIGS:
        file = folder / name
        if not file.exists():
            continue
        with reading(f"{what}: {name}", "write the folder again with save_pretrained"):
            odd = oversized(read_json(file))
        if odd is not None:
            raise UserError(f"{what}: {name}: {odd} is more than any network has; correct it")


def oversized(config: Any, key: str = "") -> str | None:
    """The first entry that is too large, None without one; keys that begin with ``_`` are passed over."""
    if isinstance(config, dict):
        entries = [(k, v) for k, v in config.items() if not k.startswith("_")]
    elif isinstance(config, list):
        entries = [(key, value) for value in config]
        if len(config) > MOST_PARTS and key != "trained_betas":
            return f"{key} with {len(config):,} entries"
    elif isinstance(config, int):
        most = MOST_TIMESTEPS if "timesteps" in key else MOST_PARTS if re.search(r"layers|blocks?$", key) else MOST
        return f"{key} = {show_value(config)}" if abs(config) > most else None
    else:
        return None
    return next((odd for k, v in entries if (odd := oversized(v, k)) is not None), None)


def load_network(
    network: type[Network],
    place: str | Path,
    what: str,
    dtype: torch.dtype = torch.float32,
    variant: str | None = None,
    subfolder: str | None = None,
    with_others: bool = False,
    remedy: str = "its config or its weights are another network's",
) -> Network:
    """A model of diffusers or transformers, with every weight read from its files.

    Args:
        place: its folder, or that of ``subfolder``; or a hub id.
        what: its name in errors.
        variant: of the weights, where the folder has it.
        remedy: the end of the message on weights that do not fit.
        with_others: the file may also hold weights of a network around this one.

    Raises:
        UserError: weights are missing, of another shape, of another network, or not finite.
        Exception: what the libraries raise, of many kinds; call it inside :func:`errors.reading`.
    """
    arguments: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if Path(place).is_dir():
        place = Path(place) / (subfolder or "")
        check_config(place, what)
        for file in place.glob("*.safetensors"):
            regular(file)
        if variant not in find_variants(place):
            variant = None
        arguments["local_files_only"] = True
    elif subfolder is not None:
        arguments["subfolder"] = subfolder
    if variant is not None:
        arguments["variant"] = variant
    if issubclass(network, PreTrainedModel):
        arguments["ignore_mismatched_sizes"] = True  # they are refused below, with their names
    loader: Any = network
    loaded, information = loader.from_pretrained(place, **arguments)
    for kind, problem in (
        ("missing_keys", "has no weights"),
        ("mismatched_keys", "has weights of another shape,"),
        ("unexpected_keys", "has weights that its config does not know,"),
    ):
        if kind == "unexpected_keys" and with_others:
            continue
        names = sorted(entry if isinstance(entry, str) else str(entry[0]) for entry in information.get(kind) or [])
        if names:
            count = f" ({len(names)} such tensors)" if len(names) > 1 else ""
            raise UserError(f"{what} {problem} {names[0]}{count}; {remedy}")
    check_module(loaded, what, "write it again from whole weights")
    return loaded
