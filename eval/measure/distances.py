"""Fréchet distance and kernel distance between features.

The arithmetic is torchmetrics', fed with features (float64 for the Fréchet distance) instead of pictures, so that the
reference passes through the extractor once.  It stays in the process that calls it (``sync_on_compute=False``): of
several, one measures what all have drawn.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance


class _Identity(nn.Module):
    """In torchmetrics' place for an extractor: its inputs are features (N, F) already."""

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def mean_and_covariance(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (F,) and unbiased covariance (F, F), float64, of features (N, F)."""
    features = features.double()
    return features.mean(0), torch.cov(features.T)


def frechet_distance(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`` (Heusel et al., 1706.08500, eq. 6).

    Means (F,), covariances (F, F).  By torchmetrics in float64: its sums are set to what these moments imply
    (a count of 2 each, for which the unbiased covariance is the sum of squares less 2 m m^T).
    """
    metric = FrechetInceptionDistance(feature=_Identity(len(mean_a)), sync_on_compute=False)
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
        warnings.simplefilter("ignore", UserWarning)  # that it keeps features in memory is intended
        metric = KernelInceptionDistance(
            feature=_Identity(reference.shape[1]), subsets=subsets, subset_size=size, sync_on_compute=False
        )
    metric.update(reference.float(), real=True)
    metric.update(features.float(), real=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mean, std = metric.compute()
    return float(mean), float(std)
