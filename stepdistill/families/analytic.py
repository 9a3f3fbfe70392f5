"""A teacher that is a function: closed-form denoisers for checking a method, or trying an idea in seconds.

Student and fake score are copies of a network that you give; the teacher is any :class:`Denoiser` (see
``stepdistill.analytic``).  There is nothing to export.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from stepdistill.denoiser import Condition, Denoiser
from stepdistill.errors import UserError
from stepdistill.schedule import PredictionType

from .base import Family


class AnalyticFamily(Family):
    """Args:
    teacher: the closed-form denoiser; its schedule is the family's.
    network: called as ``network(x, time, label)`` with x (B, C, H, W), time (B,), label (B,) or None; gives the
        shape of x.  Student and fake score start as copies of it.
    kind: what ``network`` predicts.
    sample_shape: (C, H, W); D-dimensional data is (D, 1, 1).
    num_labels: labels 0..num_labels-1, the label ``num_labels`` being the null label; 0 is unconditional.
    feature_module: the attribute path of the module whose output a discriminator reads, "" for none.
    """

    name = "analytic"
    lora_targets = "all-linear"

    def __init__(
        self,
        teacher: Denoiser,
        network: nn.Module,
        kind: PredictionType,
        sample_shape: tuple[int, int, int],
        num_labels: int = 0,
        feature_module: str = "",
    ):
        self.teacher, self.network, self.kind, self.sample_shape = teacher, network, kind, sample_shape
        self.schedule = teacher.schedule
        self.scheduler = None
        self.labels, self.feature_module = tuple(range(num_labels)), feature_module
        self.condition_kind = "label" if num_labels else "none"
        self.has_null = num_labels > 0

    def teacher_denoiser(self) -> Denoiser:
        return self.teacher

    def forward(self, network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return network(x, time, condition.get("label"))

    def mid_block(self, network: nn.Module) -> nn.Module:
        if not self.feature_module:
            raise UserError("this analytic family names no feature_module for a discriminator")
        return network.get_submodule(self.feature_module)

    def fresh_network(self, like: nn.Module | None = None) -> nn.Module:
        return copy.deepcopy(self.network if like is None else like)

    def encode_conditions(self, items: list) -> Condition:
        return {"label": torch.as_tensor(items, device=self.device)} if self.num_labels else {}

    def null_condition(self, count: int) -> Condition:
        if not self.has_null:
            raise UserError("this analytic teacher has no labels, so it cannot be guided")
        return {"label": torch.full((count,), self.num_labels, device=self.device)}

    def pipeline(self, network: nn.Module, scheduler):
        raise UserError("an analytic family has no stock pipeline to export to")

    @property
    def guidance_off(self) -> dict[str, float]:
        return {}
