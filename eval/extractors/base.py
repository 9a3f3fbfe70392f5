"""Feature extractors: what a distance between sets of pictures is measured with.

Every extractor here takes uint8 pictures (B, C, H, W) and gives features (B, F).  A distance is named by its
extractor (:attr:`Extractor.metric`); only clean-fid's Inception, known by the hash of its weights, makes a "FID".
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from stepdistill import assets, readers
from stepdistill.errors import UserError, reading
from stepdistill.files import write_tensors
from stepdistill.finiteness import is_finite
from stepdistill.judges.contrastive import CalibratedFeatures, MatchingNetwork, is_matching
from stepdistill.plugins import import_attribute, made_by

SMALLEST, LARGEST = 16, 64
"""The picture sides, in pixels, that :class:`FeatureNetwork` is made for."""


def module_fingerprint(module: nn.Module, description: str = "") -> str:
    """SHA-256 of a description and of every tensor in the state dict: name, dtype, shape, bytes."""
    digest = hashlib.sha256(description.encode())
    for name, value in sorted(module.state_dict().items()):
        if not isinstance(value, Tensor):
            digest.update(f"{name}={value!r}".encode())
            continue
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def unit_pixels(images: Tensor) -> Tensor:
    """uint8 0..255 or floating [0, 1], any shape, to float32 in [0, 1]."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    return images.float()


def read_tensors(path: str | Path, kind: str, what: str, remedy: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file that :func:`stepdistill.files.write_tensors` wrote with metadata ``kind``.

    Raises:
        UserError: no such file, not safetensors, or of another kind.
    """
    if not Path(path).exists():
        raise UserError(f"{path}: no such {what}; {remedy}")
    with reading(path, "replace it", "not a readable safetensors file"):
        tensors, metadata = readers.read_tensors(path)
    if metadata.get("kind") != kind:
        raise UserError(f"{path}: a safetensors file, but not a {what} of ours; name another file")
    return tensors, metadata


def _convolution(inside: int, outside: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(8, outside),
        nn.SiLU(),
    )


class FeatureNetwork(CalibratedFeatures):
    """A small classifier of 16x16 to 64x64 pictures; its penultimate layer is the feature.

    The feature is linear (no ReLU before it, so it is dense and roughly Gaussian); the classifier reads it
    through a SiLU, so that all of its directions can matter.  The last map is pooled to 4x4, not to 1x1: where
    things are counts too.  :meth:`calibrate` centres the feature and scales it by one number, so that distances
    of different networks are of one size and the kernel distance's kernel, made for unit scale, fits.

    Attributes:
        num_features: F, the width of the feature.
        name: what metrics call it, such as ``fashion_mnist_features``.
        notes: accuracy, training config and the like, as saved.
    """

    def __init__(
        self,
        channels: int = 1,
        num_labels: int = 10,
        num_features: int = 64,
        width: int = 32,
        name: str = "features",
    ):
        super().__init__()
        self.architecture = {
            "channels": channels,
            "num_labels": num_labels,
            "num_features": num_features,
            "width": width,
        }
        self.channels, self.num_features, self.name = channels, num_features, name
        self.notes: dict = {}
        self.backbone = nn.Sequential(
            _convolution(channels, width, 1),
            _convolution(width, 2 * width, 2),
            _convolution(2 * width, 2 * width, 1),
            _convolution(2 * width, 2 * width, 2),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
        )
        self.feature = nn.Linear(32 * width, num_features)
        self.classifier = nn.Linear(num_features, num_labels)
        self.register_buffer("center", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(()))

    def raw_feature(self, images: Tensor) -> Tensor:
        """The feature (B, num_features) before calibration."""
        shape = tuple(images.shape[1:])
        if shape[0] != self.channels or not all(SMALLEST <= side <= LARGEST for side in shape[1:]):
            raise UserError(
                f"extractor {self.name}: takes {self.channels} channel(s) and sides of {SMALLEST} to {LARGEST} "
                f"pixels, not pictures of shape {shape}; use an extractor made for these"
            )
        return self.feature(self.backbone(unit_pixels(images) * 2 - 1))

    def logits(self, images: Tensor) -> Tensor:
        """Class scores (B, num_labels) of pictures as in :meth:`forward`."""
        return self.classifier(nn.functional.silu(self.raw_feature(images)))

    def fingerprint(self) -> str:
        """SHA-256 of the architecture and the weights."""
        return module_fingerprint(self, json.dumps(self.architecture, sort_keys=True))

    def save(self, path: str | Path) -> Path:
        """One safetensors file; architecture, name and notes in its metadata.  Written beside and renamed in."""
        metadata = {
            "kind": "stepdistill.FeatureNetwork",
            "name": self.name,
            "architecture": json.dumps(self.architecture),
            "notes": json.dumps(self.notes),
        }
        return write_tensors(path, self.state_dict(), metadata)

    @classmethod
    def load(cls, path: str | Path) -> FeatureNetwork:
        """From a file that :meth:`save` wrote, frozen and in eval mode.

        Raises:
            UserError: no such file, not safetensors, or not one of ours.
        """
        remedy = "make one with a config like configs/teachers/fashion_mnist_features.yaml"
        tensors, metadata = read_tensors(path, "stepdistill.FeatureNetwork", "feature network", remedy)
        with reading(path, remedy, "not a whole feature network"):
            return cls.rebuilt(tensors, metadata)


@dataclass(frozen=True)
class Extractor:
    """A feature network with what a report must say of it.

    Attributes:
        module: uint8 (B, C, H, W) to (B, F).
        name: what metrics call it.
        fingerprint: SHA-256 of its weights and architecture.
        resize: what it does to a picture's size; ``none`` where it takes pictures as they are.
        is_fid: Inception's official weights under clean-fid's protocol, and nothing else.
        titles: what papers call the Fréchet and the kernel distance over these features, where they have a name.
    """

    module: nn.Module
    name: str
    fingerprint: str
    resize: str = "none"
    is_fid: bool = False
    titles: tuple[str, str] | None = None

    @property
    def num_features(self) -> int:
        return int(self.module.num_features)

    @property
    def metric(self) -> str:
        """The name of the Fréchet distance over these features."""
        if self.titles is not None:
            return self.titles[0]
        return "FID" if self.is_fid else f"frechet[{self.name}]"

    @property
    def kernel_metric(self) -> str:
        """The name of the kernel distance over these features."""
        if self.titles is not None:
            return self.titles[1]
        return "KID" if self.is_fid else f"kid[{self.name}]"

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Features (B, F) in float32 on the CPU of uint8 pictures (B, C, H, W)."""
        with reading(f"extractor {self.name}", "name another", "cannot be called on these pictures"):
            features = self.module(images)
        if not isinstance(features, Tensor) or features.shape != (len(images), self.num_features):
            got = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
            raise UserError(
                f"extractor {self.name}: gave {got} for {len(images)} pictures; it must give "
                f"({len(images)}, {self.num_features})"
            )
        features = features.float().cpu()
        if not is_finite(features):
            raise UserError(
                f"extractor {self.name}: gave features that are not numbers; its weights are broken, name another"
            )
        return features

    def to(self, device: str | torch.device) -> Extractor:
        """Move the network."""
        self.module.to(device)
        return self


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
    for parameter in module.parameters():  # TorchScript modules have no requires_grad_ of their own
        parameter.requires_grad_(False)
    if isinstance(module, FeatureNetwork):
        return Extractor(module, name or module.name, module.fingerprint())
    if isinstance(module, MatchingNetwork):
        return Extractor(module, name or module.name, module_fingerprint(module, json.dumps(module.architecture)))
    code = getattr(module, "code", "") if isinstance(module, torch.jit.ScriptModule) else ""
    kind = f"{type(module).__module__}.{type(module).__qualname__} {code}"
    return Extractor(module, name or type(module).__name__, module_fingerprint(module, kind))


def network_file(spec: str) -> Path | None:
    """The file that ``spec`` names if it names a feature network of ours, else None.

    Raises:
        UserError: an ``asset:`` that is not shipped.
    """
    if Path(spec).suffix == ".safetensors":
        return Path(assets.resolve(spec))
    shipped = assets.ROOT / spec / "features.safetensors"
    return shipped if re.fullmatch(r"\w+", spec) and shipped.is_file() else None


def reference_beside(spec: str) -> Path | None:
    """``reference.safetensors`` beside the feature network that ``spec`` names, or None where there is none."""
    network = network_file(spec)
    path = None if network is None else network.with_name("reference.safetensors")
    return path if path is not None and path.is_file() else None


def load_extractor(spec: str, device: str | torch.device = "cpu") -> Extractor:
    """An extractor by what a config says.

    - a shipped asset's name (``fashion_mnist``), or the path of a ``.safetensors`` file that we wrote, a classifier or
      a picture-caption network (``asset:fashion_mnist/features.safetensors`` too);
    - ``inception`` (weights where clean-fid expects them) or ``inception:FILE``: never downloads;
    - ``inception_tensorflow``, likewise: the same weights with the resize of TensorFlow's FID inside, as EDM has it;
    - ``dinov2:PATH``: DINOv2 from a local folder or file (:mod:`.dinov2`);
    - the path of a TorchScript file (``.pt``, ``.pth``, ``.ts``) whose module has ``num_features``;
    - ``module:attribute``: a Python object that is, or when called without arguments gives, such a module.

    Raises:
        UserError: nothing of these, or something that cannot be loaded.
    """
    path = Path(spec)
    kind, _, place = spec.partition(":")
    if kind in ("inception", "inception_tensorflow"):
        from .inception import load_inception

        extractor = load_inception(place or None, resize_inside=kind == "inception_tensorflow")
    elif kind == "dinov2":
        from .dinov2 import load_dinov2

        extractor = load_dinov2(place)
    elif (network := network_file(spec)) is not None:
        extractor = as_extractor(_load_ours(network))
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


def _load_ours(path: Path) -> FeatureNetwork | MatchingNetwork:
    """Whichever of the two kinds the file says that it is."""
    return MatchingNetwork.load(path) if is_matching(path) else FeatureNetwork.load(path)


def _load_torchscript(path: Path) -> nn.Module:
    with reading(f"extractor {path}", "save it with torch.jit", "not a TorchScript file"):
        return readers.read_torchscript(path)


def _import_module(spec: str) -> nn.Module:
    found = import_attribute(spec, "extractor")
    if not isinstance(found, nn.Module) and callable(found):
        found = made_by(found, spec, "extractor")
    if not isinstance(found, nn.Module):
        raise UserError(f"extractor {spec!r}: is a {type(found).__name__}; it must be a torch.nn.Module, or give one")
    return found
