"""The two-time-scale loop that all score-distillation methods share (DMD2, 2405.14867 section 4.2).

Every iteration updates the fake score, and one in ``fake_score_updates`` (k) updates the student too.  ``first`` is the
order of the two:

- ``student`` (DMD2, SwiftBrush): the student's turn is the first iteration of each k, and its update comes before the
  fake score's.  Both use the same samples: the fake score trains on those that were made before the student's update.
- ``fake_score`` (SiD): the student's turn is the last iteration of each k, after the fake score's update.  The fake
  score trains on samples of a batch of its own, from the student as it is; the student then makes new ones, of the next
  conditions and fresh noise, and is compared with the fake score just updated.  That is one sample more for each
  student update.

A method gives :meth:`ScoreMethod.student_losses` from the predictions of teacher and fake score at a noised sample
(:meth:`ScoreMethod.predict_both`), and may change how a sample is made, how either is guided and at which times.
"""

from __future__ import annotations

import abc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stepdistill.config import Section
from stepdistill.denoiser import Condition, Prediction, guided
from stepdistill.objectives.denoising import denoising_loss
from stepdistill.sampler import FewStepSampler
from stepdistill.settings import RunSettings

from .base import Batch, Losses, Method, Needs, Parts, Passes, Term, Update
from .teachers import AskedTeacher

Scale = float | Tensor
"""A guidance scale: one number, or one a sample, (B,)."""
Samples = list[tuple[Batch, Tensor]]
"""The micro-batches of one update, each with the student's detached samples x0 (B, C, H, W)."""


class ScoreSettings(Section):
    """What every score method can be told; each has the defaults of its paper."""

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
    def needs_null(self) -> bool:
        """Whether these settings need the teacher to have a null condition."""
        return self.guidance_scale != 1 or self.null_probability > 0


@dataclass(frozen=True)
class ScorePair:
    """The predictions of teacher (guided) and fake score at the same x_t (B, ...) and t (B,)."""

    t: Tensor
    teacher: Prediction
    fake_score: Prediction


class ScoreMethod(Method):
    """Fake score and student on two time scales.

    Args:
        teacher: in place of the run's teacher.
    """

    Settings = ScoreSettings
    settings: ScoreSettings
    has_fake_score = True

    def __init__(self, parts: Parts, teacher: AskedTeacher | None = None):
        super().__init__(parts)
        self.teacher = teacher or AskedTeacher()

    @classmethod
    def needs(cls, config: RunSettings) -> Needs:
        return Needs(null_condition=cls.settings_of(config).needs_null)

    @classmethod
    def passes(cls, config: RunSettings) -> Passes:
        """k samples of one pass and a rollout (one more where the fake score is first), k losses of three, and 4 for
        the student's: its backward, teacher and fake score; guidance."""
        settings = cls.settings_of(config)
        sample = 1 + (config.sampler.steps - 1) / 2
        losses = 3 * settings.fake_score_updates + 4
        guidance = float(settings.guidance_scale != 1)
        return Passes(settings.samples_per_update * sample + losses + guidance, iterations=settings.fake_score_updates)

    def groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """Student and fake score; other networks train with the fake score."""
        others = {f"{n}.{k}": p for n, module in self.networks.items() for k, p in module.named_parameters()}
        return {
            "student": self.roles.student.parameters(),
            "fake_score": self.roles.fake_score.parameters() | others,
        }

    # -- the updates of one iteration ----------------------------------------------------------------------

    def updates(self) -> Iterator[Update]:
        yield from self.updates_of(self.counters["iteration"])

    def updates_of(self, iteration: int) -> Iterator[Update]:
        """Those of iteration 0, 1, ...: the student's turn is the first of each ``fake_score_updates``, or the last."""
        place = iteration % self.settings.fake_score_updates
        samples: Samples = []
        if self.settings.first == "student":
            if place == 0:
                yield "student", self.student_terms(samples)
            else:
                samples = self.make_samples()
            yield "fake_score", self.fake_score_terms(samples)
            return
        yield "fake_score", self.fake_score_terms(self.make_samples())
        if place == self.settings.fake_score_updates - 1:
            yield "student", self.student_terms(samples)

    def student_terms(self, samples: Samples) -> Iterator[Term]:
        """A term for each micro-batch; ``samples`` gets what they were computed on, made before the update."""
        for _ in range(self.config.train.gradient_accumulation):
            batch = self.next_batch()
            x0 = self.make_sample(batch)
            yield Term(x0, self.sample_gradient(x0.detach(), batch))
            samples.append((batch, x0.detach()))
        yield from self.more_student_terms(samples)

    def more_student_terms(self, samples: Samples) -> Iterator[Term]:
        """What else adds to the student's gradient, a term for each of the samples of this update."""
        return iter(())

    def fake_score_terms(self, samples: Samples) -> Iterator[Term]:
        """A term for each micro-batch: the losses of the fake score, and of what trains with it."""
        for batch, x0 in samples:
            yield Term(self.total("fake_score", self.fake_score_losses(x0, batch)))

    @torch.no_grad()
    def make_samples(self) -> Samples:
        """Samples for one update, without a graph."""
        batches = (self.next_batch() for _ in range(self.config.train.gradient_accumulation))
        return [(batch, self.make_sample(batch)) for batch in batches]

    def sample_gradient(self, x0: Tensor, batch: Batch) -> Tensor:
        """The gradient of the student's losses in the sample, (B, C, H, W).

        The graph is cut at x0, so what the losses pass through (teacher, fake score, discriminator) is freed before the
        student's own backward, and none of their parameters can gather a gradient: only x0's is computed.
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

    # -- losses --------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def student_losses(self, x0: Tensor, batch: Batch) -> Losses:
        """The student's losses as functions of the sample ``x0`` (B, C, H, W), a leaf that wants a gradient."""

    def fake_score_losses(self, x0: Tensor, batch: Batch) -> Losses:
        """Losses of the fake score, and of what trains with it, on detached samples (B, C, H, W)."""
        return {"denoising": (1.0, self.denoising(x0, batch.condition))}

    # -- samples -------------------------------------------------------------------------------------------

    def next_batch(self) -> Batch:
        return self.prepare(self.next_conditions())

    def prepare(self, batch: Batch) -> Batch:
        """A batch of conditions and noise with what else a sample is made from."""
        return batch

    def make_sample(self, batch: Batch) -> Tensor:
        """x0 (B, C, H, W) from the student, with a graph to it where gradients are on."""
        x_t, t = self.student_input(batch)
        return self.roles.student(x_t, t, batch.student_condition).x0

    @torch.no_grad()
    def student_input(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """What the student is trained on, (B, C, H, W) and (B,): pure noise, or the input of a random step of its own
        rollout.

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

    # -- predictions of teacher and fake score -------------------------------------------------------------

    def teacher_scale(self, count: int) -> Scale:
        """The teacher's guidance scale for ``count`` samples."""
        scale = self.teacher.guidance_scale
        return self.settings.guidance_scale if scale is None else scale

    def fake_score_scale(self, teacher_scale: Scale) -> Scale:
        """The fake score's, from the teacher's: none, unless a method shares it."""
        return 1.0

    def null_condition(self, count: int) -> Condition | None:
        """The null condition of ``count`` samples, where it is ever used."""
        needed = self.settings.needs_null or self.teacher.guidance_scale is not None
        return self.family.null_condition(count) if needed else None

    def predict_both(self, x0: Tensor, condition: Condition, teacher_null: Condition | None = None) -> ScorePair:
        """Teacher and fake score at one draw of level and noise of ``x0`` (B, ...), the same for both.

        ``teacher_null``: what the teacher's guidance leads away from, in place of the null condition.
        """
        settings = self.settings
        t = self.draw_time(settings.min_level, settings.max_level, len(x0))
        x_t = self.roles.student.schedule.add_noise(x0, self.noise.randn_like(x0), t)
        scale = self.teacher_scale(len(x0))
        null = self.null_condition(len(x0))
        away = null if teacher_null is None else teacher_null
        teacher = guided(self.teacher.denoiser or self.roles.teacher, x_t, t, condition, away, scale)
        fake_score = guided(self.roles.fake_score, x_t, t, condition, null, self.fake_score_scale(scale))
        self.log("mismatch", (fake_score.x0 - teacher.x0).detach().abs().mean())
        return ScorePair(t, teacher, fake_score)

    # -- the fake score ------------------------------------------------------------------------------------

    def fake_score_draw(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """The time (B,) and noise (B, ...) of one denoising loss on ``x0``."""
        low, high = self.settings.fake_score_min_level, self.settings.fake_score_max_level
        return self.draw_time(low, high, len(x0)), self.noise.randn_like(x0)

    def denoising(self, x0: Tensor, condition: Condition, null_probability: float | None = None) -> Tensor:
        """Denoising score matching of the fake score on samples x0 (B, ...), a scalar; on the null condition with
        ``null_probability``, by default the settings'."""
        t, eps = self.fake_score_draw(x0)
        probability = self.settings.null_probability if null_probability is None else null_probability
        if probability and self.noise.shared_uniform() < probability:
            condition = self.family.null_condition(len(x0))
        return self.denoising_at(x0, condition, t, eps)

    def denoising_at(self, x0: Tensor, condition: Condition, t: Tensor, eps: Tensor) -> Tensor:
        """The same at times t (B,) and noise eps (B, ...)."""
        x_t = self.roles.student.schedule.add_noise(x0, eps, t)
        prediction = self.roles.fake_score(x_t, t, condition)
        target = self.settings.fake_score_target
        kind = prediction.kind if target == "native" else target
        return denoising_loss(prediction, x0, eps, kind, self.fake_score_weight(t))

    def fake_score_weight(self, t: Tensor) -> Tensor | None:
        """The loss's weight at t (B,), (B,); None is 1."""
        return None
