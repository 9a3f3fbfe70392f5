"""Pairwise sample optimisation of a model that is already distilled (PSO, 2410.03190).

The teacher of the config is the few-step model to tune; it stays frozen as the reference, and the student starts as a
LoRA on it (``roles.weights: shared``) or a copy.  Three kinds of pairs:

- ``online``: two rollouts of the student for each condition, the better by ``rewards`` is the winner.  The log ratios
  are those of the sampler's own Gaussian moves, so the last move and a deterministic sampler have none, and a one-step
  rollout has nothing to learn from.  A model deployed in one step is tuned through a longer ``rollout_steps``, as the
  authors tune SDXL-Turbo.
- ``pairs``: preference data.  Both sides' ratios are denoising errors at the student's own times with shared noise:
  Diffusion-DPO (2311.12908) restricted to those times, for any number of steps.
- ``targets``: ``data.images`` (a style, a concept) against the student's own samples of the same conditions.  The
  samples' side is a denoising error too, or with ``likelihood: transition`` the moves that made them (eq. 39 as
  restated by FestDPO; the target's side then counts 1 and not 1/2, as printed there).

``loss: diffusion`` is the plain denoising loss on the targets, the fine-tune that PSO is compared with.

Departures from the released code: re-noising is drawn for each sample, not once for a batch; densities are float32
whatever the networks compute in; the moves' times are the rollout's own pairs; ties are left out of the mean; the loss
at all moves of a pair is one update.  The paper itself could not be read here: its offline beta and settings are not
known, nor whether its runs sum over steps inside the sigmoid (``over_steps: sum``) as its equations or not (``step``)
as its code.  Rewards over-optimise (over-exposed, smoothed pictures are reported): watch ``probe/distance``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from tqdm import tqdm

from stepdistill.conditions import drawn
from stepdistill.config import Section, UserPath
from stepdistill.data.images import ImageSet
from stepdistill.data.latents import check_posterior, load_latents
from stepdistill.data.order import Order
from stepdistill.data.preference_pairs import PreferenceSettings, read_preferences
from stepdistill.denoiser import Condition, cat_conditions
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.families.schedulers import lcm_times, transition_of
from stepdistill.finiteness import is_finite
from stepdistill.judges.rewards import RewardSettings, Sharpness, load_rewards
from stepdistill.noise import Noise
from stepdistill.objectives.preference import (
    OverSteps,
    Reduction,
    clamped,
    denoising_log_ratio,
    gaussian_log_ratio,
    preference_loss,
    reduced,
)
from stepdistill.roles.role import Role
from stepdistill.run import CACHE
from stepdistill.run_record import RunRecord
from stepdistill.sampler import Draw, FewStepSampler, Transition, few_step_times
from stepdistill.settings import RunSettings
from stepdistill.trainers.loop.causes import REAL, REWARD
from stepdistill.trainers.loop.trainer import Batch, Losses, RealSource

from .direct import DirectTrainer


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


@dataclass
class PairBatch(Batch):
    """A batch whose ``real`` are the winners; ``loser`` (B, C, H, W) the others."""

    loser: Tensor | None = None


@dataclass(frozen=True)
class Move:
    """One stochastic move of a rollout: from x_t (B, ...) at step ``index`` to ``following``."""

    index: int
    x_t: Tensor
    following: Tensor


class PSO(DirectTrainer):
    name = "pso"
    title = "pairwise sample optimisation: tunes a distilled model by rewards, pairs or target images (2410.03190)"
    Settings = PSOSettings
    settings: PSOSettings
    defaults = {"roles": {"weights": "shared"}}

    # -- checks and plans ----------------------------------------------------------------------------------

    @classmethod
    def wants_images(cls, settings: PSOSettings) -> bool:
        return settings.mode == "targets"

    @classmethod
    def make_record(cls, config: RunSettings) -> RunRecord:
        """The model that is tuned has few steps itself, and is judged by the same rewards."""
        return RunRecord(baseline="untuned", rewards=cls.settings_of(config).rewards)

    @classmethod
    def check(cls, config: RunSettings, settings: PSOSettings) -> None:
        if settings.mode == "online" and not settings.rewards:
            raise UserError("pso.mode = online needs a judge: set pso.rewards, or mode to pairs or targets")
        if settings.mode == "targets" and config.data.images is None:
            raise UserError("pso.mode = targets needs images: set data.images (folder, npz or dataset)")
        for key in ("student_from", "lora_under", "network"):
            if getattr(config.roles, key) is not None:
                raise UserError(f"roles.{key}: pso tunes the model of teacher.path against itself; remove it")
        if config.data.part is not None and settings.pairs is not None:
            raise UserError("msd: pso's pairs are not divided among students; use mode = online or targets")
        if not settings.rolls_out:
            return
        steps, transition = cls.rollout_of(config, settings)
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
    def check_family(cls, settings: PSOSettings, family: Family) -> None:
        if settings.pairs is not None:
            check_posterior(settings.pairs.posterior, "pso.pairs.posterior", family)

    @classmethod
    def check_data(cls, settings: PSOSettings, family: Family) -> list[str]:
        if settings.pairs is None:
            return []
        return read_preferences(settings.pairs, family.image_shape, family.conditions).lines

    @classmethod
    def rollout_of(cls, config: RunSettings, settings: PSOSettings) -> tuple[int, Transition]:
        """Steps and transition of the rollouts."""
        own = config.sampler
        return settings.rollout_steps or own.steps, settings.rollout_transition or own.transition

    @classmethod
    def make_sampler(cls, config: RunSettings, family: Family) -> FewStepSampler:
        """The tuned model's own way to sample; another one would be another policy.

        Raises:
            UserError: its scheduler moves in another way.
        """
        sampler = super().make_sampler(config, family)
        sampler = replace(sampler, times=cls.times_of(config, family, sampler.steps))
        found, own = transition_of(family.scheduler), sampler.transition
        matters = sampler.steps > 1 or "ancestral" in (found, own)
        if found is not None and found != own and matters:
            raise UserError(
                f"sampler.transition = {own}: the scheduler of {config.teacher.path}, "
                f"{type(family.scheduler).__name__}, moves by {found}; set sampler.transition={found}"
            )
        return sampler

    @classmethod
    def times_of(cls, config: RunSettings, family: Family, steps: int) -> tuple[float, ...]:
        """The times of ``steps`` steps: those of the model's own LCM scheduler, or as for any student."""
        start = cls.first_time(config, family)
        own = lcm_times(family.scheduler, steps) if start is None else None
        return own or few_step_times(family.schedule, steps, start)

    @classmethod
    def passes_per_update(cls, config: RunSettings, settings: PSOSettings) -> float:
        """For each pair.  Online: two rollouts of N, and N - 1 moves of two samples through both models, 3 + 1 each."""
        steps = config.sampler.steps
        moves = steps if settings.over_steps == "sum" else 1
        if settings.loss == "diffusion":
            return 3.0 * moves
        if settings.rolls_out:
            rolled, _ = cls.rollout_of(config, settings)
            return (2.0 if settings.mode == "online" else 1.0) * rolled + 8.0 * (rolled - 1)
        return 8.0 * moves + (steps if settings.mode == "targets" else 0)

    @classmethod
    def plan(cls, config: RunSettings) -> list[str]:
        own = config.pso
        if own.loss == "diffusion":
            return ["the plain denoising loss on the targets, no preference"]
        nats = " over C H W a nat" if own.reduction == "mean" else " a nat"
        return [f"beta {own.beta:g}{nats}; a sample is a pair"]

    # -- set-up --------------------------------------------------------------------------------------------

    def build(self) -> None:
        own, config = self.settings, self.config
        self.rewards = load_rewards(own.rewards, self.family.device)
        self.decode = self.family.decoder(own.decoder)
        steps, transition = self.rollout_of(config, own)
        self.rollout = self.sampler
        if own.rolls_out:
            times = self.times_of(config, self.family, steps)
            self.rollout = FewStepSampler(self.family.schedule, times, transition, self.sampler.eta)
        if own.pairs is not None:
            self.pairs = read_preferences(own.pairs, self.family.image_shape, self.family.conditions)
            cache = Path(config.output) / CACHE
            self.sources = []
            for images in self.pairs.sets:
                latents, std = load_latents(self.family, images, cache, own.pairs.posterior)
                self.sources.append(RealSource(self.family, images, latents, config.seed, std=std))
            self.order = Order(len(self.pairs), config.seed + 4)
        if own.best is not None and self.real is not None:  # an export needs no images
            self.real.restrict(self._best_targets(own.best))

    @torch.no_grad()
    def _best_targets(self, share: float, batch: int = 64) -> list[int]:
        """The images with the highest rewards, ``share`` of each label's (of all, where conditions are no labels)."""
        real, scores = self.real, []
        everything = torch.tensor(real.subset)
        read: list[int] = []
        for index in tqdm(everything.split(batch), desc="rewards of the targets", unit="batch"):
            pixels, index = real.images.readable(index.tolist())
            if pixels is not None:
                read += index
                scores.append(self.judge(pixels.to(self.family.device), real.items(index), log=False).cpu())
        real.images.check_readable()
        scores, everything = torch.cat(scores), torch.tensor(read)
        if not is_finite(scores):
            index = int(everything[(~scores.isfinite()).nonzero()[0]])
            raise UserError(
                f"pso.best: the rewards of image {index} of {real.images.source} are not finite; mend the reward, or "
                "remove it from pso.rewards"
            )
        labels = torch.tensor(real.items(read) if self.family.condition_kind == "label" else [0] * len(scores))
        kept = []
        for label in labels.unique():
            (index,) = torch.where(labels == label)
            count = max(1, round(share * len(index)))
            kept += everything[index[scores[index].argsort(descending=True, stable=True)[:count]]].tolist()
        return sorted(kept)

    def prepare(self) -> None:
        if self.counters["student"] == 0:
            self.probe()

    # -- batches -------------------------------------------------------------------------------------------

    def next_batch(self) -> Batch:
        if self.settings.mode == "online":
            return super().next_batch()
        if self.settings.mode == "targets":
            return self.next_real_batch()
        count = self.config.train.batch_size
        start = self.counters["real"] + self.rank * count
        self.counters["real"] += count * self.world
        index = [self._readable_pair(number) for number in self.order.indices(start, count)]
        winner, loser = (self._pictures([self.pairs.order[i][side] for i in index]) for side in (0, 1))
        items = [] if self.family.condition_kind == "none" else [self.pairs.labels[i] for i in index]
        items = [drawn(item, self.order.seed, start + k) for k, item in enumerate(items)]
        condition = self.family.encode_conditions(items) if items else {}
        self.noted(REAL, torch.cat([winner, loser]))
        self.note_conditions(condition)
        return PairBatch(condition, self.noise.randn_like(winner), items, winner, tuple(index), loser=loser)

    def _readable_pair(self, number: int) -> int:
        """The pair itself, or the next one of which both pictures can be read."""
        for step in range(len(self.pairs)):
            other = (number + step) % len(self.pairs)
            if all(self.sources[part].readable(index) for part, index in self.pairs.order[other]):
                return other
        raise UserError("pso.pairs: there is no pair of which both pictures can be read")

    def image_sets(self) -> list[tuple[str, ImageSet]]:
        pairs = [] if self.settings.pairs is None else [("pso.pairs", images) for images in self.pairs.sets]
        return [*super().image_sets(), *pairs]

    def _pictures(self, which: list[tuple[int, int]]) -> Tensor:
        """Samples (B, C, H, W), each named by its set and index; what is drawn of them is one draw for all, so that it
        is the same on any number of processes."""
        means: list[Tensor | None] = [None] * len(which)
        stds: list[Tensor | None] = [None] * len(which)
        for number, source in enumerate(self.sources):
            places = [place for place, (part, _) in enumerate(which) if part == number]
            if places:
                mean, std = source.moments([which[place][1] for place in places])
                for row, place in enumerate(places):
                    means[place] = mean[row]
                    stds[place] = None if std is None else std[row]
        mean = torch.stack(means)
        return mean if stds[0] is None else mean + torch.stack(stds) * self.noise.randn_like(mean)

    # -- losses --------------------------------------------------------------------------------------------

    def student_losses(self, batch: Batch) -> Losses:
        own = self.settings
        if own.loss == "diffusion":
            return {"diffusion": (1.0, self.diffusion(batch))}
        if own.mode == "online":
            winner, loser, counts = self.online(batch)
        elif own.likelihood == "transition":
            (winner, loser), counts = self.target_and_moves(batch), None
        else:
            other = batch.loser if own.mode == "pairs" else self.own_samples(batch)
            (winner, loser), counts = self.denoising_ratios(batch, other), None
        self.log("log_ratio/winner", winner.mean())
        self.log("log_ratio/loser", loser.mean())
        return {"preference": (1.0, preference_loss(winner, loser, own.beta, own.over_steps, counts))}

    def online(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Log ratios (B, M) of the better and the worse of two rollouts, and which pairs are no tie (B,).

        A score that is not finite is no opinion: it makes its pair's ratios NaN.
        """
        count = len(batch)
        second = batch.noise if self.settings.shared_start else self.noise.randn_like(batch.noise)
        condition = cat_conditions(batch.condition, batch.condition)
        moves, x0 = self.roll_out(self.roles.student, torch.cat([batch.noise, second]), condition, self.draw_both)
        with torch.no_grad():
            scores = self.judge(self.decode(x0), [*batch.items, *batch.items])
        first, other = clamped(self.move_ratios(moves, condition), self.settings.clamp).chunk(2)
        better = (scores[:count] > scores[count:])[:, None]
        counts = scores[:count] != scores[count:]
        self.log("ties", (~counts).float().mean())
        broken = (0 * scores).view(2, count).sum(0)[:, None]  # 0, or NaN
        return torch.where(better, first, other) + broken, torch.where(better, other, first) + broken, counts

    def draw_both(self, like: Tensor) -> Tensor:
        """Noise for both rollouts of each pair (2B, ...), half by half: the same on any number of processes."""
        return torch.cat([self.noise.randn_like(half) for half in like.chunk(2)])

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
            theirs, _ = sampler.transition_kernel(self.roles.teacher(x_t, t, condition).x0, x_t, move.index)
        mean, std = sampler.transition_kernel(self.roles.student(x_t, t, condition).x0, x_t, move.index)
        return gaussian_log_ratio(move.following, mean, theirs, std, self.settings.reduction)

    def judge(self, pixels: Tensor, items: list, log: bool = True) -> Tensor:
        """The weighted sum of the rewards of pictures (B, C, H, W), (B,)."""
        total = torch.zeros(len(pixels), device=pixels.device)
        for reward in self.rewards:
            score = self.noted(f"{REWARD}{reward.name}", reward(pixels, items).float())
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
        said = role(x_t, t, condition)
        kind = said.kind if self.settings.error == "native" else self.settings.error
        return reduced((said.of(kind) - schedule.target(x0, noise, kind, x_t, t)).square(), self.settings.reduction)

    def error_ratio(self, x0: Tensor, noise: Tensor, t: Tensor, condition: Condition, factor: float) -> Tensor:
        """``-factor`` times what the student errs more than the frozen model, (B,)."""
        with torch.no_grad():
            theirs = self.errors(self.roles.teacher, x0, noise, t, condition)
        return denoising_log_ratio(self.errors(self.roles.student, x0, noise, t, condition), theirs, factor)

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

    def target_and_moves(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Log ratios (B, M) of targets noised to the rollout's times, and of the moves of own samples."""
        moves, _ = self.roll_out(self._sampled(), batch.noise, batch.condition, self.noise.randn_like)
        targets = []
        for move in moves:
            noise = self.noise.randn_like(batch.real)
            t = self.rollout.time(move.index, noise)
            targets.append(self.error_ratio(batch.real, noise, t, batch.condition, 1.0))
        return torch.stack(targets, 1), self.move_ratios(moves, batch.condition)

    @torch.no_grad()
    def own_samples(self, batch: Batch) -> Tensor:
        """Samples of the batch's conditions (B, ...) by the student's own sampler."""
        return self.sampler.sample(self._sampled(), batch.noise, batch.condition, self.noise.randn_like)

    def _sampled(self) -> Role:
        return self.roles.teacher if self.settings.reference_samples == "untuned" else self.roles.student

    def diffusion(self, batch: Batch) -> Tensor:
        """The student's mean denoising error on the targets, a scalar."""
        errors = []
        for steps in self.draw_steps(len(batch)):
            noise = self.noise.randn_like(batch.real)
            t = self.times(steps, noise, self.sampler)
            errors.append(self.errors(self.roles.student, batch.real, noise, t, batch.condition))
        return torch.stack(errors).mean()

    # -- what is watched -----------------------------------------------------------------------------------

    def after_student(self) -> None:
        if self.counters["student"] % self.config.train.sample_every == 0 and self.counters["student"]:
            self.probe()

    @torch.no_grad()
    def probe(self) -> None:
        """Log of samples on fixed noise, for each number of steps N: ``probe/reward@N``, ``probe/sharpness@N`` (mean
        difference of neighbouring pixels) and ``probe/distance@N`` (RMS to the untuned model's, same noise)."""
        if not self.accelerator.is_main_process:
            return
        meter, items = self.roles.meter, self.conditions.items
        kept = meter.forward
        items = [items[i % len(items)] for i in range(self.settings.probe)] if items else []
        condition = self.family.encode_conditions(items) if items else {}
        for steps in (self.sampler.steps, *self.config.sampler.also_steps):
            sampler, pictures = self.sampler.in_steps(steps), []
            for role in (self.roles.teacher, self.roles.student):
                fixed = Noise(self.config.seed + 1, self.family.device)
                noise = fixed.randn(self.settings.probe, *self.family.sample_shape)
                with self.averaged():
                    pictures.append(self.decode(sampler.sample(role, noise, condition, fixed.randn_like)))
            untuned, tuned = pictures
            if self.rewards:
                self.log(f"probe/reward@{steps}", self.judge(tuned, items, log=False).mean())
            self.log(f"probe/distance@{steps}", (tuned - untuned).square().mean().sqrt())
            self.log(f"probe/sharpness@{steps}", Sharpness()(tuned, items).mean())
        meter.forward = kept
