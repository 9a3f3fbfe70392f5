"""A teacher that is a function: closed-form denoisers for checking a method, or trying an idea in seconds.

Student and fake score are copies of a network that you give; the teacher is any :class:`Denoiser` (see
``stepdistill.analytic``).  There is nothing to export.
"""

from __future__ import annotations

import copy
from typing import Any

from diffusers import DiffusionPipeline
from torch import Tensor, nn

from stepdistill.denoiser import Condition, Denoiser
from stepdistill.errors import UserError
from stepdistill.schedule import PredictionType

from .base import Family
from .condition_encoders import Labels, NoConditions
from .latents import Pixels


class AnalyticFamily(Family):
    """Args:
    teacher: the closed-form denoiser; its schedule is the family's.
    network: called as ``network(x, time, label)`` with x (B, ...), time (B,), label (B,) or None; gives the shape
        of x.  Student and fake score start as copies of it.
    kind: what the outputs of ``network`` mean.
    sample_shape: of one sample; D-dimensional data is (D, 1, 1).
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
        sample_shape: tuple[int, ...],
        num_labels: int = 0,
        feature_module: str = "",
    ):
        encoder = Labels(num_labels + 1, num_labels) if num_labels else NoConditions()
        super().__init__(network, teacher.schedule, kind, sample_shape, encoder, Pixels(sample_shape))
        self.teacher, self.feature_module = teacher, feature_module

    @classmethod
    def from_pipeline(cls, pipeline: DiffusionPipeline, source: str) -> Family:
        raise UserError(f"teacher {source}: an analytic teacher is a function and lies in no folder")

    def teacher_denoiser(self) -> Denoiser:
        return self.teacher

    def forward(self, network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return network(x, time, condition.get("label"))

    def feature_blocks(self, network: nn.Module) -> list[nn.Module]:
        return [self.mid_block(network)]

    def mid_block(self, network: nn.Module) -> nn.Module:
        if not self.feature_module:
            raise UserError("this analytic family names no feature_module for a discriminator")
        return network.get_submodule(self.feature_module)

    def fresh_network(self, like: nn.Module | None = None) -> nn.Module:
        return copy.deepcopy(self.network if like is None else like)

    def pipeline(self, network: nn.Module, scheduler: Any) -> DiffusionPipeline:
        raise UserError("an analytic family has no stock pipeline to export to")

    @property
    def guidance_off(self) -> dict[str, float]:
        return {}
