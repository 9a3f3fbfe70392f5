"""Extractors by what a config says: a shipped asset, a file, Inception, DINOv2, or a user's module."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import nn

from stepdistill import assets, readers
from stepdistill.errors import UserError, reading
from stepdistill.judges.contrastive import MatchingNetwork, is_matching
from stepdistill.plugins import call_factory, import_attribute

from .base import Extractor, module_fingerprint
from .dinov2 import load_dinov2
from .inception import load_inception
from .small import FeatureNetwork


def as_extractor(module: nn.Module, name: str | None = None) -> Extractor:
    """Any module with ``num_features`` as an extractor; its name is its class's unless given.

    Raises:
        UserError: it has no ``num_features``.
    """
    if not isinstance(getattr(module, "num_features", None), int):
        raise UserError(
            f"extractor {name or type(module).__name__}: has no attribute num_features; set it to the width of "
            "its features, an integer"
        )
    module.eval()
    for parameter in module.parameters():  # TorchScript modules have no requires_grad_
        parameter.requires_grad_(False)
    if isinstance(module, FeatureNetwork):
        return Extractor(module, name or module.name, module.fingerprint())
    if isinstance(module, MatchingNetwork):
        return Extractor(module, name or module.name, module_fingerprint(module, json.dumps(module.architecture)))
    code = getattr(module, "code", "") if isinstance(module, torch.jit.ScriptModule) else ""
    kind = f"{type(module).__module__}.{type(module).__qualname__} {code}"
    return Extractor(module, name or type(module).__name__, module_fingerprint(module, kind))


def find_network(spec: str) -> Path | None:
    """The file that ``spec`` names if it names a feature network of stepdistill's, else None.

    Raises:
        UserError: an ``asset:`` that is not shipped.
    """
    if Path(spec).suffix == ".safetensors":
        return Path(assets.resolve(spec))
    shipped = assets.ROOT / spec / "features.safetensors"
    return shipped if re.fullmatch(r"\w+", spec) and shipped.is_file() else None


def find_reference(spec: str) -> Path | None:
    """``reference.safetensors`` next to the feature network that ``spec`` names, or None without such a file."""
    network = find_network(spec)
    path = None if network is None else network.with_name("reference.safetensors")
    return path if path is not None and path.is_file() else None


def load_extractor(spec: str, device: str | torch.device = "cpu") -> Extractor:
    """An extractor by what a config says.

    - a shipped asset's name (``fashion_mnist``), or the path of a ``.safetensors`` file of stepdistill's, a classifier
      or a picture-caption network (``asset:fashion_mnist/features.safetensors`` too);
    - ``inception`` (weights where clean-fid expects them) or ``inception:FILE``: never downloads;
    - ``inception_tensorflow``, likewise: the same weights with the resize of TensorFlow's FID inside, as EDM has it;
    - ``dinov2:PATH``: DINOv2 from a local folder or file (:mod:`.dinov2`);
    - the path of a TorchScript file (``.pt``, ``.pth``, ``.ts``) whose module has ``num_features``;
    - ``module:attribute``: a Python object that is, or when called without arguments gives, such a module.

    Raises:
        UserError: none of these, or something that cannot be loaded.
    """
    path = Path(spec)
    kind, _, place = spec.partition(":")
    if kind in ("inception", "inception_tensorflow"):
        extractor = load_inception(place or None, resize_inside=kind == "inception_tensorflow")
    elif kind == "dinov2":
        extractor = load_dinov2(place)
    elif (network := find_network(spec)) is not None:
        extractor = as_extractor(_load_network(network))
    elif path.suffix in {".pt", ".pth", ".ts"}:
        extractor = as_extractor(_load_torchscript(path), path.stem)
    elif ":" in spec:
        extractor = as_extractor(_import_module(spec), spec.partition(":")[2])
    else:
        shipped = sorted(p.parent.name for p in assets.ROOT.glob("*/features.safetensors"))
        raise UserError(
            f"extractor {spec!r}: not known; use a shipped one ({', '.join(shipped) or 'none here'}), 'inception', "
            "dinov2:PATH, a .safetensors or TorchScript file, or module:attribute"
        )
    return extractor.to(device)


def _load_network(path: Path) -> FeatureNetwork | MatchingNetwork:
    """A classifier or a picture-caption network, as the file says."""
    return MatchingNetwork.load(path) if is_matching(path) else FeatureNetwork.load(path)


def _load_torchscript(path: Path) -> nn.Module:
    with reading(f"extractor {path}", "save it with torch.jit", "not a TorchScript file"):
        return readers.read_torchscript(path)


def _import_module(spec: str) -> nn.Module:
    module = import_attribute(spec, "extractor")
    if not isinstance(module, nn.Module) and callable(module):
        module = call_factory(module, spec, "extractor")
    if not isinstance(module, nn.Module):
        raise UserError(f"extractor {spec!r}: is a {type(module).__name__}; it must be a torch.nn.Module, or give one")
    return module
