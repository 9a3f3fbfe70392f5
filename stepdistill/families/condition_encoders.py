"""The condition part of a family: labels or prompts as tensors of one length, and the null condition."""

from __future__ import annotations

import abc

import torch
from torch import nn

from stepdistill.conditions import ConditionKind
from stepdistill.denoiser import Condition
from stepdistill.errors import UserError


class ConditionEncoder(abc.ABC):
    """What turns conditions into what a network takes.

    Attributes:
        kind: ``none``, ``label`` or ``prompt``.
        labels: the numbers of an embedding that stand for a class, ascending; the null label is not among them.
        has_null: whether there is a null condition, which guidance needs.
    """

    kind: ConditionKind
    labels: tuple[int, ...] = ()
    has_null: bool = False

    @abc.abstractmethod
    def encode(self, items: list, device: torch.device) -> Condition:
        """Labels or prompts as named tensors, batch first, of a length that does not depend on the items."""

    @abc.abstractmethod
    def null(self, count: int, device: torch.device) -> Condition:
        """The null condition for ``count`` samples.

        Raises:
            UserError: there is none.
        """

    def prompts_cut(self, prompts: list[str]) -> list[int]:
        """The places of the prompts that are longer than the encoder reads; none where that is not known."""
        return []

    def networks(self) -> dict[str, nn.Module]:
        """Its networks by the names of their folders."""
        return {}

    def to(self, device: torch.device | str) -> None:
        """Move its networks."""
        for network in self.networks().values():
            network.to(device)


class NoConditions(ConditionEncoder):
    """Of an unconditional teacher."""

    kind: ConditionKind = "none"

    def encode(self, items: list, device: torch.device) -> Condition:
        return {}

    def null(self, count: int, device: torch.device) -> Condition:
        raise UserError("this teacher takes no labels and no prompts, so it cannot be guided: set guidance_scale to 1")


class Labels(ConditionEncoder):
    """Of a class-conditional teacher: ``label`` (B,), a number of the network's own embedding.

    Args:
        embeddings: how many numbers the embedding has.
        null_label: the one that stands for no class; None: there is none.
    """

    kind: ConditionKind = "label"

    def __init__(self, embeddings: int, null_label: int | None):
        self.null_label, self.has_null = null_label, null_label is not None
        self.labels = class_labels(embeddings, null_label)

    def encode(self, items: list, device: torch.device) -> Condition:
        return {"label": torch.as_tensor(items, dtype=torch.long, device=device)}

    def null(self, count: int, device: torch.device) -> Condition:
        if self.null_label is None:
            raise UserError(
                "this teacher has no null label, so it cannot be guided: set guidance_scale to 1, or say with "
                "teacher.null_label which of its labels is that"
            )
        return {"label": torch.full((count,), self.null_label, dtype=torch.long, device=device)}


def class_labels(embeddings: int | None, null_label: int | None) -> tuple[int, ...]:
    """The labels that stand for a class, of so many embeddings (None: of no labels)."""
    return tuple(label for label in range(embeddings or 0) if label != null_label)
