"""Distributions whose denoiser is known in closed form: teachers that every method can be checked against.

For data ``N(mu, S)`` and ``x_t = alpha x0 + sigma eps`` the posterior mean is

    m(x_t, t) = mu + alpha S (alpha^2 S + sigma^2 I)^-1 (x_t - alpha mu),

and for a mixture it is the responsibility-weighted sum of these.  The score, eps and v follow from it.

Example::

    mixture = GaussianMixture(means=[[-1.0, 0.0], [1.0, 0.0]], covariances=0.05)
    teacher = mixture.denoiser(VPSchedule(alphas_cumprod))
    x0 = teacher(x_t, t, {}).x0
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from numpy.typing import ArrayLike
from torch import Tensor

from .denoiser import Condition, Prediction
from .schedule import Schedule


class GaussianMixture:
    """A mixture of K Gaussians in D dimensions; K = 1 is a Gaussian.

    Args:
        means: (K, D).
        covariances: (K, D, D), or (D, D) shared by all, or one variance for all.
        weights: (K,), summing to 1; uniform by default.
        labels: (K,) ints: component k belongs to class labels[k]; None for an unconditional mixture.
            The label ``num_labels`` (one past the last) is the null label: the whole mixture.
    """

    def __init__(
        self,
        means: ArrayLike | Tensor,
        covariances: ArrayLike | Tensor,
        weights: ArrayLike | Tensor | None = None,
        labels: Sequence[int] | Tensor | None = None,
        dtype: torch.dtype = torch.float64,
    ):
        self.means = torch.as_tensor(means, dtype=dtype)
        count, dim = self.means.shape
        covariances = torch.as_tensor(covariances, dtype=dtype)
        if covariances.ndim == 0:
            covariances = covariances * torch.eye(dim, dtype=dtype)
        self.covariances = covariances.expand(count, dim, dim)
        self.weights = (
            torch.full((count,), 1 / count, dtype=dtype) if weights is None else torch.as_tensor(weights, dtype=dtype)
        )
        self.labels = None if labels is None else torch.as_tensor(labels, dtype=torch.long)
        self.num_labels = 0 if self.labels is None else int(self.labels.max()) + 1

    def log_weights(self, label: Tensor | None, count: int) -> Tensor:
        """Log prior of each component, (count, K), given labels (count,) or None."""
        logs = self.weights.log().expand(count, -1)
        if label is None or self.labels is None:
            return logs
        allowed = (label[:, None] == self.labels) | (label[:, None] == self.num_labels)
        return torch.log_softmax(logs.masked_fill(~allowed, -torch.inf), dim=1)

    def sample(self, count: int, generator: torch.Generator | None = None, label: Tensor | None = None) -> Tensor:
        """``count`` samples (count, D); ``label`` (count,) chooses the class of each."""
        component = torch.multinomial(self.log_weights(label, count).exp(), 1, generator=generator)[:, 0]
        noise = torch.randn(count, self.means.shape[1], dtype=self.means.dtype, generator=generator)
        factors = torch.linalg.cholesky(self.covariances)
        return self.means[component] + torch.einsum("nij,nj->ni", factors[component], noise)

    def denoiser(self, schedule: Schedule) -> MixtureDenoiser:
        """The exact denoiser of the mixture on ``schedule``."""
        return MixtureDenoiser(self, schedule)


class MixtureDenoiser:
    """The exact posterior mean of a :class:`GaussianMixture`; differentiable in x_t.

    Takes x_t of any shape (B, ...) that flattens to (B, D); the condition may hold ``label`` (B,).
    """

    def __init__(self, mixture: GaussianMixture, schedule: Schedule):
        self.mixture, self.schedule = mixture, schedule

    def posterior(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> tuple[Tensor, Tensor]:
        """Posterior mean (B, D) and log q_t(x_t) (B,) for flat float64 ``x_t`` (B, D)."""
        mixture = self.mixture
        alpha, sigma = (c[:, None, None, None] for c in self.schedule.alpha_sigma(t))
        eye = torch.eye(x_t.shape[1], dtype=x_t.dtype)
        marginal = alpha**2 * mixture.covariances + sigma**2 * eye  # (B, K, D, D)
        residual = (x_t[:, None] - alpha[..., 0] * mixture.means)[..., None]  # (B, K, D, 1)
        solved = torch.linalg.solve(marginal, residual)
        means = mixture.means + (alpha * mixture.covariances @ solved)[..., 0]
        log_likelihood = -0.5 * ((residual * solved).sum((-2, -1)) + torch.logdet(2 * torch.pi * marginal))
        joint = mixture.log_weights(label, len(x_t)) + log_likelihood
        return (joint.softmax(1)[..., None] * means).sum(1), joint.logsumexp(1)

    def __call__(self, x_t: Tensor, t: Tensor, condition: Condition) -> Prediction:
        flat = x_t.flatten(1).to(self.mixture.means.dtype)
        x0, _ = self.posterior(flat, t, condition.get("label"))
        return Prediction(self.schedule, x_t, t, x0.reshape(x_t.shape).to(x_t.dtype), "x0")

    def log_density(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """log q_t(x_t) of the noised mixture, (B,)."""
        return self.posterior(x_t.flatten(1).to(self.mixture.means.dtype), t, label)[1]
