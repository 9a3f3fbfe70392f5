"""Settings of PSO, for its three kinds of pairs."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from stepdistill.config import Section, UserPath
from stepdistill.data.preference_pairs import PreferenceSettings
from stepdistill.judges.rewards import RewardSettings
from stepdistill.objectives.preference import OverSteps, Reduction
from stepdistill.sampler import Transition


class PSOSettings(Section):
    mode: Literal["online", "pairs", "targets"] = "online"
    loss: Literal["margin", "diffusion"] = Field("margin", description="diffusion: the plain loss on the targets")
    beta: float = Field(50.0, ge=0, description="of the log ratio; beta / (C H W) a nat with reduction = mean")
    reduction: Reduction = Field("mean", description="of log densities and errors over a sample's dimensions")
    over_steps: OverSteps = Field("step", description="a sigmoid for each step, or one of the sum over steps")
    clamp: float | None = Field(0.1, gt=0, lt=1, description="online: ratios stay in 1 -/+ this; null is no clamp")
    rewards: list[RewardSettings] = Field([], description="online: their weighted sum judges; else they are watched")
    rollout_steps: int | None = Field(
        None, ge=1, le=1000, description="steps of the rollouts; the sampler's by default"
    )
    rollout_transition: Transition | None = Field(None, description="of the rollouts; the sampler's by default")
    shared_start: bool = Field(False, description="both rollouts of a pair from the same first noise")
    pairs: PreferenceSettings | None = None
    best: float | None = Field(
        None, gt=0, lt=1, description="targets: the share of data.images (of each label) with the highest rewards"
    )
    reference_samples: Literal["untuned", "tuned"] = Field("untuned", description="whose samples targets are against")
    likelihood: Literal["denoising", "transition"] = Field("denoising", description="of the samples, with targets")
    error: Literal["native", "eps", "v", "x0", "flow"] = Field("native", description="what denoising errors are of")
    decoder: UserPath | None = Field(None, description="an AutoencoderTiny for the rewards; the model's own by default")
    probe: int = Field(
        40, ge=1, le=65_536, description="samples whose reward and distance are logged every train.sample_every"
    )

    @model_validator(mode="after")
    def _of_the_mode(self):
        if self.loss == "diffusion" and self.mode != "targets":
            raise ValueError(f"loss = diffusion needs mode = targets, not {self.mode}")
        if (self.pairs is None) != (self.mode != "pairs"):
            raise ValueError("pairs goes with mode = pairs; set both or neither")
        if self.best is not None and (self.mode != "targets" or not self.rewards):
            raise ValueError("best needs mode = targets and rewards")
        if self.likelihood == "transition" and self.mode != "targets":
            raise ValueError("likelihood = transition is for mode = targets; online has it anyway")
        if any(reward.hinge is not None for reward in self.rewards):
            raise ValueError("rewards: a hinge has no meaning for a comparison; remove it")
        return self

    @property
    def rolls_out(self) -> bool:
        """Whether moves of a rollout are scored."""
        return self.mode == "online" or self.likelihood == "transition"
