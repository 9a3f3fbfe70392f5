"""DisBack, distribution backtracking (2408.15991): a teacher that changes over time, on any score method.

Two stages in one run.  *Degradation*: a copy of the teacher, which is the fake score itself, is trained by denoising
on samples of the untouched student; its weights on the way are the nodes s'_1 .. s'_N, and s'_0 is the teacher.
*Backtracking*: the base method (``disback.base``: dmd2, sim or swiftbrush, with its own section) runs as it is, its
fake score starting from s'_N, while the teacher that it asks is T_1 = s'_(N-1), T_2 = s'_(N-2), ... T_N = s'_0, each
for ``hold`` student updates and the last one to the end.  No nodes is the base method, bit for bit.

The nodes are targets, not scores of a distribution: each noise level degrades at its own speed, and early weights
differ most; ``spacing: loss`` picks nodes at equal steps of the denoising loss on a fixed probe.  With an exact teacher
the walk brings no speed-up (it only delays); what it can mend is a teacher that is wrong far from its data.

The paper's N, schedule and base per dataset could not be verified.  Its released code is not followed: there the nodes
never load (a non-strict load under other names), the walk ends before the teacher, the fake score starts elsewhere, and
degradation starts from a finished student with the GAN loss on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from stepdistill.config import Section
from stepdistill.denoiser import Condition
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.noise import Noise
from stepdistill.readers import digest_tensors
from stepdistill.roles.recorded import Node
from stepdistill.run_record import RunRecord
from stepdistill.sampler import FewStepSampler
from stepdistill.settings import RunSettings

from .base import Batch, Method, Needs, Parts, Passes, Phase, RunStopped, Term, Update
from .dmd2 import DMD2
from .score import ScoreMethod
from .sim import SIM
from .swiftbrush import SwiftBrush
from .teachers import AskedTeacher

PROBE_CHUNK = 8
"""Samples at a time, whatever the batch is, so that the probe does not depend on the number of processes."""
BASES: dict[str, type[ScoreMethod]] = {method.name: method for method in (DMD2, SIM, SwiftBrush)}


class DisBackSettings(Section):
    base: Literal["dmd2", "sim", "swiftbrush"] = Field("dmd2", description="the score method that walks the path")
    nodes: int = Field(5, ge=0, le=10_000, description="N, recorded weights; 0 is the base method")
    updates: int = Field(
        100, ge=1, le=10**9, description="of the degradation: 1 to 5 percent of the run's fake-score updates"
    )
    hold: int = Field(100, ge=1, le=10**9, description="student updates for each target")
    spacing: Literal["updates", "loss"] = Field("loss", description="nodes at equal steps of the one or the other")
    candidates: int = Field(
        4, ge=1, le=100, description="weights kept for each node until the loss-spaced ones are chosen"
    )
    probe: int = Field(256, ge=1, le=65_536, description="samples of the fixed batch that the loss is measured on")
    null_probability: float | None = Field(None, ge=0, lt=1, description="in the degradation; the base's by default")
    guidance_scales: list[float] | None = Field(
        None, description="of T_1 .. T_(N-1); the base's own by default, and always for the teacher itself"
    )

    @model_validator(mode="after")
    def _consistent(self):
        if self.guidance_scales is not None and len(self.guidance_scales) != max(0, self.nodes - 1):
            raise ValueError(f"guidance_scales has {len(self.guidance_scales)} numbers for {self.nodes - 1} targets")
        if any(scale < 0 for scale in self.guidance_scales or []):
            raise ValueError("guidance_scales: a scale is below 0")
        if self.nodes > self.updates:
            raise ValueError(f"nodes = {self.nodes}: more than the updates = {self.updates} that they are taken from")
        return self


def candidate_updates(settings: DisBackSettings) -> list[int]:
    """After which updates of the degradation weights are kept, ascending, the last one included.

    Equal steps for ``updates``; for ``loss`` at least one a node, denser early, where the weights move most.
    """
    total, count = settings.updates, settings.nodes
    even = {round(total * k / count) for k in range(1, count + 1)}
    if settings.spacing == "updates":
        return sorted(even)
    more = count * settings.candidates
    return sorted(even | {max(1, round(total ** (k / more))) for k in range(1, more + 1)})


def choose(candidates: list[Node], start: float, count: int) -> list[Node]:
    """``count`` of the candidates at about equal steps of loss from ``start`` (the teacher's); always the last one."""
    *others, last = candidates
    chosen: list[Node] = []
    for k in range(1, count):
        level = start + (last.loss - start) * k / count
        left = count - 1 - k  # that must still follow
        first = others.index(chosen[-1]) + 1 if chosen else 0
        open_ones = others[first : len(others) - left]
        chosen.append(min(open_ones, key=lambda node: abs(node.loss - level)))
    return [*chosen, last]


def target_index(student_updates: int, nodes: int, hold: int) -> int:
    """k of the target T_k at a student update: 1 first, N (the teacher) at last; 0 where there is no path."""
    return min(1 + student_updates // hold, nodes)


class Walk:
    """The teacher of each student update: the recorded nodes backwards, T_1 = s'_(N-1) first, the teacher at last."""

    def __init__(self, parts: Parts, settings: DisBackSettings):
        self.parts, self.settings = parts, settings
        self.teacher = AskedTeacher()
        self.index, self.node_teacher = 0, None

    def move_to(self, index: int, path: list[Node]) -> bool:
        """Make T_index the teacher that the base method uses; whether that was a change.

        Raises:
            UserError: the node's file is missing or damaged, or does not fit the network.
        """
        if index == self.index:
            return False
        roles, scales = self.parts.roles, self.settings.guidance_scales
        self.index, back = index, self.settings.nodes - index  # T_index is s'_back
        if back == 0:
            self.teacher.denoiser = self.teacher.guidance_scale = self.node_teacher = None
            return True
        if self.node_teacher is None:
            self.node_teacher = roles.frozen_like(roles.fake_score, "target")
        self.node_teacher.load_portable_state_dict(self.parts.nodes.read(path[back - 1]))
        self.teacher.denoiser = self.node_teacher
        self.teacher.guidance_scale = None if scales is None else scales[index - 1]
        return True


def _base_in(raw: dict[str, Any]) -> type[ScoreMethod]:
    """The base method that a raw config names; DMD2 where it names none, or what is none."""
    section = raw.get("disback")
    name = section.get("base") if isinstance(section, dict) else None
    return BASES.get(name, DMD2) if isinstance(name, str) else DMD2


@dataclass(frozen=True)
class Probe:
    """Samples (B, ...) with conditions, times (B,) and noise (B, ...) that stay the same over the recording."""

    x0: Tensor
    condition: Condition
    t: Tensor
    eps: Tensor


class DisBack(Method):
    """A score method around which the teacher walks; degradation makes the path first."""

    name = "disback"
    title = "distribution backtracking: dmd2, sim or swiftbrush against a teacher that walks back (2408.15991)"
    Settings = DisBackSettings
    settings: DisBackSettings
    has_fake_score = True

    def __init__(self, parts: Parts):
        super().__init__(parts)
        self.store = parts.nodes
        self.walk = Walk(parts, self.settings)
        self.base = BASES[self.settings.base](parts, self.walk.teacher)
        self.networks, self.frozen = self.base.networks, self.base.frozen
        self.memory = {"start_loss": None, "candidates": [], "path": None}
        parts.shares.counters["recorded"] = 0
        self.probe: list[Probe] = []

    # -- from a config -------------------------------------------------------------------------------------

    @classmethod
    def base_of(cls, config: RunSettings) -> type[ScoreMethod]:
        return BASES[config.disback.base]

    @classmethod
    def sections(cls, raw: dict[str, Any]) -> dict[str, type[Section]]:
        return {"disback": DisBackSettings, **_base_in(raw).sections(raw)}

    @classmethod
    def defaults_of(cls, raw: dict[str, Any]) -> dict[str, Any]:
        return _base_in(raw).defaults

    @classmethod
    def needs(cls, config: RunSettings) -> Needs:
        needs, settings = cls.base_of(config).needs(config), config.disback
        first = (settings.nodes - 1) * settings.hold
        if first >= config.train.updates:
            raise UserError(
                f"disback: {settings.nodes} nodes held for {settings.hold} updates reach the teacher after "
                f"{first}, but train.updates = {config.train.updates}; lower disback.hold"
            )
        guided = any(scale != 1 for scale in settings.guidance_scales or [])
        null = guided or (settings.nodes > 0 and bool(settings.null_probability))
        return replace(needs, null_condition=needs.null_condition or null)

    @classmethod
    def check(cls, config: RunSettings, family: Family) -> list[str]:
        return cls.base_of(config).check(config, family)

    @classmethod
    def make_sampler(cls, config: RunSettings, family: Family) -> FewStepSampler:
        return cls.base_of(config).make_sampler(config, family)

    @classmethod
    def passes(cls, config: RunSettings) -> Passes:
        """Those of the base method, and the degradation's before them."""
        settings, train = config.disback, config.train
        recorded = 4 * settings.updates * train.batch_size * train.gradient_accumulation if settings.nodes else 0
        return replace(cls.base_of(config).passes(config), before=recorded)

    @classmethod
    def describe(cls, config: RunSettings) -> list[str]:
        settings = config.disback
        if not settings.nodes:
            return [f"no nodes: {settings.base} as it is"]
        return [
            f"degradation: {settings.updates} fake-score updates on the untouched student, {settings.nodes} nodes kept",
            f"backtracking by {settings.base}: each target for {settings.hold} student updates, the teacher from "
            f"update {(settings.nodes - 1) * settings.hold}",
        ]

    @classmethod
    def make_record(cls, config: RunSettings) -> RunRecord:
        return cls.base_of(config).make_record(config)

    # -- a run ---------------------------------------------------------------------------------------------

    def groups(self) -> dict[str, dict[str, nn.Parameter]]:
        return self.base.groups()

    def next_batch(self) -> Batch:
        return self.base.next_batch()

    def exported(self) -> AbstractContextManager:
        return self.base.exported()

    def phases(self) -> list[Phase]:
        degradation = Phase(
            "degradation", "recorded", self.settings.updates, self.record, self.begin_recording, self.keep_path
        )
        return ([degradation] if self.settings.nodes else []) + super().phases()

    @property
    def path(self) -> list[Node] | None:
        """The chosen nodes s'_1 .. s'_N; None before the degradation's end."""
        nodes = self.memory["path"]
        return None if nodes is None else [Node(**node) for node in nodes]

    # -- degradation ---------------------------------------------------------------------------------------

    def begin_recording(self) -> None:
        if self.path is not None:
            return
        self.probe = self._make_probe()
        if self.memory["start_loss"] is None:
            self.memory["start_loss"] = self.probe_loss()
        self.keep_after = set(candidate_updates(self.settings))

    def record(self) -> Iterator[Update]:
        """One update of the degradation: denoising on the untouched student's samples; the path after the last one."""
        counters, settings = self.parts.shares.counters, self.settings
        yield "fake_score", self.record_terms()
        counters["recorded"] += 1
        if counters["recorded"] in self.keep_after:
            tensors = self.roles.fake_score.portable_state_dict()
            loss = self.probe_loss()
            node = self.store.write(counters["recorded"], loss, tensors)
            self.memory["candidates"].append(asdict(node))
        if counters["recorded"] == settings.updates:
            candidates = [Node(**node) for node in self.memory["candidates"]]
            path = choose(candidates, self.memory["start_loss"], settings.nodes)
            self.memory["path"] = [asdict(node) for node in path]

    def record_terms(self) -> Iterator[Term]:
        probability = self.settings.null_probability
        for _ in range(self.config.train.gradient_accumulation):
            with torch.no_grad():
                batch = self.base.next_batch()
                x0 = self.base.make_sample(batch)
            loss = self.base.denoising(x0, batch.condition, probability)
            self.log("loss/degradation", loss)
            yield Term(loss)

    def keep_path(self) -> None:
        """Delete the nodes that are not of the path; the student is untouched still."""
        if not self.store.has_path:
            self.store.keep(self.path, self._facts())

    @torch.no_grad()
    def _make_probe(self) -> list[Probe]:
        """Samples of the untouched student, by noise that the run does not draw from."""
        base, probe = copy.copy(self.base), []
        noise, shares = Noise(self.config.seed + 3, self.family.device), copy.deepcopy(self.parts.shares)
        base.parts = replace(self.parts, noise=noise, shares=shares)
        for start in range(0, self.settings.probe, PROBE_CHUNK):
            count = min(PROBE_CHUNK, self.settings.probe - start)
            condition, items = self.parts.conditions.batch(start, count)
            batch = base.prepare(Batch(condition, base.noise.randn(count, *self.family.sample_shape), items))
            x0 = base.make_sample(batch)
            probe.append(Probe(x0, batch.condition, *base.fake_score_draw(x0)))
        return probe

    @torch.no_grad()
    def probe_loss(self) -> float:
        """The denoising loss on the probe.

        Raises:
            RunStopped: it is not finite, so nodes could not be chosen by it.
        """
        losses = [self.base.denoising_at(one.x0, one.condition, one.t, one.eps) for one in self.probe]
        loss = float(torch.stack(losses).mean())
        if not math.isfinite(loss):
            raise RunStopped("disback: the loss on its probe is not finite", "fake_score")
        return loss

    def _facts(self) -> dict[str, Any]:
        fake_score = self.roles.fake_score
        return {
            "weights": "network" if fake_score.adapter is None else "adapter",
            "kind": fake_score.kind,
            "averaged": False,
            "teacher_loss": self.memory["start_loss"],
            "teacher_sha256": digest_tensors(self.family.network.state_dict()),
            "student_sha256": digest_tensors(self.roles.student.portable_state_dict()),
        }

    # -- backtracking --------------------------------------------------------------------------------------

    def updates(self) -> Iterator[Update]:
        path = self.path
        if path:
            target = target_index(self.counters["student"], self.settings.nodes, self.settings.hold)
            self.walk.move_to(target, path)
            self.log("target", target)
        yield from self.base.updates_of(self.counters["iteration"] - self.counters["recorded"])
