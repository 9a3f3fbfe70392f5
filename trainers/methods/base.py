"""The contract between a paper's method and what runs it.

A method says what it needs (:class:`Needs`), is built from ready-made :class:`Parts`, and answers with losses.  It owns
no optimizer, loads nothing, writes nothing and knows no process: the loop (:mod:`stepdistill.trainers.loop.trainer`)
asks for :meth:`Method.phases`, sends each :class:`Term` backward and steps the optimizer that the method names.
"""

from __future__ import annotations

import abc
import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from stepdistill.config import Section
from stepdistill.data.images import ImageSet
from stepdistill.data.preference_pairs import PreferenceSettings
from stepdistill.data.streams import ConditionSource, PairSource, PreferenceSource, RealBatch, RealSource
from stepdistill.data.teacher_pairs import PairPlan
from stepdistill.denoiser import Condition
from stepdistill.digests import Digests
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.finiteness import Watch
from stepdistill.judges.clip import ClipScorer, ClipSettings
from stepdistill.judges.rewards import Reward, RewardSettings
from stepdistill.noise import Noise
from stepdistill.roles.recorded import NodeStore
from stepdistill.roles.role import Role
from stepdistill.roles.roles import Roles
from stepdistill.run_record import RunRecord
from stepdistill.sampler import FewStepSampler, few_step_times
from stepdistill.settings import RunSettings


class RunStopped(UserError):
    """Training cannot go on: too many updates that are not finite, or none that is; pictures that cannot be read.

    Args:
        role: whose predictions are to blame, where the loop can give advice.
    """

    def __init__(self, message: str, role: str | None = None):
        super().__init__(message)
        self.role = role


Losses = dict[str, tuple[float, Tensor]]
"""Weight and scalar loss by name."""
Observed = TypeVar("Observed", Tensor, list[Tensor])

CONDITIONS, REAL, DISCRIMINATOR, REWARD = "conditions", "real data", "discriminator", "reward "
"""What can be not finite besides the roles' predictions; the last stands before a reward's name."""


@dataclass(frozen=True)
class Batch:
    """One micro-batch of a student: conditions, unit noise (B, C, H, W), and the labels or prompts that the conditions
    are of ([] for none).  Methods that train on real samples add these, with their places in the data."""

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


@dataclass(frozen=True)
class Needs:
    """What a method's settings need besides a teacher and a student; the parts are made from it."""

    null_condition: bool = False
    images: bool = False
    """Real images."""
    divides_images: bool = True
    """Whether one of several students sees the real images of its own conditions alone."""
    pixels: bool = False
    """A decoder from latents to pictures, with a graph."""
    decoder: str | None = None
    """An AutoencoderTiny in place of the teacher's decoder."""
    rewards: tuple[RewardSettings, ...] = ()
    clip: ClipSettings | None = None
    perceptual: str | None = None
    lpips: bool = False
    negatives: Any = None
    """Settings with ``read()``, which gives negative prompts."""
    preferences: PreferenceSettings | None = None
    teacher_pairs: PairPlan | None = None
    """The teacher's noise-sample pairs."""


@dataclass(frozen=True)
class Term:
    """What the loop sends backward: a scalar, or a tensor with the gradient of the loss in it."""

    value: Tensor
    gradient: Tensor | None = None


Update = tuple[str, Iterable[Term]]
"""The optimizer's name, and a term for each micro-batch; their mean is the loss of one step."""


@dataclass(frozen=True)
class Passes:
    """Network passes, one picture each, backward counted in forwards.

    ``per_update``: of a student update, with all that goes with it, for each of its samples, on average.
    ``before``: of one process, before the first.  ``iterations``: of the loop, for each student update.
    """

    per_update: float
    before: int = 0
    iterations: int = 1


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Phase:
    """A part of a run: ``updates()`` is one iteration, until ``counter`` has counted ``count``.

    ``begin`` is called before it, and again when a run is resumed; ``finish`` after it, once its outcome is saved, and
    in the main process alone.
    """

    title: str
    counter: str
    count: int
    updates: Callable[[], Iterator[Update]]
    begin: Callable[[], None] = _nothing
    finish: Callable[[], None] = _nothing


class Journal:
    """Scalars for the next row of metrics, and the order in which things were seen that may be not finite."""

    def __init__(self, watch: Watch):
        self.watch = watch
        self.values: dict[str, list[Tensor | float]] = {}

    def log(self, name: str, value: Tensor | float) -> None:
        """Remember a scalar; it stays on its device until the row is written."""
        self.values.setdefault(name, []).append(value.detach() if isinstance(value, Tensor) else value)

    def observe(self, name: str, values: Observed) -> Observed:
        """``values`` (B, ...), or several, once it is remembered whether they are finite: of what is no role's."""
        for one in [values] if isinstance(values, Tensor) else values:
            self.watch.note(name, one)
        return values


class Shares:
    """Which positions of the seeded orders this process takes.

    Args:
        counters: positions that all processes have taken, by order; updates and iterations are counted there too.
    """

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world
        self.counters: dict[str, int] = {"iteration": 0, "conditions": 0, "real": 0}

    def take(self, order: str, count: int) -> int:
        """The first of the next ``count`` positions of this process."""
        start = self.counters[order] + self.rank * count
        self.counters[order] += count * self.world
        return start


@dataclass
class Parts:
    """What a method is built from, each made once (:mod:`stepdistill.trainers.plans.build`).

    ``sampler`` is the student's; the judges are there where the method's :class:`Needs` name them.
    """

    config: RunSettings
    family: Family
    roles: Roles
    sampler: FewStepSampler
    conditions: ConditionSource
    real: RealSource | None = None
    noise: Noise = None
    shares: Shares = field(default_factory=Shares)
    journal: Journal = None

    decode: Callable[[Tensor], Tensor] | None = None
    rewards: list[Reward] = field(default_factory=list)
    clip: ClipScorer | None = None
    perceptual: Any = None
    lpips: nn.Module | None = None
    negatives: ConditionSource | None = None
    preferences: PreferenceSource | None = None
    teacher_pairs: PairSource | None = None
    nodes: NodeStore = field(default_factory=NodeStore)
    teacher_digests: Digests = field(default_factory=dict)
    router: str | None = None
    """Of several students: the hash of what gave this one its conditions."""
    describe_data: Callable[[], list[str]] = list
    """What is trained on, a line each."""
    averaged: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    """The student as it is exported, within the block; the loop puts its average here."""

    def __post_init__(self) -> None:
        if self.noise is None:
            rank, world = self.shares.rank, self.shares.world
            self.noise = Noise(self.config.seed, self.family.device, rank, world)
        if self.journal is None:
            self.journal = Journal(self.roles.watch)

    def image_sets(self) -> list[tuple[str, ImageSet]]:
        """The pictures that are read while training, each set with the config's section that names it."""
        real = [] if self.real is None else [("data.images", self.real.images)]
        pairs = [] if self.preferences is None else [("pso.pairs", images) for images in self.preferences.images]
        return [*real, *pairs]


class Method(abc.ABC):
    """One method on ready-made parts.

    A method may override what stands here and no more.  Class methods answer from a config, before anything is loaded.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    Settings: ClassVar[type[Section]]
    has_fake_score: ClassVar[bool] = False
    defaults: ClassVar[dict[str, Any]] = {}
    """Raw config of other sections that the method starts from, e.g. its way to hold the roles; the file's own wins."""

    def __init__(self, parts: Parts):
        self.parts = parts
        self.config, self.family, self.roles, self.sampler = parts.config, parts.family, parts.roles, parts.sampler
        self.settings = self.settings_of(parts.config)
        self.networks: dict[str, nn.Module] = {}
        """Networks that are trained besides the roles."""
        self.frozen: dict[str, Role] = {}
        """Copies of roles that stay in checkpoints, by name."""
        self.memory: dict[str, Any] = {}
        """Facts that stay in checkpoints, as JSON."""

    # -- from a config -------------------------------------------------------------------------------------

    @classmethod
    def sections(cls, raw: dict[str, Any]) -> dict[str, type[Section]]:
        """The config's sections that this method reads, by name."""
        return {cls.name: cls.Settings}

    @classmethod
    def defaults_of(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """:attr:`defaults`, for a raw config."""
        return cls.defaults

    @classmethod
    def settings_of(cls, config: RunSettings) -> Section:
        """The section that :attr:`settings` is."""
        return getattr(config, cls.name)

    @classmethod
    def of(cls, config: RunSettings) -> type[Method]:
        """The class that answers for these settings: itself, or one of its variants."""
        return cls

    @classmethod
    def needs(cls, config: RunSettings) -> Needs:
        """What these settings need.

        Raises:
            UserError: settings that contradict each other, or other sections; one line that names the keys.
        """
        return Needs()

    @classmethod
    def check(cls, config: RunSettings, family: Family) -> list[str]:
        """Compare the settings with the teacher and the data that they name, before anything is written; what a user
        should know of the data, a line each.

        Raises:
            UserError: the teacher lacks something, or the data are not as they should be.
        """
        return []

    @classmethod
    def make_sampler(cls, config: RunSettings, family: Family) -> FewStepSampler:
        """The student's sampler on the teacher's schedule.

        Raises:
            UserError: steps or a start that the schedule does not have.
        """
        settings = config.sampler
        times = few_step_times(family.schedule, settings.steps, first_time(config, family))
        return FewStepSampler(family.schedule, times, settings.transition, settings.eta, settings.final)

    @classmethod
    @abc.abstractmethod
    def passes(cls, config: RunSettings) -> Passes:
        """Network passes of a student update for each of its samples, and those before the first."""

    @classmethod
    def describe(cls, config: RunSettings) -> list[str]:
        """What a run does besides the student updates, a line each, for ``--dry-run``."""
        return []

    @classmethod
    def make_record(cls, config: RunSettings) -> RunRecord:
        """What the run's evaluation has to know of the method."""
        scale = getattr(cls.settings_of(config), "guidance_scale", None)
        return RunRecord(guidance_scale=scale or 1.0)

    # -- the algorithm -------------------------------------------------------------------------------------

    def groups(self) -> dict[str, dict[str, nn.Parameter]]:
        """What each optimizer trains, by the optimizer's name and the parameter's."""
        return {
            "student": self.roles.student.parameters(),
            **{name: dict(module.named_parameters()) for name, module in self.networks.items()},
        }

    def phases(self) -> list[Phase]:
        """The parts of a run, in turn; the last one counts the student's updates."""
        return [Phase(self.name, "student", self.config.train.updates, self.updates)]

    @abc.abstractmethod
    def updates(self) -> Iterator[Update]:
        """One iteration: the updates of each optimizer in turn.

        The loop takes a step after the terms of an update are used up, so what follows a ``yield`` sees the weights
        that it left.
        """

    def next_batch(self) -> Batch:
        """The next conditions with fresh noise."""
        return self.next_conditions()

    def exported(self) -> contextlib.AbstractContextManager:
        """The student as it is exported, sampled and measured, besides its average."""
        return contextlib.nullcontext()

    # -- what methods share --------------------------------------------------------------------------------

    @property
    def noise(self) -> Noise:
        return self.parts.noise

    @property
    def counters(self) -> Mapping[str, int]:
        """Iterations, updates by optimizer, and positions of the orders, so far."""
        return self.parts.shares.counters

    def log(self, name: str, value: Tensor | float) -> None:
        self.parts.journal.log(name, value)

    def observe(self, name: str, values: Observed) -> Observed:
        return self.parts.journal.observe(name, values)

    def observe_condition(self, condition: Condition) -> None:
        for values in condition.values():
            self.observe(CONDITIONS, values)

    def next_conditions(self) -> Batch:
        """This process's next conditions with fresh noise."""
        count = self.config.train.batch_size
        condition, items = self.parts.conditions.batch(self.parts.shares.take("conditions", count), count)
        self.observe_condition(condition)
        return Batch(condition, self.noise.randn(count, *self.family.sample_shape), items)

    def next_real(self, count: int) -> RealBatch:
        """This process's next real samples (count, C, H, W), with their conditions."""
        real = self.parts.real.batch(self.parts.shares.take("real", count), count, self.noise.randn_like)
        self.observe(REAL, real.samples)
        return real

    def next_real_batch(self) -> Batch:
        """Fresh noise with this process's next real samples, their conditions and their labels or captions."""
        real = self.next_real(self.config.train.batch_size)
        self.observe_condition(real.condition)
        noise = self.noise.randn_like(real.samples)
        return Batch(real.condition, noise, real.items, real.samples, tuple(real.indices))

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

    def probe_features(self, features: Callable[[Tensor, Tensor, Condition], Any], t: Tensor) -> Any:
        """Features of one sample of zeros at ``t`` (1,), to size a discriminator by; not counted as a pass."""
        condition, _ = self.parts.conditions.batch(0, 1)
        probe = torch.zeros(1, *self.family.sample_shape, device=self.family.device)
        with torch.no_grad(), self.roles.meter.paused():
            return features(probe, t, condition)


class DirectMethod(Method):
    """A student with a loss of its own, with a graph through its output; one step an iteration."""

    @abc.abstractmethod
    def student_losses(self, batch: Batch) -> Losses:
        """The student's losses, with a graph to its parameters."""

    def updates(self) -> Iterator[Update]:
        yield "student", self.student_terms()
        yield from self.other_updates()

    def student_terms(self) -> Iterator[Term]:
        """A term for each micro-batch."""
        for _ in range(self.config.train.gradient_accumulation):
            yield Term(self.total("student", self.student_losses(self.next_batch())))

    def other_updates(self) -> Iterator[Update]:
        """What follows the student's step, e.g. a discriminator's."""
        return iter(())


def first_time(config: RunSettings, family: Family) -> float | None:
    """The first step's time as the config names it, None for the schedule's own."""
    settings = config.sampler
    if settings.init_sigma is None:
        return settings.start
    return family.schedule.at_noise_ratio(torch.tensor([settings.init_sigma])).item()


def planned_passes(method: type[Method], config: RunSettings) -> int:
    """Network passes of a whole run on one process, from its settings."""
    train, passes = config.train, method.passes(config)
    planned = passes.before + round(passes.per_update * train.updates * train.batch_size * train.gradient_accumulation)
    return planned if train.max_passes is None else min(planned, train.max_passes)


def planned_updates(method: type[Method], config: RunSettings, world: int = 1) -> int:
    """Student updates of a whole run on ``world`` processes: fewer than set where its passes end before."""
    train, passes = config.train, method.passes(config)
    if train.max_passes is None:
        return train.updates
    left = max(train.max_passes - passes.before, 1)
    update = passes.per_update * train.batch_size * world * train.gradient_accumulation
    return min(train.updates, math.ceil(left / update))
