"""Trajectory-segmented consistency distillation: the stages of Hyper-SD (Ren et al., 2404.13686 section 3.1).

The time grid is cut into ``segments`` (8, 4, 2, 1 in turn, each stage from the last).  For a real sample noised to
point u of the grid, with Psi(x, prediction, v) the DDIM (or flow Euler) move to point v:

    x_(u-1) = Psi(x_u, teacher guided by w, u - 1)
    L = d(Psi(x_u, student, u_end), SG Psi(x_(u-1), target, u_end)),    u_end in [u_b, u - 1]

with u_b the start of u's segment (half-open in index space: ``segments.py``) and target the student's moving
average; where ``u_end = u - 1`` the target is x_(u-1) itself.  Special cases: one segment is consistency distillation
(2303.01469) and, with a Huber distance and a guidance range, latent consistency (2310.04378); ``end: start`` is phased
consistency (2405.18407).

``end``: the paper prints u_end uniform in [u_b, u - 1] (``random``), but its student is not told u_end, so it learns
the average over ends and loses variance: a Gaussian teacher of std 0.973 comes out with 0.681 at one segment.  With
``start`` (u_end = u_b, the default here) it keeps it for any number of segments.

d is a mean squared error (or Huber) times ``mse_weight`` plus an adversarial term times ``adversarial.weight``, which
the paper raises over the stages.  The discriminator is a head on the frozen teacher's mid-block, given the candidate
(renoised within the segment) and x_u, conditioned as the teacher is; the real ones are the targets.

Phased consistency's own discriminator is ``adversarial: {loss: hinge, features: all, conditional: false}``: four heads
on the output of each of the teacher's blocks, a logit for each place of a map, and a hinge.  Its released code ends the
lowest phase at timestep 0, where DDIM without ``set_alpha_to_one`` ends too: ``sampler.final: timestep_0``.  Departures
from that code, which are not offered: it updates discriminator and student in turn, on a batch each (here both on one),
takes candidates to any timestep of the phase, its end included (here to a point of the grid above the end), and has
grids whose edges are not its sampler's times.

Not in the paper, so choices: the number of grid points, the range of guidance scales, the weights, the target's decay,
the offset noise, and that the discriminator's candidates are noised again.  Whether a later stage's teacher is the base
model or the stage before is ambiguous there (``teacher: base`` or ``previous_stage``; with the latter set ``grid`` to
that stage's segments).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stepdistill.config import Section
from stepdistill.denoiser import Condition, guided
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.objectives.adversarial import AdversarialLoss, discriminator_loss, generator_loss
from stepdistill.objectives.consistency import consistency_distance
from stepdistill.roles.discriminator import DiscriminatorHead, MapHeads
from stepdistill.sampler import FewStepSampler, few_step_times
from stepdistill.schedule import per_channel_shape, per_sample
from stepdistill.settings import RunSettings

from .base import DISCRIMINATOR, Batch, DirectMethod, Losses, Needs, Parts, Passes, Term, Update, first_time
from .segments import SegmentGrid, edges

Features = Tensor | list[Tensor]
"""The mid-block's output (B, F, h, w), or those of all blocks."""


class AdversarialSettings(Section):
    """The adversarial part of the distance; off while ``weight`` is 0."""

    weight: float = Field(0.0, ge=0, description="of the student's part; 0 turns it off")
    conditional: bool = Field(True, description="the discriminator sees x_u beside the candidate (PCM: false)")
    loss: AdversarialLoss = Field("softplus", description="or hinge (PCM)")
    features: Literal["mid", "all"] = Field(
        "mid", description="what it reads of the teacher: the mid-block, or the output of every block (PCM)"
    )
    heads: int = Field(4, ge=1, description="on each block's output, with features = all")


class TSCDSettings(Section):
    segments: int = Field(1, ge=1, le=10_000, description="k of this stage")
    grid: int = Field(40, ge=1, le=10_000, description="N, points of the whole grid; a multiple of segments")
    end: Literal["start", "random"] = Field("start", description="where both jump to: the segment's start, or anywhere")
    guidance_scale: float = Field(1.0, ge=0, description="of the teacher; 1 is none; baked into the student")
    guidance_range: tuple[float, float] | None = Field(
        None, description="[low, high] to draw a scale from, in place of guidance_scale (omega + 1)"
    )
    guidance_draw: Literal["batch", "sample"] = Field(
        "batch", description="one draw of the scale for all (Hyper-SD), or one a sample (LCM, PCM)"
    )
    teacher: Literal["base", "previous_stage"] = Field(
        "base", description="whose step is taken: the teacher's, or the student's as this stage starts"
    )
    target_decay: float = Field(0.95, ge=0, lt=1, description="of the target's moving average; 0: the student itself")
    mse_weight: float = Field(1.0, ge=0)
    huber_c: float | None = Field(None, gt=0, description="a Huber distance in place of the squared one (1e-3)")
    adversarial: AdversarialSettings = AdversarialSettings()
    offset_noise: float = Field(0.0, ge=0, description="of a constant added to each channel's noise (0.05)")

    @model_validator(mode="after")
    def _consistent(self):
        if self.grid % self.segments:
            raise ValueError(f"grid = {self.grid} is not a multiple of segments = {self.segments}")
        if self.guidance_range is not None and not 0 <= self.guidance_range[0] <= self.guidance_range[1]:
            raise ValueError(f"guidance_range = {list(self.guidance_range)}: low then high, from 0")
        if self.mse_weight == 0 and self.adversarial.weight == 0:
            raise ValueError("mse_weight and adversarial.weight are both 0; there is nothing to learn from")
        return self

    @property
    def guided(self) -> bool:
        return self.guidance_range is not None or self.guidance_scale != 1


@dataclass(frozen=True)
class Candidates:
    """Features of the student's and the target's jumps, and of x_u where the discriminator sees it; no graph."""

    fake: Features
    real: Features
    start: Features | None


class TSCD(DirectMethod):
    name = "tscd"
    title = "trajectory-segmented consistency: Hyper-SD's stages; consistency, LCM and PCM as cases (2404.13686)"
    Settings = TSCDSettings
    settings: TSCDSettings

    def __init__(self, parts: Parts):
        super().__init__(parts)
        settings, roles = self.settings, parts.roles
        whole = replace(self.sampler, times=self.grid_times(self.config, self.family))
        self.grid = SegmentGrid.of(whole, settings.segments).to(self.family.device)
        self.target, self.solver = roles.student, roles.teacher
        if settings.target_decay:
            self.target = self.frozen["consistency_target"] = roles.frozen_like(roles.student, "consistency_target")
        if settings.teacher == "previous_stage":
            self.solver = self.frozen["previous_stage"] = roles.frozen_like(roles.student, "previous_stage")
        self.candidates: list[Candidates] = []
        if settings.adversarial.weight:
            self.networks["discriminator"] = self._discriminator()

    def _discriminator(self) -> nn.Module:
        if not hasattr(self.roles.teacher, "features"):
            raise UserError("tscd.adversarial.weight > 0: a teacher in closed form has no features for a discriminator")
        settings = self.settings.adversarial
        with torch.random.fork_rng():
            torch.manual_seed(self.config.seed)
            features = self.probe_features(self.features, self.grid.time[-1:])
            features = _joined(features, features if settings.conditional else None)
            if settings.features == "all":
                discriminator = MapHeads([one.shape[1] for one in features], settings.heads)
            else:
                discriminator = DiscriminatorHead(*features.shape[1:])
        return discriminator.to(self.family.device)

    @classmethod
    def needs(cls, config: RunSettings) -> Needs:
        if config.data.images is None:
            raise UserError("method = tscd starts from real images: set data.images (folder, npz or dataset)")
        return Needs(images=True, null_condition=config.tscd.guided)

    @classmethod
    def make_sampler(cls, config: RunSettings, family: Family) -> FewStepSampler:
        """Refuses a sampler that would call the student at times that it is not trained at."""
        sampler, settings = super().make_sampler(config, family), config.tscd
        if settings.segments > 1 and sampler.transition != "ode":
            raise UserError(
                f"sampler.transition = {sampler.transition}: with tscd.segments = {settings.segments} the student "
                "jumps to its segment's start, so it moves along the ODE; set sampler.transition=ode"
            )
        grid = cls.grid_times(config, family)
        starts = [grid[settings.grid - edge] for edge in edges(settings.grid, settings.segments)[1:]]
        for key, steps in [("steps", sampler.steps), *(("also_steps", n) for n in config.sampler.also_steps)]:
            times = sampler.in_steps(steps).times
            if _among(starts, times) and _among(times, grid):
                continue
            raise UserError(
                f"sampler.{key} = {steps}: its times are not points of tscd.grid = {settings.grid} with every edge "
                f"of the {settings.segments} segments among them; take a multiple of the segments that divides the "
                "grid, and a grid that divides the schedule's levels up to the start"
            )
        return sampler

    @classmethod
    def grid_times(cls, config: RunSettings, family: Family) -> tuple[float, ...]:
        """The grid's times, descending: those of the sampler with as many steps."""
        return few_step_times(family.schedule, config.tscd.grid, first_time(config, family), "tscd.grid")

    @classmethod
    def passes(cls, config: RunSettings) -> Passes:
        """The student's three, the teacher's step, the target; the discriminator's features of both."""
        settings = config.tscd
        adversarial = 3 + settings.adversarial.conditional if settings.adversarial.weight else 0
        return Passes(5 + settings.guided + adversarial)

    def features(self, x_t: Tensor, t: Tensor, condition: Condition) -> Features:
        """The teacher's features that the discriminator reads at x_t (B, ...), t (B,)."""
        if self.settings.adversarial.features == "all":
            return self.roles.teacher.feature_maps(x_t, t, condition)
        return self.roles.teacher.features(x_t, t, condition)

    # -- losses --------------------------------------------------------------------------------------------

    def next_batch(self) -> Batch:
        batch = self.next_real_batch()
        if not self.settings.offset_noise:
            return batch
        noise = batch.noise
        constant = self.noise.randn(*per_channel_shape(noise))
        return replace(batch, noise=noise + self.settings.offset_noise * constant)

    def student_losses(self, batch: Batch) -> Losses:
        settings, grid = self.settings, self.grid
        u, end = self.draw_points(len(batch))
        x_u = grid.add_noise(batch.real, batch.noise, u)
        prediction = self.roles.student(x_u, grid.time[u], batch.condition)
        jump = grid.add_noise(prediction.x0, prediction.eps, end)
        target = self.target_jump(x_u, u, end, batch)
        losses: Losses = {}
        if settings.mse_weight:
            losses["consistency"] = (settings.mse_weight, consistency_distance(jump, target, settings.huber_c))
        if settings.adversarial.weight:
            losses["generator"] = (settings.adversarial.weight, self.generator(jump, target, x_u, u, end, batch))
        return losses

    def draw_points(self, count: int) -> tuple[Tensor, Tensor]:
        """Points u, uniform in 1..N, and where both jump to, (count,) each."""
        u = self.noise.randint(1, self.grid.points, count)
        start = self.grid.start(u)
        if self.settings.end == "start":
            return u, start
        return u, start + (self.noise.uniform(count) * (u - start)).long()

    @torch.no_grad()
    def target_jump(self, x_u: Tensor, u: Tensor, end: Tensor, batch: Batch) -> Tensor:
        """The target's jump from where the teacher's one step leads, (B, ...)."""
        grid, below = self.grid, u - 1
        scale = self.draw_scale(len(u))
        null = self.family.null_condition(len(u)) if self.settings.guided else None
        step = guided(self.solver, x_u, grid.time[u], batch.condition, null, scale)
        x_below = grid.add_noise(step.x0, step.eps, below)
        # where the step has arrived already the network's prediction is not used, nor its label at the clean end
        prediction = self.target(x_below, grid.time[below.clamp(min=1)], batch.condition)
        arrived = per_sample(end == below, x_u)
        return torch.where(arrived, x_below, grid.add_noise(prediction.x0, prediction.eps, end))

    def draw_scale(self, count: int) -> float | Tensor:
        """The teacher's guidance scale for ``count`` samples: one, or one each, (count,)."""
        settings = self.settings
        if settings.guidance_range is None:
            return settings.guidance_scale
        low, high = settings.guidance_range
        draw = self.noise.uniform(count) if settings.guidance_draw == "sample" else self.noise.shared_uniform()
        return low + (high - low) * draw

    # -- the adversarial part ------------------------------------------------------------------------------

    def generator(self, jump: Tensor, target: Tensor, x_u: Tensor, u: Tensor, end: Tensor, batch: Batch) -> Tensor:
        """The student's adversarial loss; its candidates stay for the discriminator's update.

        Candidates are taken by fresh noise to a point of u's segment above their end, one draw for both.
        """
        high = self.grid.end(u)
        above = end + 1 + (self.noise.uniform(len(u)) * (high - end)).long()
        fake = self.grid.renoised(jump, end, above, self.noise.randn_like(jump))
        real = self.grid.renoised(target, end, above, self.noise.randn_like(target))
        settings, start = self.settings.adversarial, None
        if settings.conditional:
            with torch.no_grad():
                start = self.features(x_u, self.grid.time[u], batch.condition)
        features = self.features(fake, self.grid.time[above], batch.condition)
        with torch.no_grad():
            real_features = self.features(real, self.grid.time[above], batch.condition)
        self.candidates.append(Candidates(_detached(features), real_features, start))
        discriminator = self.networks["discriminator"]
        frozen = {k: p.detach() for k, p in discriminator.named_parameters()}
        logits = torch.func.functional_call(discriminator, frozen, (_joined(features, start),))
        return generator_loss(self.observe(DISCRIMINATOR, logits), settings.loss)

    def other_updates(self) -> Iterator[Update]:
        """The discriminator on the features of the student's update, then the target's average."""
        if self.candidates:
            yield "discriminator", self.discriminator_terms()
            self.candidates = []
        if self.target is not self.roles.student:
            self._average_target()

    def discriminator_terms(self) -> Iterator[Term]:
        discriminator = self.networks["discriminator"]
        for one in self.candidates:
            logits = [
                self.observe(DISCRIMINATOR, discriminator(_joined(features, one.start)))
                for features in (one.real, one.fake)
            ]
            loss = discriminator_loss(*logits, self.settings.adversarial.loss)
            self.log("loss/discriminator", loss)
            yield Term(loss)

    @torch.no_grad()
    def _average_target(self) -> None:
        target, student = self.target.portable_state_dict(), self.roles.student.portable_state_dict()
        keys = [key for key, value in target.items() if value.is_floating_point()]
        weight = 1 - self.settings.target_decay
        torch._foreach_lerp_([target[k] for k in keys], [student[k] for k in keys], weight)


def _among(times: Sequence[float], others: Sequence[float]) -> bool:
    """Whether each of ``times`` is one of ``others``, to rounding."""
    return all(any(math.isclose(time, other, rel_tol=1e-9) for other in others) for time in times)


def _joined(features: Features, others: Features | None) -> Features:
    """Along the channels, map by map."""
    if others is None:
        return features
    if isinstance(features, Tensor):
        return torch.cat([features, others], 1)
    return [torch.cat(pair, 1) for pair in zip(features, others, strict=True)]


def _detached(features: Features) -> Features:
    return features.detach() if isinstance(features, Tensor) else [one.detach() for one in features]
