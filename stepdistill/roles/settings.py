"""The section ``roles`` of a config: how student and fake score are held, and what they start from."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from stepdistill.config import Section, UserPath

from .lora import MOST_RANK

Weights = Literal["full", "shared", "mixed"]


class LoRASettings(Section):
    """Low-rank adapters (2106.09685): ``W + alpha/rank B A``."""

    rank: int = Field(64, ge=1, le=MOST_RANK)
    alpha: float | None = Field(None, gt=0, description="scale times rank; the rank by default (scale 1)")
    targets: list[str] | None = Field(None, description="module names; the family's list by default")

    @property
    def effective_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)


class RolesSettings(Section):
    """``full``: student and fake score are copies of the teacher.  ``shared``: both are LoRAs on the one frozen
    teacher.  ``mixed``: a full student, and a fake score that is a LoRA on the teacher.

    With ``student_from`` a ``shared`` student is a LoRA on that model, a second frozen base, in float32.
    """

    weights: Weights = "full"
    lora: LoRASettings = LoRASettings()
    student_lora: LoRASettings | None = Field(None, description="of the student alone; lora by default")
    student_from: UserPath | None = Field(None, description="start the student from this folder (an earlier student)")
    fake_score_from: UserPath | None = Field(
        None, description="a run folder: go on with the fake score of its newest checkpoint"
    )
    network: dict[str, Any] | None = Field(
        None,
        description="a student of another size: keys of the teacher's network config that differ, e.g. "
        "block_out_channels, layers_per_block; random weights (train them by tsm first)",
    )
    lora_from: UserPath | None = Field(
        None, description="go on with this LoRA (a file, or a student exported with one)"
    )
    lora_under: UserPath | None = Field(
        None, description="a frozen LoRA that stays on below the student's new one; both are exported as one"
    )

    @model_validator(mode="after")
    def _check_lora_student(self) -> RolesSettings:
        for key in ("student_lora", "lora_from", "lora_under"):
            if getattr(self, key) is not None and self.weights != "shared":
                raise ValueError(f"{key} needs a LoRA student; set weights to shared or remove it")
        if self.network is not None and self.weights == "shared":
            raise ValueError(
                "network: a student of another size is no LoRA on the teacher; set weights to full or mixed"
            )
        if self.lora_from is not None and self.student_lora is not None:
            raise ValueError("student_lora and lora_from: the file of lora_from states the rank; remove one")
        return self
