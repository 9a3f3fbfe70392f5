"""Seeds of random generators: 0 to 2^32 - 1.

torch's CPU generator reads the low 32 bits of a seed and no more, so 2^32 would be 0 and -1 would be 2^32 - 1.  A
config's seed is therefore in this range, with room for the seeds that are derived from it by counting up.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import torch
from pydantic import Field

SEEDS = 2**32
"""The number of seeds."""
OFFSETS = 16
"""Room for what a run derives from its seed: seed + 1, seed + 2, ..."""
LARGEST = SEEDS - OFFSETS
"""The largest seed of a run."""

Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
RunSeed = Annotated[int, Field(ge=0, le=LARGEST)]
"""A seed from which others are derived by adding less than ``OFFSETS``."""


def generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A new generator.

    Raises:
        ValueError: the seed is outside 0..2^32 - 1, so that another one would give the same numbers.
    """
    if not 0 <= seed < SEEDS:
        raise ValueError(f"seed {seed} is outside 0..{SEEDS - 1:,}, the seeds that differ")
    return torch.Generator(device).manual_seed(seed)


class DistinctSeeds:
    """A seed for each index 0, 1, ...: a hash of it, or the next number that no lower index has taken.

    Hashes of 32 bits meet: of 10,000 of them two are equal with a probability of about 1 %.
    """

    def __init__(self, hashed: Callable[[int], int]):
        self._hashed = hashed
        self._seeds: list[int] = []
        self._taken: set[int] = set()

    def __getitem__(self, index: int) -> int:
        while len(self._seeds) <= index:
            seed = self._hashed(len(self._seeds)) % SEEDS
            while seed in self._taken:
                seed = (seed + 1) % SEEDS
            self._seeds.append(seed)
            self._taken.add(seed)
        return self._seeds[index]
