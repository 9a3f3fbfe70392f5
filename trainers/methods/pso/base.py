"""What the three modes of PSO share: the tuned model's sampler, likelihoods of moves and of samples, the judge."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepdistill.data.latents import check_posterior
from stepdistill.data.preference_pairs import read_preferences
from stepdistill.denoiser import Condition, cat_conditions
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.families.schedulers import lcm_times, transition_of
from stepdistill.judges.rewards import Sharpness
from stepdistill.noise import Noise
from stepdistill.objectives.preference import denoising_log_ratio, gaussian_log_ratio, preference_loss, reduce_dims
from stepdistill.roles.role import Role
from stepdistill.run_record import RunRecord
from stepdistill.sampler import Draw, FewStepSampler, Transition, few_step_times
from stepdistill.settings import RunSettings
from stepdistill.trainers.methods.base import (
    REWARD,
    Batch,
    DirectMethod,
    Losses,
    Needs,
    Parts,
    Passes,
    Phase,
    Update,
    first_time,
)

from .settings import PSOSettings


@dataclass(frozen=True)
class Move:
    """One stochastic move of a rollout: from x_t (B, ...) at step ``index`` to ``following``."""

    index: int
    x_t: Tensor
    following: Tensor


class PSOMethod(DirectMethod):
    name = "pso"
    title = "pairwise sample optimisation: tunes a distilled model by rewards, pairs or target images (2410.03190)"
    Settings = PSOSettings
    settings: PSOSettings
    defaults = {"roles": {"weights": "shared"}}

    def __init__(self, parts: Parts):
        super().__init__(parts)
        steps, transition = self.rollout_of(self.config)
        self.rollout = self.sampler
        if self.settings.rolls_out:
            times = self.times_of(self.config, self.family, steps)
            self.rollout = FewStepSampler(self.family.schedule, times, transition, self.sampler.eta)

    # -- from a config -------------------------------------------------------------------------------------

    @classmethod
    def needs(cls, config: RunSettings) -> Needs:
        settings = config.pso
        if settings.mode == "online" and not settings.rewards:
            raise UserError("pso.mode = online needs a judge: set pso.rewards, or mode to pairs or targets")
        if settings.mode == "targets" and config.data.images is None:
            raise UserError("pso.mode = targets needs images: set data.images (folder, npz or dataset)")
        for key in ("student_from", "lora_under", "network"):
            if getattr(config.roles, key) is not None:
                raise UserError(f"roles.{key}: pso tunes the model of teacher.path against itself; remove it")
        if config.data.part is not None and settings.pairs is not None:
            raise UserError("msd: pso's pairs are not divided among students; use mode = online or targets")
        cls._check_rollouts(config)
        return Needs(
            images=settings.mode == "targets",
            rewards=tuple(settings.rewards),
            pixels=True,
            decoder=settings.decoder,
            preferences=settings.pairs,
        )

    @classmethod
    def _check_rollouts(cls, config: RunSettings) -> None:
        settings = config.pso
        if not settings.rolls_out:
            return
        steps, transition = cls.rollout_of(config)
        what = "pso.mode = online" if settings.mode == "online" else "pso.likelihood = transition"
        otherwise = "or use mode = pairs or targets, whose denoising errors need none"
        if steps == 1:
            raise UserError(
                f"{what}: a rollout of one step has no stochastic move (its only one, to x0, is deterministic), so it "
                f"has no likelihood to raise; set pso.rollout_steps above 1, {otherwise}"
            )
        if transition == "ode" or (transition == "tcd" and config.sampler.eta == 0):
            raise UserError(
                f"{what}: a deterministic sampler (transition = {transition}) has no density; set "
                f"pso.rollout_transition=renoise, {otherwise}"
            )

    @classmethod
    def check(cls, config: RunSettings, family: Family) -> list[str]:
        pairs = config.pso.pairs
        if pairs is None:
            return []
        check_posterior(pairs.posterior, "pso.pairs.posterior", family)
        return read_preferences(pairs, family.image_shape, family.conditions).lines

    @classmethod
    def rollout_of(cls, config: RunSettings) -> tuple[int, Transition]:
        """Steps and transition of the rollouts."""
        settings, sampler = config.pso, config.sampler
        return settings.rollout_steps or sampler.steps, settings.rollout_transition or sampler.transition

    @classmethod
    def make_sampler(cls, config: RunSettings, family: Family) -> FewStepSampler:
        """The tuned model's own way to sample; another one would be another policy.

        Raises:
            UserError: its scheduler moves in another way.
        """
        sampler = super().make_sampler(config, family)
        sampler = replace(sampler, times=cls.times_of(config, family, sampler.steps))
        known, transition = transition_of(family.scheduler), sampler.transition
        matters = sampler.steps > 1 or "ancestral" in (known, transition)
        if known is not None and known != transition and matters:
            raise UserError(
                f"sampler.transition = {transition}: the scheduler of {config.teacher.path}, "
                f"{type(family.scheduler).__name__}, moves by {known}; set sampler.transition={known}"
            )
        return sampler

    @classmethod
    def times_of(cls, config: RunSettings, family: Family, steps: int) -> tuple[float, ...]:
        """The times of ``steps`` steps: those of the model's own LCM scheduler, or as for any student."""
        start = first_time(config, family)
        times = lcm_times(family.scheduler, steps) if start is None else None
        return times or few_step_times(family.schedule, steps, start)

    @classmethod
    def passes(cls, config: RunSettings) -> Passes:
        """For each pair.  Online: two rollouts of N, and N - 1 moves of two samples through both models, 3 + 1 each."""
        settings, steps = config.pso, config.sampler.steps
        moves = steps if settings.over_steps == "sum" else 1
        if settings.loss == "diffusion":
            return Passes(3.0 * moves)
        if settings.rolls_out:
            rollout, _ = cls.rollout_of(config)
            return Passes((2.0 if settings.mode == "online" else 1.0) * rollout + 8.0 * (rollout - 1))
        return Passes(8.0 * moves + (steps if settings.mode == "targets" else 0))

    @classmethod
    def describe(cls, config: RunSettings) -> list[str]:
        settings = config.pso
        if settings.loss == "diffusion":
            return ["the plain denoising loss on the targets, no preference"]
        nats = " over C H W a nat" if settings.reduction == "mean" else " a nat"
        return [f"beta {settings.beta:g}{nats}; a sample is a pair"]

    @classmethod
    def make_record(cls, config: RunSettings) -> RunRecord:
        """The model that is tuned has few steps itself, and is judged by the same rewards."""
        return RunRecord(baseline="untuned", rewards=config.pso.rewards)

    # -- a run ---------------------------------------------------------------------------------------------

    def phases(self) -> list[Phase]:
        def begin() -> None:
            if self.counters["student"] == 0:
                self.probe()

        return [Phase(self.name, "student", self.config.train.updates, self.updates, begin)]

    def other_updates(self) -> Iterator[Update]:
        if self.counters["student"] % self.config.train.sample_every == 0 and self.counters["student"]:
            self.probe()
        return iter(())

    def preference(self, winner: Tensor, loser: Tensor, counts: Tensor | None = None) -> Losses:
        """The loss on log ratios (B, M) of both sides; ``counts`` (B,): which pairs are no tie."""
        settings = self.settings
        self.log("log_ratio/winner", winner.mean())
        self.log("log_ratio/loser", loser.mean())
        return {"preference": (1.0, preference_loss(winner, loser, settings.beta, settings.over_steps, counts))}

    # -- likelihoods of moves ------------------------------------------------------------------------------

    @torch.no_grad()
    def roll_out(self, role: Role, noise: Tensor, condition: Condition, draw: Draw) -> tuple[list[Move], Tensor]:
        """A rollout from unit noise (B, ...): its stochastic moves, all but the last, and its x0 (B, ...)."""
        sampler, moves = self.rollout, []
        x_t = sampler.start(noise)
        for index in range(sampler.steps - 1):
            x0 = role(x_t, sampler.time(index, x_t), condition).x0
            following = sampler.move(x0, x_t, index, draw)
            moves.append(Move(index, x_t, following))
            x_t = following
        return moves, role(x_t, sampler.time(sampler.steps - 1, x_t), condition).x0

    def move_ratios(self, moves: list[Move], condition: Condition) -> Tensor:
        """``log p / p_ref`` (B, M) of moves, with a graph to the student."""
        return torch.stack([self.move_ratio(move, condition) for move in moves], 1)

    def move_ratio(self, move: Move, condition: Condition) -> Tensor:
        """The same of one move, (B,)."""
        sampler, x_t = self.rollout, move.x_t
        t = sampler.time(move.index, x_t)
        with torch.no_grad():
            reference, _ = sampler.transition_kernel(self.roles.teacher(x_t, t, condition).x0, x_t, move.index)
        mean, std = sampler.transition_kernel(self.roles.student(x_t, t, condition).x0, x_t, move.index)
        return gaussian_log_ratio(move.following, mean, reference, std, self.settings.reduction)

    def judge(self, pixels: Tensor, items: list, log: bool = True) -> Tensor:
        """The weighted sum of the rewards of pictures (B, C, H, W), (B,)."""
        total = torch.zeros(len(pixels), device=pixels.device)
        for reward in self.parts.rewards:
            score = self.observe(f"{REWARD}{reward.name}", reward(pixels, items).float())
            if log:
                self.log(f"reward/{reward.name}", score.mean())
            total = total + reward.weight * score
        return total

    # -- denoising errors ----------------------------------------------------------------------------------

    def draw_steps(self, count: int) -> list[Tensor]:
        """Steps of the student, (count,) each: one drawn for each pair, or every one of them in turn."""
        device = self.family.device
        if self.settings.over_steps == "sum":
            return [torch.full((count,), index, device=device) for index in range(self.sampler.steps)]
        return [self.noise.randint(0, self.sampler.steps - 1, count)]

    def times(self, steps: Tensor, like: Tensor, sampler: FewStepSampler) -> Tensor:
        """The times of ``steps`` (B,), (B,)."""
        table = torch.stack([sampler.time(index, like[:1])[0] for index in range(sampler.steps)])
        return table[steps]

    def errors(self, role: Role, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """Squared errors (B,) of a role at x0 (B, ...) noised to t (B,)."""
        schedule = role.schedule
        x_t = schedule.add_noise(x0, noise, t)
        prediction = role(x_t, t, condition)
        kind = prediction.kind if self.settings.error == "native" else self.settings.error
        error = prediction.of(kind) - schedule.target(x0, noise, kind, x_t, t)
        return reduce_dims(error.square(), self.settings.reduction)

    def error_ratio(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition, factor: float) -> Tensor:
        """``-factor`` times what the student errs more than the frozen model, (B,)."""
        with torch.no_grad():
            reference = self.errors(self.roles.teacher, x0, noise, t, condition)
        return denoising_log_ratio(self.errors(self.roles.student, x0, noise, t, condition), reference, factor)

    def denoising_ratios(self, batch: Batch, loser: Tensor) -> tuple[Tensor, Tensor]:
        """Log ratios (B, M) of the batch's pictures and of ``loser``: the same noise and times for both."""
        condition = cat_conditions(batch.condition, batch.condition)
        both, ratios = torch.cat([batch.real, loser]), []
        for steps in self.draw_steps(len(batch)):
            noise = self.noise.randn_like(batch.real)
            t = self.times(steps, noise, self.sampler)
            ratio = self.error_ratio(both, torch.cat([noise, noise]), torch.cat([t, t]), condition, 0.5)
            ratios.append(ratio)
        winner, other = torch.stack(ratios, 1).chunk(2)
        return winner, other

    # -- what is watched -----------------------------------------------------------------------------------

    @torch.no_grad()
    def probe(self) -> None:
        """Log of samples on fixed noise, for each number of steps N: ``probe/reward@N``, ``probe/sharpness@N`` (mean
        difference of neighbouring pixels) and ``probe/distance@N`` (RMS to the untuned model's, same noise)."""
        items = self.parts.conditions.items
        items = [items[i % len(items)] for i in range(self.settings.probe)] if items else []
        condition = self.family.encode_conditions(items) if items else {}
        with self.roles.meter.paused():
            self._probe(condition, items)

    def _probe(self, condition: Condition, items: list) -> None:
        for steps in (self.sampler.steps, *self.config.sampler.also_steps):
            sampler, pictures = self.sampler.in_steps(steps), []
            for role in (self.roles.teacher, self.roles.student):
                fixed = Noise(self.config.seed + 1, self.family.device)
                noise = fixed.randn(self.settings.probe, *self.family.sample_shape)
                with self.parts.averaged():
                    pictures.append(self.parts.decode(sampler.sample(role, noise, condition, fixed.randn_like)))
            untuned, tuned = pictures
            if self.parts.rewards:
                self.log(f"probe/reward@{steps}", self.judge(tuned, items, log=False).mean())
            self.log(f"probe/distance@{steps}", (tuned - untuned).square().mean().sqrt())
            self.log(f"probe/sharpness@{steps}", Sharpness()(tuned, items).mean())
