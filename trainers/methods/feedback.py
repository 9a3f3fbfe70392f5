"""Human feedback learning on a student: Hyper-SD's second part (2404.13686 section 3.2), after ReFL (2304.05977).

A rollout without gradient brings the student to a random one of its last steps; that step is taken with gradient, its
x0 is decoded and scored:

    L = sum_d weight_d E[ReLU(a_d - r_d(x0', c))] (+ perceptual.weight L_instance(m_I(x0'), truth of a real picture))

Frozen rewards r_d with their hinges a_d: what is good enough has no gradient.  The student is its own new LoRA on top
of what was distilled before (``roles.lora_under`` or ``roles.student_from``), and the two are merged by
``merge_ratio``: in the sample grids, in the export, in what is measured.  The perceptual part starts from a real
picture noised to one of the student's times and goes from there.

The paper gives neither hinges nor weights; UniFL sets a hinge at the mean reward of preferred samples.  Departures from
ReFL's released code, which passes its step's index where the network wants the timestep: the times are the sampler's
own; pictures are not clamped before they are scored, so gradients do not vanish outside [-1, 1].
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from pydantic import Field
from torch import Tensor

from stepdistill.config import Section, UserPath
from stepdistill.errors import UserError
from stepdistill.judges.perception import perceptual_loss
from stepdistill.judges.rewards import Reward, RewardSettings
from stepdistill.objectives.feedback import hinge_loss
from stepdistill.settings import RunSettings

from .base import REWARD, Batch, DirectMethod, Losses, Method, Needs, Passes


class PerceptualSettings(Section):
    """The instance-segmentation loss, or any other against a real picture (``stepdistill.judges.perception``)."""

    model: str = Field(description="module:attribute of a PerceptualModel, or of what gives one")
    weight: float = Field(1.0, gt=0)
    noised_steps: int = Field(1, ge=1, le=64, description="real pictures are noised to one of so many last steps")


class FeedbackSettings(Section):
    rewards: list[RewardSettings] = Field([], description="each with its hinge and weight")
    perceptual: PerceptualSettings | None = None
    rollout_steps: list[int] = Field(
        [], description="numbers of steps, one drawn for each batch; the sampler's and its also_steps by default"
    )
    last: int = Field(1, ge=1, le=64, description="the graded step is drawn from so many last ones")
    decoder: UserPath | None = Field(
        None, description="an AutoencoderTiny for the teacher's latents; its own by default"
    )
    merge_ratio: float = Field(1.0, ge=0, description="what this LoRA counts for when it joins the one below")


def reward_losses(method: Method, rewards: list[Reward], pixels: Tensor, items: list) -> Losses:
    """Each reward's hinge loss on pictures (B, C, H, W) and what they are of; the mean rewards are logged."""
    losses: Losses = {}
    for reward in rewards:
        score = method.observe(f"{REWARD}{reward.name}", reward(pixels, items))
        if pixels.requires_grad and not score.requires_grad:
            raise UserError(f"reward {reward.name}: has no gradient to the pictures; nothing would be learned by it")
        method.log(f"reward/{reward.name}", score.mean())
        losses[f"reward_{reward.name}"] = (reward.weight, hinge_loss(score, reward.hinge))
    return losses


class Feedback(DirectMethod):
    name = "feedback"
    title = "human feedback: rewards with hinges on the student's pictures, a LoRA of its own (2404.13686)"
    Settings = FeedbackSettings
    settings: FeedbackSettings
    defaults = {"roles": {"weights": "shared"}}

    @classmethod
    def needs(cls, config: RunSettings) -> Needs:
        settings = config.feedback
        if not settings.rewards and settings.perceptual is None:
            raise UserError("method = feedback: set feedback.rewards, or feedback.perceptual, or both")
        if config.roles.weights != "shared":
            raise UserError("method = feedback trains a LoRA on top of the student; set roles.weights=shared")
        if config.roles.lora_under is None and config.roles.student_from is None:
            raise UserError(
                "method = feedback needs a student to start from: set roles.lora_under (one exported with a LoRA) or "
                "roles.student_from"
            )
        if settings.perceptual is not None and config.data.images is None:
            raise UserError("feedback.perceptual needs real images: set data.images")
        steps = config.sampler.steps
        for count in settings.rollout_steps:
            if count < 1 or steps % count:
                raise UserError(f"feedback.rollout_steps: {count} is not a divisor of sampler.steps = {steps}")
        perceptual = settings.perceptual
        return Needs(
            images=perceptual is not None,
            rewards=tuple(settings.rewards),
            perceptual=None if perceptual is None else perceptual.model,
            pixels=True,
            decoder=settings.decoder,
        )

    @classmethod
    def counts(cls, config: RunSettings) -> list[int]:
        """The numbers of steps that are rolled out."""
        return config.feedback.rollout_steps or [*config.sampler.also_steps, config.sampler.steps]

    @classmethod
    def passes(cls, config: RunSettings) -> Passes:
        """The graded step's three and those before it; the rewards are not the denoising network's."""
        settings, counts = config.feedback, cls.counts(config)
        before = sum(n - 1 - (min(settings.last, n) - 1) / 2 for n in counts) / len(counts)
        perceptual = 0.0
        if settings.perceptual is not None:
            perceptual = 3 + (min(settings.perceptual.noised_steps, config.sampler.steps) - 1) / 2
        return Passes((before + 3 if settings.rewards else 0.0) + perceptual)

    # -- losses --------------------------------------------------------------------------------------------

    def student_losses(self, batch: Batch) -> Losses:
        parts, losses = self.parts, {}
        if parts.rewards:
            losses |= reward_losses(self, parts.rewards, parts.decode(self.graded(batch)), batch.items)
        if parts.perceptual is not None:
            real = self.next_real_batch()
            pixels = parts.decode(self.regraded(real))
            model, truth = self.settings.perceptual.model, parts.decode(real.real)
            value = perceptual_loss(parts.perceptual, model, pixels, truth, list(real.indices))
            self.observe(f"{REWARD}perceptual", value.reshape(-1))
            losses["perceptual"] = (self.settings.perceptual.weight, value.mean())
        return losses

    def graded(self, batch: Batch) -> Tensor:
        """x0 (B, ...) of one of the last steps of a rollout from pure noise, a graph to that step alone."""
        counts = self.counts(self.config)
        sampler = self.sampler.in_steps(counts[self.noise.shared_randint(0, len(counts) - 1)])
        exit_index = self.noise.shared_randint(max(0, sampler.steps - self.settings.last), sampler.steps - 1)
        with torch.no_grad():
            x_t, t = sampler.rollout(
                self.roles.student, batch.noise, batch.condition, exit_index, self.noise.randn_like
            )
        return self.roles.student(x_t, t, batch.condition).x0

    def regraded(self, batch: Batch) -> Tensor:
        """x0 (B, ...) of the last step from a real sample noised to one of the last times."""
        sampler = self.sampler
        first = self.noise.shared_randint(
            max(0, sampler.steps - self.settings.perceptual.noised_steps), sampler.steps - 1
        )
        t = sampler.time(first, batch.noise)
        x_t = self.roles.student.schedule.add_noise(batch.real, batch.noise, t)
        with torch.no_grad():
            for index in range(first, sampler.steps - 1):
                x0 = self.roles.student(x_t, sampler.time(index, x_t), batch.condition).x0
                x_t = sampler.move(x0, x_t, index, self.noise.randn_like)
        return self.roles.student(x_t, sampler.time(sampler.steps - 1, x_t), batch.condition).x0

    @contextlib.contextmanager
    def exported(self) -> Iterator[None]:
        """The student merged by ``merge_ratio``."""
        student = self.roles.student
        with student.switch.scaled(student.adapter, self.settings.merge_ratio):
            yield
