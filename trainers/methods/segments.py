"""A time grid cut into segments: what trajectory consistency is trained on (Hyper-SD, 2404.13686 section 3.1).

Points u = 1..N are the times of an N-step sampler, ascending in noise, and u = 0 is where that sampler ends.  With k
segments the edges are ``b_j = floor(N j / k)``; a point belongs to the half-open segment ``(b_j, b_(j+1)]``, so each
has a start below it and none is empty.  (The paper's ``floor(t / floor(T/k)) floor(T/k)`` gives a point on an edge a
segment of length 0.)  Where k divides N the points b_1..b_k are the times of the k-step sampler.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stepdistill.sampler import FewStepSampler
from stepdistill.schedule import expand, noise_up


def edges(points: int, segments: int) -> list[int]:
    """``b_0 .. b_k``, from 0 to N.

    Raises:
        ValueError: more segments than points.
    """
    if not 1 <= segments <= points:
        raise ValueError(f"{segments} segments of {points} points")
    return [points * j // segments for j in range(segments + 1)]


@dataclass(frozen=True)
class SegmentGrid:
    """Times and coefficients of N points, u = 0 included: tensors of length N + 1.

    ``time[0]`` is a label that no network is asked at.
    """

    time: Tensor
    alpha: Tensor
    sigma: Tensor
    edges: Tensor

    @classmethod
    def of(cls, sampler: FewStepSampler, segments: int) -> SegmentGrid:
        """The grid whose points are the times of ``sampler``; u = 0 is where it ends: clean, or at timestep 0."""
        schedule = sampler.schedule
        probe = torch.zeros(1)
        time = torch.cat([sampler.time(i, probe) for i in range(sampler.steps)]).flip(0)
        alpha, sigma = schedule.alpha_sigma(time)
        first = torch.zeros_like(time[:1])
        last = (torch.ones(1), torch.zeros(1)) if sampler.ends_clean else schedule.alpha_sigma(first)
        alphas, sigmas = (torch.cat([end.double(), part.cpu()]) for end, part in zip(last, (alpha, sigma), strict=True))
        return cls(torch.cat([first, time]), alphas, sigmas, torch.tensor(edges(sampler.steps, segments)))

    def to(self, device: torch.device | str) -> SegmentGrid:
        return SegmentGrid(*(getattr(self, name).to(device) for name in ("time", "alpha", "sigma", "edges")))

    @property
    def points(self) -> int:
        return len(self.time) - 1

    def start(self, u: Tensor) -> Tensor:
        """The edge below point u (B,) in 1..N."""
        return self.edges[torch.searchsorted(self.edges, u) - 1]

    def end(self, u: Tensor) -> Tensor:
        """The edge at or above point u (B,) in 1..N."""
        return self.edges[torch.searchsorted(self.edges, u)]

    def add_noise(self, x0: Tensor, eps: Tensor, u: Tensor) -> Tensor:
        """``alpha_u x0 + sigma_u eps``, the move to point u (B,) along a prediction, too: the paper's Psi."""
        return (expand(self.alpha[u], x0) * x0 + expand(self.sigma[u], x0) * eps).to(x0.dtype)

    def renoised(self, x: Tensor, low: Tensor, high: Tensor, noise: Tensor) -> Tensor:
        """x (B, ...) at points ``low`` (B,) taken up to ``high`` (B,) by fresh noise."""
        return noise_up(x, (self.alpha[low], self.sigma[low]), (self.alpha[high], self.sigma[high]), noise)
