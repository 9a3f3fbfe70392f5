"""Fréchet distance and kernel distance between features, and the cached statistics of a reference set.

The arithmetic is torchmetrics' own, fed with features (float64 for the Fréchet distance) instead of pictures,
so that the reference is passed through the extractor once and kept.  It is of the process that calls it alone
(``sync_on_compute=False``): of several, one measures what all have drawn.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance
from tqdm import tqdm

from stepdistill.data.images import ImageSet
from stepdistill.errors import UserError, reading
from stepdistill.eval.extractors.base import Extractor, read_tensors, write_tensors
from stepdistill.finiteness import first_not_finite
from stepdistill.readers import parse_json, read_arrays
from stepdistill.seeds import generator


class _AsGiven(nn.Module):
    """Stands where torchmetrics wants an extractor: what it is given are features (N, F) already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def pixels_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1], any shape, to uint8 0..255, rounded to the nearest."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def unit_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1], any shape, to uint8 0..255, rounded to the nearest, as a picture file would hold them."""
    return (pixels.float() * 255).round().clamp(0, 255).to(torch.uint8)


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) and unbiased covariance (F, F), float64, of features (N, F)."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`` (Heusel et al., 1706.08500, eq. 6).

    Means (F,), covariances (F, F).  By torchmetrics in float64: its sums are set to what these moments imply
    (a count of 2 each, for which the unbiased covariance is the sum of squares less 2 m m^T).
    """
    metric = FrechetInceptionDistance(feature=_AsGiven(len(mean_a)), sync_on_compute=False)
    metric.orig_dtype = torch.float64
    for side, mean, cov in (("real", mean_a, cov_a), ("fake", mean_b, cov_b)):
        mean, cov = mean.double(), cov.double()
        setattr(metric, f"{side}_features_sum", 2 * mean)
        setattr(metric, f"{side}_features_cov_sum", cov + 2 * torch.outer(mean, mean))
        setattr(metric, f"{side}_features_num_samples", torch.tensor(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "compute before update": the sums were set, not updated
        return float(metric.compute())


def kernel_distance(
    reference: Tensor, features: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """KID: the squared MMD with the kernel ``(x.y / F + 1)^3`` (Binkowski et al., 1801.01401, eq. 3), unbiased.

    Reference (M, F), features (N, F).  Mean and std over ``subsets`` draws of ``subset_size`` (at most M and N).
    The global random state is left as it was.
    """
    size = min(subset_size, len(reference), len(features))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it keeps features in memory is what we want
        metric = KernelInceptionDistance(
            feature=_AsGiven(reference.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False
        )
    metric.update(reference.float(), real=True)
    metric.update(features.float(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return float(mean), float(std)


@dataclass(frozen=True)
class ReferenceStatistics:
    """What is kept of a reference set.

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
        """One safetensors file, written beside and renamed in."""
        tensors = {"mean": self.mean, "cov": self.cov, "features": self.features}
        metadata = {"kind": "stepdistill.ReferenceStatistics", "facts": json.dumps(self._facts())}
        return write_tensors(path, tensors, metadata)

    @classmethod
    def load(cls, path: str | Path) -> ReferenceStatistics:
        """From a file that :meth:`save` wrote, or of moments alone: an ``.npz`` with ``mu`` (F,) and ``sigma`` (F, F),
        as EDM, ADM and clean-fid publish.

        Raises:
            UserError: no such file, not safetensors, or not one of ours; an ``.npz`` without moments.
        """
        if Path(path).suffix == ".npz":
            return cls._of_moments(Path(path))
        kind, what = "stepdistill.ReferenceStatistics", "file of reference statistics"
        tensors, metadata = read_tensors(path, kind, what, "make them with make_reference")
        with reading(path, "make it again with make_reference", "not whole statistics"):
            facts = parse_json(metadata["facts"])
            facts["shape"] = tuple(facts["shape"])
            reference = cls(**tensors, **facts)
            reference.check_whole()
        return reference

    @classmethod
    def _of_moments(cls, path: Path) -> ReferenceStatistics:
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
    """Pass every picture through the extractor; keep the moments and a seeded subset of the features.

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
            pixels = pixels_uint8(images.batch(index))
            chunks.append(extractor(pixels.to(device)))
            bar.update(len(index))
    features = torch.cat(chunks)
    mean, cov = mean_and_covariance(features)
    kept = torch.randperm(len(features), generator=generator(seed))[:kid_features]
    return ReferenceStatistics(
        n=len(features),
        mean=mean,
        cov=cov,
        features=features[kept].half(),
        extractor=extractor.name,
        extractor_fingerprint=extractor.fingerprint,
        shape=tuple(pixels.shape[1:]),
        resize=resize,
        source=source or images.source,
    )
