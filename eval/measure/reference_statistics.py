"""The statistics of a reference set, computed once and saved: moments, and some features."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from stepdistill.data.images import ImageSet
from stepdistill.data.pixels import signed_to_bytes
from stepdistill.errors import UserError, reading
from stepdistill.eval.extractors.base import Extractor
from stepdistill.eval.tensor_files import read_tensors
from stepdistill.files import write_tensors
from stepdistill.finiteness import first_not_finite
from stepdistill.plain_files import parse_json
from stepdistill.readers import read_arrays
from stepdistill.seeds import generator

from .distances import frechet_distance, kernel_distance, mean_and_covariance


@dataclass(frozen=True)
class ReferenceStatistics:
    """What is stored of a reference set.

    Attributes:
        n: how many pictures; 0 where the file does not say.
        mean, cov: (F,) and (F, F), float64.
        features: (M, F) float16, a seeded subset for the kernel distance, and precision and recall; of moments alone
            (0, F).
        extractor, extractor_fingerprint: with what they were made; "" where the file does not say.
        shape: (C, H, W) of the pictures; zeros where the file does not say.
        resize: how the pictures came to that shape.
        source: what they are called.
    """

    n: int
    mean: Tensor
    cov: Tensor
    features: Tensor
    extractor: str
    extractor_fingerprint: str
    shape: tuple[int, int, int]
    resize: str
    source: str

    def _facts(self) -> dict:
        return {
            "n": self.n,
            "extractor": self.extractor,
            "extractor_fingerprint": self.extractor_fingerprint,
            "shape": list(self.shape),
            "resize": self.resize,
            "source": self.source,
        }

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the facts (extractor, resize, resolution, n, source) and of the numbers."""
        digest = hashlib.sha256(json.dumps(self._facts(), sort_keys=True).encode())
        for tensor in (self.mean, self.cov, self.features):
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save(self, path: str | Path) -> Path:
        """One safetensors file, written under another name and renamed."""
        tensors = {"mean": self.mean, "cov": self.cov, "features": self.features}
        metadata = {"kind": "stepdistill.ReferenceStatistics", "facts": json.dumps(self._facts())}
        return write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> ReferenceStatistics:
        """From a file that :meth:`save` wrote, or of moments alone: an ``.npz`` with ``mu`` (F,) and ``sigma`` (F, F),
        as EDM, ADM and clean-fid publish.

        Raises:
            UserError: no such file, not safetensors, or of something else; an ``.npz`` without moments.
        """
        if Path(path).suffix == ".npz":
            return cls._load_moments(Path(path))
        kind, what = "stepdistill.ReferenceStatistics", "file of reference statistics"
        tensors, metadata = read_tensors(path, kind, what, "make them with make_reference")
        with reading(path, "make it again with make_reference", "not whole statistics"):
            facts = parse_json(metadata["facts"])
            arguments: dict[str, Any] = {**tensors, **facts, "shape": tuple(facts["shape"])}
            reference = cls(**arguments)
            reference.check_whole()
        return reference

    @classmethod
    def _load_moments(cls, path: Path) -> ReferenceStatistics:
        if not path.exists():
            raise UserError(f"{path}: no such file of reference statistics; name another")
        with reading(path, "name another file", "not an .npz with arrays mu and sigma"):
            arrays = read_arrays(path, "mu", "sigma")
            mean, cov = (
                torch.from_numpy(arrays[name].astype(np.float64, casting="same_kind")) for name in ("mu", "sigma")
            )
        if mean.ndim != 1 or cov.shape != (len(mean), len(mean)):
            raise UserError(f"{path}: mu {tuple(mean.shape)} and sigma {tuple(cov.shape)} are not moments; replace it")
        none = torch.zeros(0, len(mean), dtype=torch.float16)
        reference = cls(0, mean, cov, none, "", "", (0, 0, 0), "the file does not say", path.name)
        with reading(path, "replace it", "not whole statistics"):
            reference.check_whole()
        return reference

    def check_whole(self) -> None:
        """
        Raises:
            ValueError: a fact or a tensor of another type or shape, or a number that is not finite.
        """
        width = len(self.mean) if self.mean.ndim == 1 else 0
        if width < 1 or self.cov.shape != (width, width) or self.features.shape[1:] != (width,):
            shapes = [tuple(tensor.shape) for tensor in (self.mean, self.cov, self.features)]
            raise ValueError(f"mean, covariance and features of shapes {', '.join(map(str, shapes))}")
        if not all(tensor.is_floating_point() for tensor in (self.mean, self.cov, self.features)):
            raise ValueError("its tensors are no floating-point numbers")
        tensors = {"mean": self.mean, "covariance": self.cov, "features": self.features}
        if (odd := first_not_finite(tensors.items())) is not None:
            raise ValueError(f"its {odd} holds a NaN or an infinity")
        words = (self.extractor, self.extractor_fingerprint, self.resize, self.source)
        numbers = (self.n, *self.shape)
        if not all(isinstance(word, str) for word in words) or len(self.shape) != 3:
            raise ValueError("its facts are of another type")
        if not all(isinstance(number, int) and number >= 0 for number in numbers):
            raise ValueError("its numbers of pictures and pixels are no counts")

    def check(self, extractor: Extractor, shape: tuple[int, int, int] | None = None) -> None:
        """Refuse another extractor, or pictures (C, H, W) of another shape where the extractor does not resize.

        Moments alone say of their extractor no more than how many features it has.

        Raises:
            UserError: either does not fit.
        """
        if not self.extractor_fingerprint:
            if extractor.num_features != len(self.mean):
                raise UserError(
                    f"reference {self.source}: of {len(self.mean)} features, and extractor {extractor.name} gives "
                    f"{extractor.num_features}; name statistics made with that extractor"
                )
            return
        if extractor.fingerprint != self.extractor_fingerprint:
            raise UserError(
                f"reference {self.source}: made with extractor {self.extractor} "
                f"({self.extractor_fingerprint[:12]}), not with {extractor.name} "
                f"({extractor.fingerprint[:12]}); make the reference again with the extractor in use"
            )
        if shape is not None and extractor.resize == "none" and tuple(shape) != self.shape:
            raise UserError(
                f"reference {self.source}: its pictures are {self.shape} (C, H, W), these are {tuple(shape)}; "
                "make a reference of that size"
            )

    def frechet(self, features: Tensor) -> float:
        """The Fréchet distance of features (N, F), N at least 2, from this reference."""
        return frechet_distance(self.mean, self.cov, *mean_and_covariance(features))

    def kernel(self, features: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0) -> tuple[float, float]:
        """Mean and std of the kernel distance of features (N, F) from this reference."""
        return kernel_distance(self.features, features, subsets, size, seed)


def make_reference(
    images: ImageSet,
    extractor: Extractor,
    source: str | None = None,
    kid_features: int = 5000,
    seed: int = 0,
    batch_size: int = 250,
    resize: str = "none",
    device: str | torch.device = "cpu",
) -> ReferenceStatistics:
    """Pass every picture through the extractor; store the moments and a seeded subset of the features.

    Args:
        images: the reference pictures, at least two.
        source: what reports call them; by default where they were read from.
        resize: how ``images`` came to its size, in words, for the report.

    Raises:
        UserError: fewer than two pictures, or pictures that the extractor does not take.
    """
    if len(images) < 2:
        raise UserError(f"{images.source}: a reference needs at least 2 pictures, it has {len(images)}")
    extractor.to(device)
    chunks = []
    with tqdm(total=len(images), desc=f"reference {source or images.source}", unit="img") as bar:
        for start in range(0, len(images), batch_size):
            index = list(range(start, min(start + batch_size, len(images))))
            pixels = signed_to_bytes(images.batch(index))
            chunks.append(extractor(pixels.to(device)))
            bar.update(len(index))
    features = torch.cat(chunks)
    mean, cov = mean_and_covariance(features)
    channels, height, width = pixels.shape[1:]
    chosen = torch.randperm(len(features), generator=generator(seed))[:kid_features]
    return ReferenceStatistics(
        n=len(features),
        mean=mean,
        cov=cov,
        features=features[chosen].half(),
        extractor=extractor.name,
        extractor_fingerprint=extractor.fingerprint,
        shape=(channels, height, width),
        resize=resize,
        source=source or images.source,
    )
