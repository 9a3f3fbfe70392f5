"""Random draws that do not depend on how many processes share the work.

Every process holds the same generator and draws for the whole world's batch, then takes its rows of it.  So a run on
four processes sees the numbers of the same run on one, one generator's state is all a checkpoint needs, and "the same
draw on all ranks" costs nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .seeds import generator


class Noise:
    """Seeded draws for process ``rank`` of ``world``."""

    def __init__(self, seed: int, device: torch.device | str = "cpu", rank: int = 0, world: int = 1):
        self.device, self.rank, self.world = torch.device(device), rank, world
        self.generator = generator(seed, self.device)

    def _rows_of_rank(self, whole: Tensor) -> Tensor:
        return whole.chunk(self.world)[self.rank] if self.world > 1 else whole

    def randn(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal; ``shape[0]`` is this process's batch."""
        whole = (shape[0] * self.world, *shape[1:])
        return self._rows_of_rank(torch.randn(whole, generator=self.generator, device=self.device, dtype=dtype))

    def randn_like(self, like: Tensor) -> Tensor:
        return self.randn(*like.shape, dtype=like.dtype)

    def randint(self, low: int, high: int, count: int) -> Tensor:
        """Integers ``low .. high`` (both included) for each of this process's ``count`` samples."""
        size = (count * self.world,)
        return self._rows_of_rank(torch.randint(low, high + 1, size, generator=self.generator, device=self.device))

    def uniform(self, count: int) -> Tensor:
        """U[0, 1) for each of this process's ``count`` samples, float32."""
        return self._rows_of_rank(torch.rand(count * self.world, generator=self.generator, device=self.device))

    def shared_randint(self, low: int, high: int) -> int:
        """One integer ``low .. high`` for all samples of all processes.  No draw where there is no choice."""
        if low == high:
            return low
        return int(torch.randint(low, high + 1, (1,), generator=self.generator, device=self.device))

    def shared_uniform(self) -> float:
        """One U[0, 1) for all samples of all processes."""
        return float(torch.rand(1, generator=self.generator, device=self.device))

    def get_state(self) -> Tensor:
        """The generator's state, uint8."""
        return self.generator.get_state()

    def set_state(self, state: Tensor) -> None:
        self.generator.set_state(state.cpu())
