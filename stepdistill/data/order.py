"""The order in which conditions and real images are taken.

It is a function of (seed, position) alone, so a run resumes by remembering one integer, and any number of processes see
the same global batches.
"""

from __future__ import annotations

import numpy as np


class Order:
    """An endless shuffled order over ``size`` items: a fresh permutation each epoch, seeded by (seed, epoch)."""

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self._epoch, self._permutation = -1, np.empty(0, dtype=np.int64)

    def _epoch_permutation(self, epoch: int) -> np.ndarray:
        if epoch != self._epoch:
            self._permutation = np.random.default_rng((self.seed, epoch)).permutation(self.size)
            self._epoch = epoch
        return self._permutation

    def indices(self, position: int, count: int) -> list[int]:
        """The items at ``position .. position + count - 1`` of the order."""
        positions = range(position, position + count)
        return [int(self._epoch_permutation(n // self.size)[n % self.size]) for n in positions]
