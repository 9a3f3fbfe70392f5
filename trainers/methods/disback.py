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

import functools
import math
from dataclasses import asdict
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor
from tqdm import tqdm

from stepdistill.config import Section
from stepdistill.denoiser import Condition
from stepdistill.errors import UserError
from stepdistill.noise import Noise
from stepdistill.readers import digest_tensors
from stepdistill.roles.recorded import Node, NodeStore
from stepdistill.settings import RunSettings
from stepdistill.trainers.loop.causes import RunStopped
from stepdistill.trainers.loop.ranks import on_main
from stepdistill.trainers.loop.trainer import Batch, Trainer

from .dmd2 import DMD2
from .score import Scale, ScoreSettings, ScoreTrainer
from .sim import SIM
from .swiftbrush import SwiftBrush

PROBE_CHUNK = 8
"""Samples at a time, whatever the batch is, so that the probe does not depend on the number of processes."""
BASES: dict[str, type[ScoreTrainer]] = {method.name: method for method in (DMD2, SIM, SwiftBrush)}


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
        wanted = start + (last.loss - start) * k / count
        left = count - 1 - k  # that must still follow
        first = others.index(chosen[-1]) + 1 if chosen else 0
        open_ones = others[first : len(others) - left]
        chosen.append(min(open_ones, key=lambda node: abs(node.loss - wanted)))
    return [*chosen, last]


def target_index(student_updates: int, nodes: int, hold: int) -> int:
    """k of the target T_k at a student update: 1 first, N (the teacher) at last; 0 where there is no path."""
    return min(1 + student_updates // hold, nodes)


@functools.cache
def on(base: type[ScoreTrainer]) -> type[DisBack]:
    """DisBack around a score method."""
    return type(
        f"DisBack{base.__name__}", (DisBack, base), {"base": base, "defaults": base.defaults, "__module__": __name__}
    )


class DisBack(ScoreTrainer):
    name = "disback"
    title = "distribution backtracking: dmd2, sim or swiftbrush against a teacher that walks back (2408.15991)"
    Settings = DisBackSettings
    base: ClassVar[type[ScoreTrainer]]

    @classmethod
    def resolve(cls, raw: dict[str, Any]) -> type[Trainer]:
        own = raw.get("disback")
        name = own.get("base") if isinstance(own, dict) else None
        return on(BASES.get(name, DMD2) if isinstance(name, str) else DMD2)

    @classmethod
    def sections(cls) -> dict[str, type[Section]]:
        return {"disback": DisBackSettings, **cls.base.sections()}

    @classmethod
    def settings_of(cls, config: RunSettings) -> Section:
        return cls.base.settings_of(config)

    @classmethod
    def check(cls, config: RunSettings, settings: ScoreSettings) -> None:
        super().check(config, settings)
        own = config.disback
        if (own.nodes - 1) * own.hold >= config.train.updates:
            raise UserError(
                f"disback: {own.nodes} nodes held for {own.hold} updates reach the teacher after "
                f"{(own.nodes - 1) * own.hold}, but train.updates = {config.train.updates}; lower disback.hold"
            )

    @classmethod
    def passes_before(cls, config: RunSettings) -> int:
        own = config.disback
        return 4 * own.updates * config.train.batch_size * config.train.gradient_accumulation if own.nodes else 0

    @classmethod
    def plan(cls, config: RunSettings) -> list[str]:
        own = config.disback
        first = f"degradation: {own.updates} fake-score updates on the untouched student, {own.nodes} nodes kept"
        then = f"backtracking by {own.base}: each target for {own.hold} student updates, the teacher from update "
        return [first, then + str((own.nodes - 1) * own.hold)] if own.nodes else [f"no nodes: {own.base} as it is"]

    def build(self) -> None:
        super().build()
        self.disback: DisBackSettings = self.config.disback
        self.store = NodeStore(self.run.nodes if self.run else None)
        self.counters["recorded"] = 0
        self.candidates: list[Node] = []
        self.start_loss: float | None = None
        self.path: list[Node] | None = None
        self.target = 0
        self.own_teacher, self.node_teacher = self.roles.teacher, None
        if self.asks_null or (self.disback.nodes and self.disback.null_probability):
            self.family.null_condition(1)  # raises where the teacher has none

    # -- degradation ---------------------------------------------------------------------------------------

    def prepare(self) -> None:
        if self.disback.nodes == 0:
            return
        if self.path is not None:
            if not self.store.has_path:  # a run that was killed when it had saved the path
                self._keep_nodes()
            return
        self.probe = self._make_probe()
        if self.start_loss is None:
            self.start_loss = self.probe_loss()
        self.keep_after = set(candidate_updates(self.disback))
        self.repeat("degradation", "recorded", self.disback.updates, self.record, self._after_record)
        if self.counters["recorded"] < self.disback.updates:  # train.max_passes are spent
            return
        self.path = choose(self.candidates, self.start_loss, self.disback.nodes)
        self.save()  # before any node is deleted
        self._keep_nodes()

    def _keep_nodes(self) -> None:
        """Delete the nodes that are not of the path; the student is untouched still."""
        on_main(self.accelerator, lambda: self.store.keep(self.path, self._facts()))

    def record(self) -> None:
        """One update of the degradation: denoising on the untouched student's samples."""
        accumulation = self.config.train.gradient_accumulation
        for _ in range(accumulation):
            batch = self.next_batch()
            with torch.no_grad():
                x0 = self.make_sample(batch)
            loss = self.denoising(x0, batch.condition)
            self.log("loss/degradation", loss)
            (loss / accumulation).backward()
        self.update("fake_score")
        self.counters["recorded"] += 1
        if self.counters["recorded"] in self.keep_after:
            tensors = self.roles.fake_score.portable_state_dict()
            own = self.accelerator.is_main_process
            self.candidates.append(self.store.write(self.counters["recorded"], self.probe_loss(), tensors, own))

    def _after_record(self, bar: tqdm) -> None:
        if self.counters["recorded"] % self.config.train.log_every == 0:
            self.write_row(bar)

    @torch.no_grad()
    def _make_probe(self) -> list[tuple[Tensor, Condition, Tensor, Tensor]]:
        """Samples of the untouched student with conditions, times and noise that stay the same over the recording."""
        own, self.noise = self.noise, Noise(self.config.seed + 3, self.family.device)
        counters, parts = dict(self.counters), []
        for start in range(0, self.disback.probe, PROBE_CHUNK):
            count = min(PROBE_CHUNK, self.disback.probe - start)
            condition, items = self.conditions.batch(start, count)
            x0 = self.make_sample(Batch(condition, self.noise.randn(count, *self.family.sample_shape), items))
            parts.append((x0, condition, *self.fake_score_draw(x0)))
        self.noise = own
        self.counters.update(counters)
        return parts

    @torch.no_grad()
    def probe_loss(self) -> float:
        """The denoising loss on the probe.

        Raises:
            RunStopped: it is not finite, so nodes could not be chosen by it.
        """
        loss = float(torch.stack([self.denoising_at(*part) for part in self.probe]).mean())
        if not math.isfinite(loss):
            raise RunStopped(f"disback: the loss on its probe is not finite; {self.advice('fake_score')}")
        return loss

    def _facts(self) -> dict[str, Any]:
        return {
            "weights": "network" if self.roles.fake_score.adapter is None else "adapter",
            "kind": self.roles.fake_score.kind,
            "averaged": False,
            "teacher_loss": self.start_loss,
            "teacher_sha256": digest_tensors(self.family.network.state_dict()),
            "student_sha256": digest_tensors(self.roles.student.portable_state_dict()),
        }

    # -- backtracking --------------------------------------------------------------------------------------

    @property
    def recording(self) -> bool:
        return self.disback.nodes > 0 and self.path is None

    @property
    def loop_iterations(self) -> int:
        return self.counters["iteration"] - self.counters["recorded"]

    def iteration(self) -> None:
        if self.path:
            self.switch(target_index(self.counters["student"], self.disback.nodes, self.disback.hold))
            self.log("target", self.target)
        super().iteration()

    def switch(self, index: int) -> bool:
        """Make T_index the teacher that the base method asks; whether that was a change.

        Raises:
            UserError: the node's file is missing or damaged, or does not fit the network.
        """
        if index == self.target:
            return False
        self.target, back = index, self.disback.nodes - index  # T_index is s'_back
        if back == 0:
            self.roles.teacher, self.node_teacher = self.own_teacher, None
            return True
        if self.node_teacher is None:
            self.node_teacher = self.roles.frozen_like(self.roles.fake_score, "target")
        self.node_teacher.load_portable_state_dict(self.store.read(self.path[back - 1]))
        self.roles.teacher = self.node_teacher
        return True

    def teacher_scale(self, count: int) -> Scale:
        scales = self.disback.guidance_scales
        if scales is None or not 0 < self.target < self.disback.nodes:
            return super().teacher_scale(count)
        return scales[self.target - 1]

    @property
    def asks_null(self) -> bool:
        return super().asks_null or any(scale != 1 for scale in self.disback.guidance_scales or [])

    @property
    def null_probability(self) -> float:
        own = self.disback.null_probability
        return own if self.recording and own is not None else super().null_probability

    # -- checkpoints ---------------------------------------------------------------------------------------

    def state(self):
        tensors, meta = super().state()
        nodes = {"candidates": self.candidates, "path": self.path}
        return tensors, {
            **meta,
            "start_loss": self.start_loss,
            **{name: None if own is None else [asdict(node) for node in own] for name, own in nodes.items()},
        }

    def restore(self, tensors, meta, where: str) -> None:
        super().restore(tensors, meta, where)
        self.start_loss = meta["start_loss"]
        self.candidates = [Node(**node) for node in meta["candidates"]]
        self.path = None if meta["path"] is None else [Node(**node) for node in meta["path"]]
