"""The two-time-scale loop that all score-distillation methods share (DMD2, 2405.14867 section 4.2).

Every iteration updates the fake score, and one in ``fake_score_updates`` (k) updates the student too.  ``first`` is the
order of the two:

- ``student`` (DMD2, SwiftBrush): the student's turn is the first iteration of each k, and its update comes before the
  fake score's.  Both use the same samples: the fake score trains on those that were made before the student's update.
- ``fake_score`` (SiD): the student's turn is the last iteration of each k, after the fake score's update.  The fake
  score trains on samples of a batch of its own, from the student as it is; the student then makes new ones, of the next
  conditions and fresh noise, and is compared with the fake score just updated.  That is one sample more for each
  student update.

A method says :meth:`ScoreTrainer.student_losses`, of what teacher and fake score say about a noised sample
(:meth:`ScoreTrainer.compare`), and may change how a sample is made, how either is guided and at which times, and which
teacher is asked.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stepdistill.config import Section
from stepdistill.denoiser import Condition, Prediction, guided
from stepdistill.families.base import Family
from stepdistill.objectives.denoising import denoising_loss
from stepdistill.sampler import FewStepSampler
from stepdistill.settings import RunSettings
from stepdistill.trainers.loop.trainer import Batch, Losses, Trainer

Scale = float | Tensor
"""A guidance scale: one number, or one a sample, (B,)."""
Samples = list[tuple[Batch, Tensor]]
"""The micro-batches of one update, each with the student's detached samples x0 (B, C, H, W)."""


class ScoreSettings(Section):
    """What every score method can be told; each gives the defaults of its own paper."""

    guidance_scale: float = Field(1.0, ge=1, description="of the teacher; 1 is none; baked into the student")
    fake_score_updates: int = Field(1, ge=1, le=10_000, description="for each student update")
    first: Literal["student", "fake_score"] = Field(
        "student", description="which is updated first: student (DMD2), or fake_score on samples of its own (SiD)"
    )
    min_level: int = Field(
        20, ge=0, le=999, description="lowest level, in thousandths of the schedule, where student and teacher compare"
    )
    max_level: int = Field(980, ge=0, le=999, description="highest level, included, in thousandths")
    fake_score_min_level: int = Field(
        0, ge=0, le=999, description="the fake score is trained at levels from this, in thousandths"
    )
    fake_score_max_level: int = Field(999, ge=0, le=999, description="to this, included")
    fake_score_target: Literal["native", "eps", "v", "x0", "flow"] = Field(
        "native", description="what its squared error is taken of; native: the network's own prediction (DMD2: eps)"
    )
    null_probability: float = Field(
        0.0, ge=0, lt=1, description="of training the fake score on the null condition, one draw a micro-batch"
    )

    @model_validator(mode="after")
    def _levels(self):
        if self.min_level > self.max_level:
            raise ValueError(f"min_level = {self.min_level} is above max_level = {self.max_level}")
        if self.fake_score_min_level > self.fake_score_max_level:
            raise ValueError(
                f"fake_score_min_level = {self.fake_score_min_level} is above fake_score_max_level = "
                f"{self.fake_score_max_level}"
            )
        return self

    @property
    def samples_per_update(self) -> int:
        """Samples that the student makes for each of its updates, of one batch each."""
        return self.fake_score_updates + (self.first == "fake_score")

    @property
    def asks_null(self) -> bool:
        """Whether these settings need the teacher to have a null condition."""
        return self.guidance_scale != 1 or self.null_probability > 0


@dataclass(frozen=True)
class Comparison:
    """What teacher (guided) and fake score say of the same x_t (B, ...) at t (B,)."""

    t: Tensor
    teacher: Prediction
    fake_score: Prediction


class ScoreTrainer(Trainer):
    """Fake score and student on two time scales."""

    Settings = ScoreSettings
    settings: ScoreSettings
    has_fake_score = True

    def trainable(self) -> dict[str, dict[str, nn.Parameter]]:
        """Student and fake score; networks of the method's own train with the fake score."""
        extra = {f"{n}.{k}": p for n, module in self.extra.items() for k, p in module.named_parameters()}
        return {
            "student": self.roles.student.parameters(),
            "fake_score": self.roles.fake_score.parameters() | extra,
        }

    @abc.abstractmethod
    def student_losses(self, x0: Tensor, batch: Batch) -> Losses:
        """The student's losses as functions of the sample ``x0`` (B, C, H, W), a leaf that wants a gradient."""

    def fake_score_losses(self, x0: Tensor, batch: Batch) -> Losses:
        """Losses of the fake score, and of what trains with it, on detached samples (B, C, H, W)."""
        return {"denoising": (1.0, self.denoising(x0, batch.condition))}

    @classmethod
    def check_family(cls, settings: ScoreSettings, family: Family) -> None:
        if settings.asks_null:
            family.null_condition(1)

    @classmethod
    def passes_per_update(cls, config: RunSettings, settings: ScoreSettings) -> float:
        """k samples of one pass and a rollout (one more where the fake score is first), k losses of three, and 4 for
        the student's: its backward, teacher and fake score; guidance."""
        sample = 1 + (config.sampler.steps - 1) / 2
        losses = 3 * settings.fake_score_updates + 4
        return settings.samples_per_update * sample + losses + float(settings.guidance_scale != 1)

    @property
    def fake_score_updates(self) -> int:
        return self.settings.fake_score_updates

    @property
    def iterations_per_update(self) -> int:
        return self.fake_score_updates

    # -- the loop ------------------------------------------------------------------------------------------

    @property
    def loop_iterations(self) -> int:
        """Iterations of this loop so far."""
        return self.counters["iteration"]

    def student_turn(self) -> bool:
        """Whether this iteration updates the student too: the first of each ``fake_score_updates``, or the last."""
        place = 0 if self.settings.first == "student" else self.fake_score_updates - 1
        return self.loop_iterations % self.fake_score_updates == place

    def iteration(self) -> None:
        student_turn = self.student_turn()
        if self.settings.first == "student":
            self.update_fake_score(self.update_student() if student_turn else self.make_samples())
            return
        self.update_fake_score(self.make_samples())
        if student_turn:
            self.update_student()

    @torch.no_grad()
    def make_samples(self) -> Samples:
        """Samples for one update, without a graph."""
        samples: Samples = []
        for _ in range(self.config.train.gradient_accumulation):
            batch = self.next_batch()
            samples.append((batch, self.make_sample(batch)))
        return samples

    def update_student(self) -> Samples:
        """One update of the student; the samples that it was computed on, made before it."""
        accumulation = self.config.train.gradient_accumulation
        samples: Samples = []
        for _ in range(accumulation):
            batch = self.next_batch()
            x0 = self.make_sample(batch)
            gradient = self.sample_gradient(x0.detach(), batch)
            x0.backward(gradient / accumulation)
            samples.append((batch, x0.detach()))
        self.before_student_update(samples)
        self.update("student")
        return samples

    def update_fake_score(self, samples: Samples) -> None:
        """One update of the fake score, and of what trains with it."""
        for batch, x0 in samples:
            losses = self.fake_score_losses(x0, batch)
            (self.total("fake_score", losses) / len(samples)).backward()
        self.update("fake_score")

    def before_student_update(self, samples: Samples) -> None:
        """What else adds to the student's gradient, given the batches of this update and their detached samples."""

    def sample_gradient(self, x0: Tensor, batch: Batch) -> Tensor:
        """The gradient of the student's losses in the sample, (B, C, H, W).

        The graph is cut at x0, so what the losses pass through (teacher, fake score, discriminator) is freed before the
        student's own backward, and none of their parameters can gather a gradient: only x0's is asked for.
        """
        leaf = x0.requires_grad_()
        total = torch.zeros_like(x0)
        losses = self.student_losses(leaf, batch)
        for name, (weight, loss) in losses.items():
            (part,) = torch.autograd.grad(weight * loss, leaf)
            self.log(f"sample_grad/{name}", part.norm())
            total += part
        self.total("student", losses)
        return total

    # -- samples -------------------------------------------------------------------------------------------

    def make_sample(self, batch: Batch) -> Tensor:
        """x0 (B, C, H, W) from the student, with a graph to it where gradients are on."""
        x_t, t = self.student_input(batch)
        return self.roles.student(x_t, t, batch.student_condition).x0

    @torch.no_grad()
    def student_input(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the student is trained on: pure noise, or the input of a random step of its own rollout.

        Backward simulation (2405.14867 section 4.5): the exit step is shared by all; the rollout starts from new noise,
        and the batch's own noise is the last that is added.
        """
        return self.simulated_input(self.sampler, batch)

    @torch.no_grad()
    def simulated_input(self, sampler: FewStepSampler, batch: Batch) -> tuple[Tensor, Tensor]:
        """:meth:`student_input` for any sampler of the student's."""
        student = self.roles.student
        exit_index = self.noise.shared_randint(0, sampler.steps - 1)
        if exit_index == 0 or sampler.transition == "ode":
            return sampler.rollout(student, batch.noise, batch.student_condition, exit_index, self.noise.randn_like)
        moves_left = iter(range(exit_index - 1, -1, -1))

        def draw(like: Tensor) -> Tensor:
            return batch.noise if next(moves_left) == 0 else self.noise.randn_like(like)

        fresh = self.noise.randn_like(batch.noise)
        return sampler.rollout(student, fresh, batch.student_condition, exit_index, draw)

    # -- what teacher and fake score say -------------------------------------------------------------------

    def teacher_scale(self, count: int) -> Scale:
        """The teacher's guidance scale for ``count`` samples."""
        return self.settings.guidance_scale

    def fake_score_scale(self, teacher_scale: Scale) -> Scale:
        """The fake score's, given the teacher's: none, unless a method shares it."""
        return 1.0

    @property
    def asks_null(self) -> bool:
        """Whether the null condition is ever asked for."""
        return self.settings.asks_null

    def compare(self, x0: Tensor, condition: Condition, teacher_null: Condition | None = None) -> Comparison:
        """Teacher and fake score at one draw of level and noise of ``x0`` (B, ...), the same for both.

        ``teacher_null``: what the teacher's guidance leads away from, in place of the null condition.
        """
        own = self.settings
        t = self.draw_time(own.min_level, own.max_level, len(x0))
        x_t = self.roles.student.schedule.add_noise(x0, self.noise.randn_like(x0), t)
        scale = self.teacher_scale(len(x0))
        null = self.family.null_condition(len(x0)) if self.asks_null else None
        teacher = guided(self.roles.teacher, x_t, t, condition, null if teacher_null is None else teacher_null, scale)
        fake_score = guided(self.roles.fake_score, x_t, t, condition, null, self.fake_score_scale(scale))
        self.log("mismatch", (fake_score.x0 - teacher.x0).detach().abs().mean())
        return Comparison(t, teacher, fake_score)

    # -- the fake score ------------------------------------------------------------------------------------

    def fake_score_draw(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """The time (B,) and noise (B, ...) of one denoising loss on ``x0``."""
        low, high = self.settings.fake_score_min_level, self.settings.fake_score_max_level
        return self.draw_time(low, high, len(x0)), self.noise.randn_like(x0)

    def denoising(self, x0: Tensor, condition: Condition) -> Tensor:
        """Denoising score matching of the fake score on samples x0 (B, ...), a scalar."""
        t, eps = self.fake_score_draw(x0)
        if self.null_probability and self.noise.shared_uniform() < self.null_probability:
            condition = self.family.null_condition(len(x0))
        return self.denoising_at(x0, condition, t, eps)

    @property
    def null_probability(self) -> float:
        return self.settings.null_probability

    def denoising_at(self, x0: Tensor, condition: Condition, t: Tensor, eps: Tensor) -> Tensor:
        """The same at a given time and noise."""
        x_t = self.roles.student.schedule.add_noise(x0, eps, t)
        prediction = self.roles.fake_score(x_t, t, condition)
        target = self.settings.fake_score_target
        return denoising_loss(
            prediction, x0, eps, prediction.kind if target == "native" else target, self.fake_score_weight(t)
        )

    def fake_score_weight(self, t: Tensor) -> Tensor | None:
        """The loss's weight at t (B,), (B,); None is 1."""
        return None
