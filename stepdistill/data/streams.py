"""Seeded orders of the data that a run is trained on: conditions, real samples, preference pairs, the teacher's pairs.

A position in an order is a number that counts up over the whole run and all its processes, so the same samples are
drawn by any number of processes and after a resume.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stepdistill.conditions import draw_caption
from stepdistill.denoiser import Condition, select_rows
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.finiteness import first_not_finite
from stepdistill.sampler import Draw

from .images import ImageSet
from .order import Order
from .pictures import as_pixels
from .preference_pairs import PreferencePairs
from .teacher_pairs import PairSet

MOST_ENCODED = 20_000
"""Prompts whose encodings stay in memory: SD 1.5's are 4.7 GB."""


class ConditionSource:
    """Encoded conditions in a seeded order.

    Args:
        items: labels or prompts of the student.
        all_items: those of every student, where there are several.
        most_encoded: up to so many prompts are encoded once and stay in memory.

    Raises:
        UserError: encodings that are not finite.
    """

    def __init__(
        self,
        family: Family,
        items: list[Any],
        seed: int,
        all_items: list[Any] | None = None,
        most_encoded: int = MOST_ENCODED,
    ):
        self.family, self.items, self.order = family, items, Order(max(1, len(items)), seed)
        self.all_items = items if all_items is None else all_items
        self._encoded: Condition | None = None
        if family.condition_kind == "prompt" and len(items) <= most_encoded:
            texts = list(dict.fromkeys(text for item in items for text in getattr(item, "every", (item,))))
            if len(texts) <= most_encoded:
                self._encode(texts)

    def _encode(self, texts: list[str]) -> None:
        """Encode texts, once each."""
        self._rows = {text: row for row, text in enumerate(texts)}
        parts = [self.family.encode_conditions(texts[i : i + 64]) for i in range(0, len(texts), 64)]
        self._encoded = {k: torch.cat([p[k].cpu() for p in parts]) for k in parts[0]}
        if first_not_finite(self._encoded.items()) is not None:
            raise UserError(
                "data: the teacher's text encoder gives encodings of the prompts that are not finite; load it in "
                "float32 (teacher.dtype=float32)"
            )

    def batch(self, position: int, count: int) -> tuple[Condition, list[Any]]:
        """Conditions ``position .. position + count - 1`` of the order, and the items that they are of; of an item
        with several captions one, drawn by the seed and the position."""
        if self.family.condition_kind == "none":
            return {}, []
        index = self.order.indices(position, count)
        return self.encode([draw_caption(self.items[i], self.order.seed, position + k) for k, i in enumerate(index)])

    def encode_at(self, index: list[int]) -> tuple[Condition, list[Any]]:
        """The conditions of items ``index``, and those items; of several captions the first."""
        return self.encode([draw_caption(self.items[i], self.order.seed, 0) for i in index])

    def encode(self, items: list[Any]) -> tuple[Condition, list[Any]]:
        """The conditions of labels or prompts of this source, and these."""
        if self._encoded is None:
            return self.family.encode_conditions(items), items
        rows = torch.tensor([self._rows[item] for item in items])
        return {k: v.to(self.family.device) for k, v in select_rows(self._encoded, rows).items()}, items


@dataclass(frozen=True)
class RealBatch:
    """Real samples (B, C, H, W), their conditions, the labels or captions that these are of ([] for none), and which
    images they are."""

    samples: Tensor
    condition: Condition
    items: list[Any]
    indices: list[int]


class RealSource:
    """Real samples (latents where there is a VAE) with their conditions, in a seeded order.

    An image that cannot be read is replaced by the next one of ``subset`` that can, whenever that is noticed: the
    batches are the same in every process and after a resume.

    Args:
        subset: the indices of the images that are drawn; all of them by default.
        std: standard deviations of the latents (N, C, H, W), where each use draws a new sample; None where the latents
            are the samples.
    """

    def __init__(
        self,
        family: Family,
        images: ImageSet,
        latents: Tensor | None,
        seed: int,
        subset: list[int] | None = None,
        std: Tensor | None = None,
    ):
        self.family, self.images, self.latents, self.seed, self.std = family, images, latents, seed, std
        self.restrict(list(range(len(images))) if subset is None else subset)

    def restrict(self, subset: list[int]) -> None:
        """Draw from these images only from now on."""
        self.subset, self.order = subset, Order(len(subset), self.seed)

    def batch(self, position: int, count: int, draw: Draw | None = None) -> RealBatch:
        """The images at ``position .. position + count - 1`` of the order; of several captions of one image one, drawn
        by the seed and the position.  ``draw``: the noise of latents that are drawn.

        Raises:
            UserError: none of the images can be read.
        """
        index, pixels = self._at(self.order.indices(position, count))
        samples = self.samples(index, draw) if pixels is None else self._encoded(pixels)
        items = [draw_caption(item, self.seed, position + k) for k, item in enumerate(self.items(index))]
        condition = self.family.encode_conditions(items) if items else {}
        return RealBatch(samples, condition, items, index)

    def _at(self, places: list[int]) -> tuple[list[int], Tensor | None]:
        """The images at places of the subset, or those that replace them; their pixels where there are no latents."""
        if self.latents is not None:
            return [self._next(place, lambda i: i not in self.images.unreadable) for place in places], None
        pixels: dict[int, np.ndarray] = {}

        def read(index: int) -> bool:
            if index not in pixels and (image := self.images.pixels(index)) is not None:
                pixels[index] = image
            return index in pixels

        index = [self._next(place, read) for place in places]
        return index, as_pixels([pixels[i] for i in index])

    def _next(self, place: int, good: Callable[[int], bool]) -> int:
        for step in range(len(self.subset)):
            if good(index := self.subset[(place + step) % len(self.subset)]):
                return index
        raise UserError(f"{self.images.source}: none of its images can be read; {self.images.unreadable_note}")

    def readable(self, index: int) -> bool:
        """Whether one image can be read."""
        if self.latents is not None:
            return index not in self.images.unreadable
        return self.images.pixels(index) is not None

    def items(self, index: list[int]) -> list[Any]:
        """The labels or captions of images ``index``; [] where the teacher takes none."""
        labels = self.images.labels
        return [] if self.family.condition_kind == "none" or labels is None else [labels[i] for i in index]

    def samples(self, index: list[int], draw: Draw | None = None) -> Tensor:
        """The samples ``index`` (len(index), C, H, W); latents that are drawn take their noise from ``draw``.

        Raises:
            ValueError: they are drawn, and there is no ``draw``.
        """
        mean, std = self.moments(index)
        if std is None:
            return mean
        if draw is None:
            raise ValueError("latents that are drawn need noise")
        return mean + std * draw(mean)

    def moments(self, index: list[int]) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation (len(index), C, H, W) of the samples ``index``; None for none."""
        device = self.family.device
        if self.latents is None:
            return self._encoded(self.images.batch(index)), None
        std = None if self.std is None else self.std[index].float().to(device)
        return self.latents[index].float().to(device), std

    def _encoded(self, pixels: Tensor) -> Tensor:
        return self.family.encode_images(pixels.to(self.family.device))


@dataclass(frozen=True)
class PreferenceBatch:
    """Samples (B, C, H, W) of preferred and other pictures, their conditions, what these are of, and which pairs."""

    winner: Tensor
    loser: Tensor
    condition: Condition
    items: list[Any]
    indices: list[int]


class PreferenceSource:
    """Preference pairs as samples, in a seeded order; a pair that cannot be read is replaced by the next one."""

    def __init__(self, family: Family, pairs: PreferencePairs, sources: list[RealSource], seed: int):
        self.family, self.pairs, self.sources = family, pairs, sources
        self.order = Order(len(pairs), seed)

    @property
    def images(self) -> list[ImageSet]:
        return list(self.pairs.sets)

    def batch(self, position: int, count: int, draw: Draw) -> PreferenceBatch:
        """The pairs at ``position .. position + count - 1`` of the order; ``draw``: the noise of latents that are
        drawn, one draw for the winners and one for the losers.

        Raises:
            UserError: there is no pair of which both pictures can be read.
        """
        index = [self._readable(number) for number in self.order.indices(position, count)]
        winner, loser = (self._samples([self.pairs.order[i][side] for i in index], draw) for side in (0, 1))
        labels = self.pairs.labels
        items = [] if self.family.condition_kind == "none" or labels is None else [labels[i] for i in index]
        items = [draw_caption(item, self.order.seed, position + k) for k, item in enumerate(items)]
        condition = self.family.encode_conditions(items) if items else {}
        return PreferenceBatch(winner, loser, condition, items, index)

    def _readable(self, number: int) -> int:
        """The pair itself, or the next one of which both pictures can be read."""
        for step in range(len(self.pairs)):
            other = (number + step) % len(self.pairs)
            if all(self.sources[part].readable(index) for part, index in self.pairs.order[other]):
                return other
        raise UserError("pso.pairs: there is no pair of which both pictures can be read")

    def _samples(self, pictures: list[tuple[int, int]], draw: Draw) -> Tensor:
        """Samples (B, C, H, W), each named by its set and index; latents that are drawn take one draw for all, so that
        it is the same on any number of processes."""
        means: dict[int, Tensor] = {}
        stds: dict[int, Tensor] = {}
        for number, source in enumerate(self.sources):
            places = [place for place, (part, _) in enumerate(pictures) if part == number]
            if places:
                mean, std = source.moments([pictures[place][1] for place in places])
                for row, place in enumerate(places):
                    means[place] = mean[row]
                    if std is not None:
                        stds[place] = std[row]
        mean = torch.stack([means[place] for place in range(len(pictures))])
        if not stds:
            return mean
        return mean + torch.stack([stds[place] for place in range(len(pictures))]) * draw(mean)


class PairSource:
    """The teacher's noise-sample pairs in a seeded order.

    Args:
        make: makes the pairs that are missing and returns all of them; called once, by :meth:`open`.
    """

    def __init__(self, family: Family, make: Callable[[], PairSet], seed: int):
        self.family, self.make, self.seed = family, make, seed
        self.pairs: PairSet | None = None

    def open(self) -> PairSet:
        """The pairs, once those that are missing are made."""
        if self.pairs is None:
            self.pairs = self.make()
            self.order = Order(len(self.pairs), self.seed)
        return self.pairs

    def batch(self, position: int, count: int) -> tuple[Tensor, RealBatch]:
        """The noise (B, C, H, W) of the pairs at ``position .. position + count - 1`` of the order, and their samples.

        Raises:
            UserError: pairs are missing, damaged or of other settings.
        """
        pairs = self.open()
        index = self.order.indices(position, count)
        items = [pairs.items[i] for i in index] if pairs.items else []
        condition = self.family.encode_conditions(items) if items else {}
        noise, x0 = (part[index].to(self.family.device) for part in (pairs.noise, pairs.x0))
        return noise, RealBatch(x0, condition, items, index)
