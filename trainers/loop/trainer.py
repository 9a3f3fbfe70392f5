"""The loop: batches, optimizers, counters, EMA, clipping, logging, checkpoints, signals.  No method, no model name.

A method subclasses :class:`Trainer` (or the two-time-scale
:class:`stepdistill.trainers.methods.score.ScoreTrainer`) and holds its settings and its losses.  The trainer owns
everything that changes the weights.
"""

from __future__ import annotations

import abc
import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from tqdm import tqdm

from stepdistill import checkpoint
from stepdistill.attention.choice import choose_fastest, require_backend
from stepdistill.attention.kernels import AUTO
from stepdistill.attention.modules import set_backend
from stepdistill.conditions import drawn
from stepdistill.config import Section
from stepdistill.data.grid import save_grid
from stepdistill.data.images import ImageSet
from stepdistill.data.order import Order
from stepdistill.data.pictures import as_pixels
from stepdistill.denoiser import Condition, take
from stepdistill.digests import Digests, check_same
from stepdistill.errors import UserError, first_line
from stepdistill.families.base import Family
from stepdistill.finiteness import NotFinite, first_not_finite
from stepdistill.noise import Noise
from stepdistill.roles.ema import EMA
from stepdistill.roles.roles import Roles
from stepdistill.run import RunFolder
from stepdistill.run_record import RunRecord
from stepdistill.sampler import Draw, FewStepSampler, few_step_times
from stepdistill.settings import OptimizerSettings, RunSettings

from .causes import CONDITIONS, GRADIENT, REAL, RunStopped, advice, lines, too_many
from .ranks import on_main

Losses = dict[str, tuple[float, Tensor]]
"""Weight and scalar loss by name."""
Noted = TypeVar("Noted", Tensor, list[Tensor])


class Interrupted(Exception):
    """A signal, or the wall-time limit: everything is saved, the run can be resumed."""

    def __init__(self, reason: str, exit_code: int):
        super().__init__(reason)
        self.exit_code = exit_code


@dataclass
class Batch:
    """What one micro-batch of a student is made from: conditions, unit noise (B, C, H, W), and the labels or prompts
    that the conditions are of ([] for none).  Methods that train on real samples add them, with where they stand."""

    condition: Condition
    noise: Tensor
    items: list
    real: Tensor | None = None
    indices: tuple[int, ...] = ()

    negative: Condition | None = None
    steering: Condition = field(default_factory=dict)
    """Negative prompts, as a condition and as what the student alone is told of them."""

    @property
    def student_condition(self) -> Condition:
        return self.condition | self.steering

    def __len__(self) -> int:
        return len(self.noise)


class ConditionSource:
    """Encoded conditions in a seeded order; prompts up to ``KEEP`` are encoded once and kept.

    ``items`` are the student's own; ``all_items`` those of every student, where there are several.
    """

    KEEP = 20_000

    def __init__(self, family: Family, items: list, seed: int, all_items: list | None = None):
        """
        Raises:
            UserError: encodings that are not finite.
        """
        self.family, self.items, self.order = family, items, Order(max(1, len(items)), seed)
        self.all_items = items if all_items is None else all_items
        self._encoded: Condition | None = None
        if family.condition_kind == "prompt" and len(items) <= self.KEEP:
            texts = list(dict.fromkeys(text for item in items for text in getattr(item, "every", (item,))))
            if len(texts) <= self.KEEP:
                self._encode(texts)

    def _encode(self, texts: list[str]) -> None:
        """Encode texts, once each."""
        self._rows = {text: row for row, text in enumerate(texts)}
        parts = [self.family.encode_conditions(texts[i : i + 64]) for i in range(0, len(texts), 64)]
        self._encoded = {k: torch.cat([p[k].cpu() for p in parts]) for k in parts[0]}
        if first_not_finite(self._encoded.items()) is not None:
            raise UserError(
                "data: the teacher's text encoder gives encodings of the prompts that are not finite; load it in "
                "float32 (teacher.dtype=float32)"
            )

    def batch(self, position: int, count: int) -> tuple[Condition, list]:
        """Conditions ``position .. position + count - 1`` of the order, and the items that they are of; of an item
        with several captions one, drawn by the seed and the position."""
        if self.family.condition_kind == "none":
            return {}, []
        index = self.order.indices(position, count)
        return self.of([drawn(self.items[i], self.order.seed, position + k) for k, i in enumerate(index)])

    def at(self, index: list[int]) -> tuple[Condition, list]:
        """The conditions of items ``index``, and those items; of several captions the first."""
        return self.of([drawn(self.items[i], self.order.seed, 0) for i in index])

    def of(self, items: list) -> tuple[Condition, list]:
        """The conditions of labels or prompts of this source, and these."""
        if self._encoded is None:
            return self.family.encode_conditions(items), items
        rows = torch.tensor([self._rows[item] for item in items])
        return {k: v.to(self.family.device) for k, v in take(self._encoded, rows).items()}, items


@dataclass(frozen=True)
class RealBatch:
    """Real samples (B, C, H, W), their conditions, the labels or captions that these are of ([] for none), and which
    images they are."""

    samples: Tensor
    condition: Condition
    items: list
    indices: list[int]


class RealSource:
    """Real samples (latents where there is a VAE) with their own conditions, in a seeded order.

    In the place of an image that cannot be read stands the next one of ``subset`` that can, whenever that is noticed:
    the batches are the same in every process and after a resume.

    Args:
        subset: the indices of the images that are drawn; all of them by default.
        std: standard deviations of the latents (N, C, H, W), where each use draws a new sample; None where the latents
            are the samples.
    """

    def __init__(
        self,
        family: Family,
        images: ImageSet,
        latents: Tensor | None,
        seed: int,
        subset: list[int] | None = None,
        std: Tensor | None = None,
    ):
        self.family, self.images, self.latents, self.seed, self.std = family, images, latents, seed, std
        self.restrict(list(range(len(images))) if subset is None else subset)

    def restrict(self, subset: list[int]) -> None:
        """Draw these images alone from now on."""
        self.subset, self.order = subset, Order(len(subset), self.seed)

    def batch(self, position: int, count: int, draw: Draw | None = None) -> RealBatch:
        """The images at ``position .. position + count - 1`` of the order; of several captions of one image one, drawn
        by the seed and the position.  ``draw``: the noise of latents that are drawn.

        Raises:
            UserError: none of the images can be read.
        """
        index, pixels = self._at(self.order.indices(position, count))
        samples = self.samples(index, draw) if pixels is None else self._encoded(pixels)
        items = [drawn(item, self.seed, position + k) for k, item in enumerate(self.items(index))]
        condition = self.family.encode_conditions(items) if items else {}
        return RealBatch(samples, condition, items, index)

    def _at(self, places: list[int]) -> tuple[list[int], Tensor | None]:
        """The images at places of the subset, or those that stand for them; their pixels where there are no latents."""
        if self.latents is not None:
            return [self._next(place, lambda i: i not in self.images.unreadable) for place in places], None
        pixels: dict[int, np.ndarray] = {}

        def read(index: int) -> bool:
            if index not in pixels and (image := self.images.pixels(index)) is not None:
                pixels[index] = image
            return index in pixels

        index = [self._next(place, read) for place in places]
        return index, as_pixels([pixels[i] for i in index])

    def _next(self, place: int, good: Callable[[int], bool]) -> int:
        for step in range(len(self.subset)):
            if good(index := self.subset[(place + step) % len(self.subset)]):
                return index
        raise UserError(f"{self.images.source}: none of its images can be read; {self.images.unreadable_note}")

    def readable(self, index: int) -> bool:
        """Whether one image can be read."""
        if self.latents is not None:
            return index not in self.images.unreadable
        return self.images.pixels(index) is not None

    def items(self, index: list[int]) -> list:
        """The labels or captions of images ``index``; [] where the teacher takes none."""
        return [] if self.family.condition_kind == "none" else [self.images.labels[i] for i in index]

    def samples(self, index: list[int], draw: Draw | None = None) -> Tensor:
        """The samples ``index`` (len(index), C, H, W); latents that are drawn take their noise from ``draw``."""
        mean, std = self.moments(index)
        return mean if std is None else mean + std * draw(mean)

    def moments(self, index: list[int]) -> tuple[Tensor, Tensor | None]:
        """Mean and standard deviation (len(index), C, H, W) of the samples ``index``; None for none."""
        device = self.family.device
        if self.latents is None:
            return self._encoded(self.images.batch(index)), None
        std = None if self.std is None else self.std[index].float().to(device)
        return self.latents[index].float().to(device), std

    def _encoded(self, pixels: Tensor) -> Tensor:
        return self.family.encode_images(pixels.to(self.family.device))


class Trainer(abc.ABC):
    """One distillation run.

    Args:
        config: the resolved config.
        settings: the method's own section of it.
        sampler: the student's few-step sampler.
        real: real samples, for methods and settings that want them.
        run: where to write; None writes nothing (tests, benchmarks).
    """

    name: ClassVar[str]
    title: ClassVar[str]
    Settings: ClassVar[type[Section]]
    defaults: ClassVar[dict[str, Any]] = {}
    """Raw config of other sections that the method starts from, e.g. its way to hold the roles; the file's own wins."""
    has_fake_score: ClassVar[bool] = False
    iterations_per_update = 1
    """Iterations for each student update."""

    def __init__(
        self,
        config: RunSettings,
        settings: Section,
        family: Family,
        roles: Roles,
        sampler: FewStepSampler,
        conditions: ConditionSource,
        real: RealSource | None = None,
        run: RunFolder | None = None,
        accelerator: Accelerator | None = None,
    ):
        self.config, self.settings, self.family, self.roles = config, settings, family, roles
        self.sampler, self.conditions, self.real, self.run = sampler, conditions, real, run
        self.accelerator = accelerator or Accelerator(cpu=family.device.type == "cpu")
        self.world, self.rank = self.accelerator.num_processes, self.accelerator.process_index
        self.noise = Noise(config.seed, family.device, self.rank, self.world)
        self.teacher_digests: Digests = {}
        self.router: str | None = None  # of several students: the hash of what gave this one its conditions
        self.trained_on: Any = None  # what a job's config named, to describe it (stepdistill.trainers.plans.build.Fit)
        self.attention: str | None = None  # the kernel that the networks use, once it is chosen
        self.extra: dict[str, nn.Module] = {}  # networks of the method's own, besides the roles
        self.counters = {"iteration": 0, "conditions": 0, "real": 0}
        self.seconds = 0.0
        self.passes_before_resume = 0  # of all processes, however many they were then
        self._seconds_before, self._started = 0.0, time.monotonic()
        self.build()
        self.trained = self.trainable()
        self.counters |= dict.fromkeys(self.trained, 0)
        self.skipped = dict.fromkeys(self.trained, 0)
        self.skipped_in_a_row = dict.fromkeys(self.trained, 0)
        self.not_finite: dict[str, int] = {}  # skipped updates by what was not finite, "gradient" where all else was
        self.optimizers = {name: self._optimizer(name, list(p.values())) for name, p in self.trained.items()}
        self.ema = EMA(roles.student, config.train.ema_decay) if config.train.ema_decay else None
        self.watchers: list[Callable[[Trainer], None]] = []  # called after each student update
        self._logged: dict[str, list[Tensor | float]] = {}
        self.unwritten: list[dict[str, Any]] = []  # rows of metrics that the disk has not taken
        self._failure: UserError | None = None  # what could not be written; the run is saved, then ends with it
        self._stop: tuple[str, int] | None = None
        self._unreadable = 0  # pictures that all processes know not to be readable

    # -- what a method says --------------------------------------------------------------------------------

    def build(self) -> None:  # noqa: B027
        """Make networks of the method's own (``self.extra``); called once, before the optimizers."""

    def trainable(self) -> dict[str, dict[str, nn.Parameter]]:
        """What each optimizer trains, by the optimizer's name and the parameter's: the student, and each of
        ``self.extra`` by itself."""
        return {
            "student": self.roles.student.parameters(),
            **{name: dict(module.named_parameters()) for name, module in self.extra.items()},
        }

    @abc.abstractmethod
    def iteration(self) -> None:
        """One iteration: draw batches, backward, :meth:`update` roles."""

    @classmethod
    def resolve(cls, raw: dict[str, Any]) -> type[Trainer]:
        """The trainer that a raw config with this method means: itself, but for methods that build on another."""
        return cls

    @classmethod
    def sections(cls) -> dict[str, type[Section]]:
        """The config's sections that this method reads, by name."""
        return {cls.name: cls.Settings}

    @classmethod
    def settings_of(cls, config: RunSettings) -> Section:
        """The section that :attr:`settings` is."""
        return getattr(config, cls.name)

    @classmethod
    def make_record(cls, config: RunSettings) -> RunRecord:
        """What the run's evaluation has to know of the method."""
        scale = getattr(cls.settings_of(config), "guidance_scale", None)
        return RunRecord(guidance_scale=scale or 1.0)

    @classmethod  # noqa: B027
    def check(cls, config: RunSettings, settings: Section) -> None:
        """Refuse contradictions before any weight is loaded.

        Raises:
            UserError: one line that names the keys.
        """

    @classmethod  # noqa: B027
    def check_family(cls, settings: Section, family: Family) -> None:
        """Refuse a teacher that lacks what these settings need, before anything is written.

        Raises:
            UserError: one line that names the key.
        """

    @classmethod
    def check_data(cls, settings: Section, family: Family) -> list[str]:
        """Read what data the method's own sections name, before anything is written; what a user should know of it, a
        line each.

        Raises:
            UserError: it is not there, or does not fit the teacher.
        """
        return []

    @classmethod
    def make_sampler(cls, config: RunSettings, family: Family) -> FewStepSampler:
        """The student's sampler on the teacher's schedule.

        Raises:
            UserError: steps or a start that the schedule has not.
        """
        own = config.sampler
        times = few_step_times(family.schedule, own.steps, cls.first_time(config, family))
        return FewStepSampler(family.schedule, times, own.transition, own.eta, own.final)

    @staticmethod
    def first_time(config: RunSettings, family: Family) -> float | None:
        """The first step's time as the config names it, None for the schedule's own."""
        own = config.sampler
        if own.init_sigma is None:
            return own.start
        return family.schedule.at_noise_ratio(torch.tensor([own.init_sigma])).item()

    @classmethod
    @abc.abstractmethod
    def passes_per_update(cls, config: RunSettings, settings: Section) -> float:
        """Network passes of a student update for each of its samples, on average, for the plan of a run."""

    @classmethod
    def passes_before(cls, config: RunSettings) -> int:
        """Network passes before the first student update, on one process."""
        return 0

    @classmethod
    def planned_passes(cls, config: RunSettings) -> int:
        """Network passes of a whole run on one process, from its settings."""
        train = config.train
        updates = cls.passes_per_update(config, cls.settings_of(config)) * train.updates
        planned = cls.passes_before(config) + round(updates * train.batch_size * train.gradient_accumulation)
        return planned if train.max_passes is None else min(planned, train.max_passes)

    @classmethod
    def planned_updates(cls, config: RunSettings, world: int = 1) -> int:
        """Student updates of a whole run on ``world`` processes: fewer than asked where its passes end before."""
        train = config.train
        if train.max_passes is None:
            return train.updates
        update = cls.passes_per_update(config, cls.settings_of(config)) * train.batch_size * world
        left = max(train.max_passes - cls.passes_before(config), 1)
        return min(train.updates, math.ceil(left / (update * train.gradient_accumulation)))

    @classmethod
    def plan(cls, config: RunSettings) -> list[str]:
        """What a run does besides the student updates, a line each, for ``--dry-run``."""
        return []

    @classmethod
    def wants_images(cls, settings: Section) -> bool:
        """Whether these settings train with real images."""
        return False

    @classmethod
    def divides_images(cls, settings: Section) -> bool:
        """Whether one of several students sees the real images of its own conditions alone."""
        return True

    def image_sets(self) -> list[tuple[str, ImageSet]]:
        """The real images that are read while training, each with the config's section that names them."""
        return [] if self.real is None else [("data.images", self.real.images)]

    # -- batches -------------------------------------------------------------------------------------------

    def use_attention(self) -> None:
        """Compute attention in every network as ``train.attention`` says.

        Raises:
            UserError: a backend that does not run here.
        """
        asked, device = self.config.train.attention, self.family.device
        dtype = self.roles.autocast_dtype or torch.float32
        require_backend(asked, "train.attention", device, dtype, gradients=True, networks=self.roles.networks())
        self.attention = asked
        if asked == AUTO:
            self.attention, _ = choose_fastest(self.roles.student.network, device, dtype, gradients=True)
            (self.attention,) = broadcast_object_list([self.attention])  # timings differ, processes must not
        for network in self.roles.networks():
            set_backend(network, self.attention)

    def next_batch(self) -> Batch:
        """This process's next conditions with fresh noise."""
        count = self.config.train.batch_size
        start = self.counters["conditions"] + self.rank * count
        self.counters["conditions"] += count * self.world
        condition, items = self.conditions.batch(start, count)
        self.note_conditions(condition)
        return Batch(condition, self.noise.randn(count, *self.family.sample_shape), items)

    def next_real(self, count: int) -> tuple[Tensor, Condition]:
        """This process's next real samples (count, C, H, W) and their conditions."""
        real = self.next_real_images(count)
        return real.samples, real.condition

    def next_real_images(self, count: int) -> RealBatch:
        """The same with what they are of."""
        start = self.counters["real"] + self.rank * count
        self.counters["real"] += count * self.world
        real = self.real.batch(start, count, self.noise.randn_like)
        self.noted(REAL, real.samples)
        return real

    def noted(self, name: str, values: Noted) -> Noted:
        """``values`` (B, ...), or several, once it is remembered whether they are finite: of what is no role's."""
        for one in [values] if isinstance(values, Tensor) else values:
            self.roles.watch.note(name, one)
        return values

    def note_conditions(self, condition: Condition) -> None:
        for values in condition.values():
            self.noted(CONDITIONS, values)

    def draw_time(self, low: int, high: int, count: int) -> Tensor:
        """Times (count,) of noise levels uniform in ``low .. high``, in thousandths of the schedule, both included."""
        schedule = self.roles.student.schedule
        return schedule.level(self.noise.randint(*schedule.level_range(low, high), count))

    def total(self, role: str, losses: Losses) -> Tensor:
        """The weighted sum of a role's losses; all of them are logged."""
        total = sum(weight * loss for weight, loss in losses.values())
        self.log(f"loss/{role}", total)
        if len(losses) > 1:
            for name, (_, loss) in losses.items():
                self.log(f"loss/{name}", loss)
        return total

    def log(self, name: str, value: Tensor | float) -> None:
        """Remember a scalar; it stays on its device until the row is written."""
        self._logged.setdefault(name, []).append(value.detach() if isinstance(value, Tensor) else value)

    # -- updates -------------------------------------------------------------------------------------------

    def _optimizer(self, role: str, parameters: list[nn.Parameter]) -> torch.optim.AdamW:
        own = getattr(self.config.optimizer, role)
        return torch.optim.AdamW(
            parameters, lr=own.lr, betas=own.betas, eps=own.eps, weight_decay=own.weight_decay, fused=True
        )

    def update(self, role: str) -> bool:
        """One optimizer step of ``role`` from the gradients that have gathered; whether it was taken.

        Gradients are averaged over processes, the norm is clipped, a non-finite norm is counted and the step skipped.

        Raises:
            RunStopped: too many skipped.
        """
        parameters = [p for p in self.trained[role].values() if p.grad is not None]
        if self.world > 1:
            _average([p.grad for p in parameters], self.world)
        own, optimizer = getattr(self.config.optimizer, role), self.optimizers[role]
        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        finite = math.isfinite(norm.item())
        if finite:
            nn.utils.clip_grads_with_norm_(parameters, own.clip, norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(own, self.counters[role])
            optimizer.step()
            self.counters[role] += 1
            self.skipped_in_a_row[role] = 0
            self.log(f"grad_norm/{role}", norm)
            if role == "student" and self.ema is not None:
                self.ema.update()
        for parameter in self.trained[role].values():
            parameter.grad = None
        if not finite:
            self._count_skipped(role)
        return finite

    def _count_skipped(self, role: str) -> None:
        """Count a skipped update of ``role`` and what was not finite in it.

        Raises:
            RunStopped: too many.
        """
        cause = self._cause()
        name = GRADIENT if cause is None else cause.name
        frozen = name != GRADIENT and name not in self._learning
        self.skipped[role] += 1
        self.skipped_in_a_row[role] += 1
        self.not_finite[name] = self.not_finite.get(name, 0) + 1
        limit, in_a_row = self.config.train.non_finite_limit, self.skipped_in_a_row[role]
        count = too_many(role, self.skipped[role], self.counters[role], in_a_row, limit, frozen)
        if count is None:
            return
        last = checkpoint.latest(self.run.checkpoints) if self.run else None
        raise RunStopped(
            f"stopped at iteration {self.counters['iteration']}: {count}; "
            + advice(cause, role, self.counters, self._learning, self.config)
            + (f"; the last whole checkpoint is {last}" if last else "; there is no checkpoint yet")
        )

    def _cause(self) -> NotFinite | None:
        """What was not finite first, on the first process where anything was; every process must ask."""
        causes = gather_object([self.roles.watch.first()])
        return next((cause for cause in causes if cause is not None), None)

    @property
    def _learning(self) -> set[str]:
        """The networks that train, as they are noted."""
        return {role.name for role in self.roles.trained()} | set(self.extra)

    def advice(self, role: str) -> str:
        """What was not finite first of late and what to do about it, for ``role``; every process must ask."""
        return advice(self._cause(), role, self.counters, self._learning, self.config)

    def check_trained(self) -> None:
        """Refuse a student that no update has touched.

        Raises:
            RunStopped: no student update was taken.
        """
        if self.counters["student"] == 0:
            why = "; ".join(line.removeprefix("note: ") for line in self.skipped_lines())
            raise RunStopped(
                f"no student update was taken, so there is nothing to export ({why or 'none was reached'}); raise "
                "train.updates or train.max_passes"
            )

    def skipped_lines(self) -> list[str]:
        """What was skipped in the whole run, for its end; [] where nothing was."""
        return lines(self.skipped, self.counters, self.not_finite)

    # -- the loop ------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train until ``train.updates`` student updates or ``train.max_passes`` are done; saves at the end.

        Raises:
            Interrupted: SIGTERM, Ctrl-C or ``train.max_minutes``; saved before.
            RunStopped: non-finite gradients in a row; more pictures than tolerated cannot be read, saved before.
        """
        self._seconds_before, self._started = self.seconds, time.monotonic() - self.seconds
        with self._signals():
            self._failure = None
            if self.counters["student"] % self.config.train.sample_every == 0 and not self._has_samples():
                self.save_samples()
            self._write_rows()
            on_main(self.accelerator, lambda: self._raise_failure(""))  # what there is of the run is saved
            self.prepare()
            planned = self.planned_updates(self.config, self.world)
            self.repeat(self.name, "student", self.config.train.updates, self.iteration, self._after_update, planned)
            self.save()
            on_main(self.accelerator, lambda: self._raise_failure(self._where_saved()))

    @property
    def passes(self) -> int:
        """Network passes so far, of all processes: one picture each, backward counted in forwards."""
        return self.passes_before_resume + self.roles.meter.total * self.world

    def spent(self) -> bool:
        """Whether ``train.max_passes`` is reached."""
        limit = self.config.train.max_passes
        return limit is not None and self.passes >= limit

    def prepare(self) -> None:  # noqa: B027
        """What comes before the first student update; :meth:`repeat` it.  Called again when a run is resumed."""

    def repeat(
        self,
        title: str,
        counter: str,
        total: int,
        step: Callable[[], None],
        after: Callable[[tqdm], None],
        planned: int | None = None,
    ) -> None:
        """Run ``step`` until ``counters[counter]`` is ``total``: bar, iteration count, stopping.

        Args:
            after: called with the bar when a step has moved the counter.
            planned: what the bar goes to, where the passes are known to end before ``total``.
        """
        main = self.accelerator.is_main_process
        done, moved = self.counters[counter], True  # a spent budget ends the loop where the counter has just moved
        with tqdm(total=planned or total, initial=done, desc=title, unit="update", disable=not main) as bar:
            while self.counters[counter] < total and not (self.spent() and moved):
                self.roles.watch.clear()
                step()
                self.counters["iteration"] += 1
                self.seconds = time.monotonic() - self._started
                if moved := self.counters[counter] > done:
                    done = self.counters[counter]
                    bar.update(1)
                    after(bar)
                self._maybe_stop()

    def _after_update(self, bar: tqdm) -> None:
        train, student = self.config.train, self.counters["student"]
        for watch in self.watchers:
            watch(self)
        if student % train.log_every == 0:
            self.write_row(bar)
        if student % train.sample_every == 0 or student == train.updates or self.spent():
            self.save_samples()
        if student % train.checkpoint_every == 0 and student < train.updates:
            self.save()

    def write_row(self, bar: tqdm) -> None:
        """What was logged since the last row, as one row of means over what is finite."""
        row: dict[str, Any] = {
            "iteration": self.counters["iteration"],
            **{f"updates/{role}": self.counters[role] for role in self.trained},
            "seconds": round(self.seconds, 3),
            "passes": self.passes,
        }
        for name, values in self._logged.items():
            row[name] = _finite_mean(values)
        row |= {f"skipped/{role}": count for role, count in self.skipped.items() if count}
        row |= {f"not_finite/{name}": count for name, count in self.not_finite.items()}
        if unreadable := sum(len(images.unreadable) for _, images in self.image_sets()):
            row["unreadable"] = unreadable
        self._logged.clear()
        losses = {k.removeprefix("loss/"): v for k, v in row.items() if k.startswith("loss/")}
        shown = {k: "nan" if v is None else f"{v:.3g}" for k, v in losses.items()}
        bar.set_postfix(shown, refresh=False)
        if self.run and self.accelerator.is_main_process:
            self.unwritten.append(row)
            self._write_rows()
            if self.accelerator.trackers:
                self._track(row)

    def _write_rows(self) -> None:
        """Append the rows that are not written yet; an error of the disk ends the run once it and they are saved."""
        try:
            while self.unwritten:
                self.run.append(self.unwritten[0])
                del self.unwritten[0]
        except UserError as error:
            self._failure = self._failure or error

    def _track(self, row: dict[str, Any]) -> None:
        """A row for the trackers; the run goes on without them where they fail."""
        shown = {k: v for k, v in row.items() if k != "iteration" and v is not None}
        try:
            self.accelerator.log(shown, step=row["iteration"])
        except Exception as error:  # of any kind: trackers are other people's
            print(f"note: train.trackers: no more rows for them ({first_line(error)})")
            self.accelerator.trackers = []

    @property
    def _samples_file(self) -> Path:
        return self.run.samples / f"{self.counters['student']:06d}.png"

    def _has_samples(self) -> bool:
        """Whether the grid of this update is there; a run that was stopped may lack it."""
        return self.run is None or self._samples_file.exists()

    @torch.no_grad()
    def save_samples(self) -> None:
        """A grid of the student's pictures on noise and conditions that stay the same over the run.

        An error of the disk ends the run once it is saved.
        """
        if not self.accelerator.is_main_process or self.run is None:
            return
        count = self.config.train.sample_count
        fixed = Noise(self.config.seed + 1, self.family.device)
        noise = fixed.randn(count, *self.family.sample_shape)
        own = self.config.data
        items = self.conditions.items if own.part is not None else own.shown or self.conditions.items
        condition = self.family.encode_conditions([items[i % len(items)] for i in range(count)]) if items else {}
        passes = self.roles.meter.forward
        with self.averaged():
            samples = self.sampler.sample(self.roles.student, noise, condition, fixed.randn_like)
        self.roles.meter.forward = passes
        try:
            save_grid(self.family.decode(samples), self._samples_file)
        except UserError as error:
            self._failure = self._failure or error

    def averaged(self) -> contextlib.AbstractContextManager:
        """The student with its averaged weights, if there is an average."""
        return contextlib.nullcontext() if self.ema is None else self.ema.applied()

    # -- stopping ------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGTERM and the first Ctrl-C ask for a stop after this iteration; a second Ctrl-C stops at once."""

        def ask(number: int, _frame) -> None:
            if self._stop is not None:
                raise KeyboardInterrupt
            self._stop = ("interrupted" if number == signal.SIGINT else "terminated", 128 + number)

        try:
            previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
        except ValueError:  # not the main thread
            previous = {}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _maybe_stop(self) -> None:
        limit = self.config.train.max_minutes
        if self._stop is None and limit is not None and self.seconds - self._seconds_before > 60 * limit:
            self._stop = (f"train.max_minutes = {limit} reached", 0)
        asked, over = self._stop is not None, self.counters["student"] >= self.config.train.updates or self.spent()
        asked = (asked and not over) or self._failure is not None
        sets = self.image_sets()
        if self.world > 1:
            unreadable = sum(len(images.unreadable) for _, images in sets)
            flags = torch.tensor([float(asked), float(unreadable)], device=self.family.device)
            dist.all_reduce(flags, dist.ReduceOp.MAX)
            asked = bool(flags[0])
            if flags[1] > self._unreadable:
                self._share_unreadable()
        if asked:
            self.save()
            on_main(self.accelerator, lambda: self._raise_failure(self._where_saved()))
            raise Interrupted(*(self._stop or ("another process was stopped", 1)))
        for key, images in sets:
            if images.too_many_unreadable and not over:
                self._stop_for(key, images)

    def _share_unreadable(self) -> None:
        """Every process knows which pictures the others could not read."""
        sets = self.image_sets()
        for found in gather_object([[images.unreadable for _, images in sets]]):
            for (_, images), theirs in zip(sets, found, strict=True):
                images.unreadable |= theirs
        self._unreadable = sum(len(images.unreadable) for _, images in sets)

    def _stop_for(self, key: str, images: ImageSet) -> None:
        """End for pictures that cannot be read.

        Raises:
            RunStopped: always; saved before.
        """
        self.save()
        raise RunStopped(
            f"{key}: {images.unreadable_note}; {key}.max_unreadable allows {images.limit}: replace them, or raise it, "
            f"and go on with --resume (saved at student update {self.counters['student']})"
        )

    def _where_saved(self) -> str:
        return f"; the run is saved at student update {self.counters['student']}, go on with --resume"

    def _raise_failure(self, saved: str) -> None:
        """
        Raises:
            UserError: what could not be written, and where all else is saved.
        """
        if self._failure is not None:
            raise UserError(f"{self._failure}{saved}")

    # -- checkpoints ---------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Everything needed to go on: groups of tensors, and a JSON object."""
        tensors = {role.name: role.state_dict() for role in self.roles.trained()}
        tensors |= {name: module.state_dict() for name, module in self.extra.items()}
        if self.ema is not None:
            tensors["ema"] = self.ema.shadow
        for name, optimizer in self.optimizers.items():
            tensors[f"optimizer-{name}"] = {
                f"{index}.{key}": torch.as_tensor(value)
                for index, own in optimizer.state_dict()["state"].items()
                for key, value in own.items()
            }
        tensors["noise"] = {"generator": self.noise.get_state()}
        if self._logged:  # towards the next row
            tensors["logged"] = {name: _stacked(values) for name, values in self._logged.items()}
        meta = {
            "method": self.name,
            "teacher": self.teacher_digests,
            "counters": self.counters,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "not_finite": self.not_finite,
            "seconds": self.seconds,
            "passes": self.passes,
            "ema_updates": self.ema.updates if self.ema else 0,
            "attention": self.attention,
            "unwritten": self.unwritten,
        }
        return tensors, meta

    def save(self) -> None:
        """Write a checkpoint (the main process) and wait for it (the others).

        Raises:
            UserError: it cannot be written.
        """
        if self.run is None:
            return

        def write() -> None:
            tensors, meta = self.state()
            step = self.counters["iteration"]
            try:
                checkpoint.save(self.run.checkpoints, step, tensors, meta, self.config.train.keep_checkpoints)
            except UserError as error:
                raise UserError(str(error) if self._failure is None else f"{self._failure}; {error}") from None

        on_main(self.accelerator, write)

    @torch.no_grad()
    def restore(self, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any], where: str) -> None:
        """Go on from :meth:`state`.

        Raises:
            UserError: the checkpoint is of another method or teacher, or does not fit the networks.
        """
        if meta.get("method") != self.name:
            raise UserError(f"checkpoint {where}: written by method {meta.get('method')!r}, not {self.name!r}")
        check_same(meta.get("teacher"), self.teacher_digests, self.config.teacher.path)
        try:
            for role in self.roles.trained():
                role.load_state_dict(tensors[role.name])
            for name, module in self.extra.items():
                module.load_state_dict(tensors[name])
            if self.ema is not None:
                for key, value in self.ema.shadow.items():
                    value.copy_(tensors["ema"][key])
                self.ema.updates = meta["ema_updates"]
            for name, optimizer in self.optimizers.items():
                _load_optimizer(optimizer, tensors[f"optimizer-{name}"])
            self.noise.set_state(tensors["noise"]["generator"])
            self.counters.update(_counts(meta["counters"]))
            self.skipped.update(_counts(meta["skipped"]))
            self.skipped_in_a_row.update(_counts(meta["skipped_in_a_row"]))
            self.not_finite.update(_counts(meta.get("not_finite", {})))
            self.seconds = float(meta["seconds"])
            self.attention = self.attention or meta.get("attention")
            self._logged = {name: list(values.unbind()) for name, values in tensors.get("logged", {}).items()}
            self.unwritten = list(meta.get("unwritten") or [])
            self.passes_before_resume = passes_of(meta, self.world)
            self.roles.meter.forward = self.roles.meter.backward = 0
        except (KeyError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"checkpoint {where}: does not fit this run ({reason}); was the teacher changed?") from None


def _counts(counts: dict[str, Any]) -> dict[str, int]:
    """
    Raises:
        ValueError: not numbers of something, by name.
    """
    if not all(isinstance(count, int) and count >= 0 for count in counts.values()):
        raise ValueError("its counters are no counts")
    return counts


def _stacked(values: list[Tensor | float]) -> Tensor:
    """Logged scalars as one float32 tensor (N,) on the CPU."""
    return torch.stack([torch.as_tensor(v, dtype=torch.float32).cpu() for v in values])


def passes_of(meta: dict[str, Any], world: int = 1) -> int:
    """Network passes of all processes by a checkpoint's meta data; older ones say forward and backward of the first
    alone, of ``world``."""
    passes = meta["passes"]
    return sum(passes) * world if isinstance(passes, list) else passes


def learning_rate(settings: OptimizerSettings, done: int) -> float:
    """The rate of the next update after ``done`` of the same role: warm-up, then constant or linear decay.

    Warm-up is ``lr (done + 1) / warmup``: from ``lr / warmup`` at the first update to ``lr`` at update ``warmup``.
    diffusers' and transformers' schedulers are one update behind, with a rate of 0 at the first.
    The rate never falls below 1 % of ``lr``, so a run that is resumed past ``decay`` still moves.
    """
    rate = settings.lr
    if settings.warmup:
        rate *= min(1.0, (done + 1) / settings.warmup)
    if settings.decay:
        rate *= max(0.01, 1 - done / settings.decay)
    return rate


def _finite_mean(values: list[Tensor | float]) -> float | None:
    """The mean of the values that are finite, None where none is; how many were skipped is counted elsewhere."""
    whole = _stacked(values)
    mean = whole[whole.isfinite()].mean().item()
    return mean if math.isfinite(mean) else None


def _average(gradients: list[Tensor], world: int) -> None:
    """Mean over processes, as one message."""
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= world
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def _load_optimizer(optimizer: torch.optim.Optimizer, flat: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
