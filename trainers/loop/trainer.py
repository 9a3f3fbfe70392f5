"""The loop: it asks a method for updates, takes the optimizers' steps, and keeps count.  No method's name, no model's.

``Trainer(method, parts)`` runs a :class:`stepdistill.trainers.methods.base.Method` on its parts.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor
from tqdm import tqdm

from stepdistill import checkpoint
from stepdistill.attention.choice import choose_fastest, require_backend
from stepdistill.attention.kernels import AUTO
from stepdistill.attention.modules import set_backend
from stepdistill.data.images import ImageSet
from stepdistill.errors import UserError
from stepdistill.finiteness import NotFinite
from stepdistill.roles.ema import EMA
from stepdistill.run import RunFolder
from stepdistill.trainers.methods.base import Method, Parts, Phase, RunStopped, Update, planned_updates

from . import snapshot
from .causes import GRADIENT, advice, lines, too_many
from .optimizers import Optimizers
from .ranks import on_main
from .recorder import Recorder
from .stopping import Interrupted, Stopping


class Trainer:
    """One distillation run.

    Args:
        method: the class of the method; one of its variants may answer for the settings.
        parts: what the method is built from.
        run: where to write; None writes nothing (tests, benchmarks).

    Attributes:
        counters: iterations, updates by optimizer, and positions in the orders of the data.
        trained: parameters by optimizer and name.
        watchers: called with the trainer after each student update.
    """

    def __init__(
        self,
        method: type[Method],
        parts: Parts,
        run: RunFolder | None = None,
        accelerator: Accelerator | None = None,
    ):
        self.parts, self.run = parts, run
        self.config, self.family, self.roles, self.sampler = parts.config, parts.family, parts.roles, parts.sampler
        self.noise, self.counters = parts.noise, parts.shares.counters
        self.accelerator = accelerator or Accelerator(cpu=self.family.device.type == "cpu")
        self.world = self.accelerator.num_processes
        self.teacher_digests = parts.teacher_digests
        self.attention: str | None = None  # the kernel that the networks use, once it is chosen
        self.seconds = 0.0
        self.passes_before_resume = 0  # of all processes, however many they were then
        self._seconds_before, self._started = 0.0, time.monotonic()
        self.method = method.of(self.config)(parts)
        self.trained = self.method.groups()
        self.counters |= dict.fromkeys(self.trained, 0)
        self.skipped = dict.fromkeys(self.trained, 0)
        self.skipped_in_a_row = dict.fromkeys(self.trained, 0)
        self.not_finite: dict[str, int] = {}  # skipped updates by what was not finite, "gradient" where all else was
        self.optimizers = Optimizers(self.trained, self.config.optimizer, self.world)
        self.ema = EMA(self.roles.student, self.config.train.ema_decay) if self.config.train.ema_decay else None
        parts.averaged = self.exported
        self.watchers: list[Callable[[Trainer], None]] = []
        self.recorder = Recorder(self)
        self.stopping = Stopping(self.config.train.max_minutes)
        self._unreadable = 0  # pictures that all processes know not to be readable

    @property
    def name(self) -> str:
        return self.method.name

    def use_attention(self) -> None:
        """Compute attention in every network as ``train.attention`` says.

        Raises:
            UserError: a backend that does not run here.
        """
        backend, device = self.config.train.attention, self.family.device
        dtype = self.roles.autocast_dtype or torch.float32
        require_backend(backend, "train.attention", device, dtype, gradients=True, networks=self.roles.networks())
        self.attention = backend
        if backend == AUTO:
            self.attention, _ = choose_fastest(self.roles.student.network, device, dtype, gradients=True)
            (self.attention,) = broadcast_object_list([self.attention])  # timings differ, processes must not
        for network in self.roles.networks():
            set_backend(network, self.attention)

    # -- the loop ------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train until ``train.updates`` student updates or ``train.max_passes`` are done; saves at the end.

        Raises:
            Interrupted: SIGTERM, Ctrl-C or ``train.max_minutes``; saved before.
            RunStopped: non-finite gradients in a row; more pictures than tolerated cannot be read, saved before.
        """
        self._seconds_before, self._started = self.seconds, time.monotonic() - self.seconds
        with self.stopping.signals():
            self.recorder.failure = None
            if self.counters["student"] % self.config.train.sample_every == 0 and not self.recorder.has_samples():
                self.recorder.save_samples()
            self.recorder.write_rows()
            on_main(self.accelerator, lambda: self.recorder.raise_failure(""))  # all else of the run is saved
            try:
                self._run_phases()
            except RunStopped as error:
                raise RunStopped(f"{error}; {self.advice(error.role)}" if error.role else str(error)) from None
            on_main(self.accelerator, lambda: self.recorder.raise_failure(self._where_saved()))

    def _run_phases(self) -> None:
        *earlier, last = self.method.phases()
        for phase in earlier:
            phase.begin()
            if self.counters[phase.counter] < phase.count:
                self.repeat(phase, self._after_earlier)
                if self.counters[phase.counter] < phase.count:  # train.max_passes are spent
                    break
                self.save()
            on_main(self.accelerator, phase.finish)
        last.begin()
        planned = planned_updates(type(self.method), self.config, self.world)
        self.repeat(last, self._after_update, planned)
        self.save()

    def begin(self) -> None:
        """Run what comes before the first student update, without saving it: for measurements."""
        *earlier, last = self.method.phases()
        for phase in earlier:
            phase.begin()
            self.repeat(phase, self._after_earlier)
            phase.finish()
        last.begin()

    def iteration(self) -> None:
        """One iteration of the last phase, which updates the student."""
        self._iterate(self.method.phases()[-1].updates())

    def _iterate(self, updates: Iterator[Update]) -> None:
        for update in updates:
            self.take(update)
        self.counters["iteration"] += 1

    def take(self, update: Update) -> bool:
        """Send an update's terms backward and take the optimizer's step; whether it was taken.

        Raises:
            RunStopped: too many skipped.
        """
        name, terms = update
        accumulation = self.config.train.gradient_accumulation
        for term in terms:
            if term.gradient is None:
                (term.value / accumulation).backward()
            else:
                term.value.backward(term.gradient / accumulation)
        return self.step(name)

    def step(self, name: str) -> bool:
        """One step of an optimizer from the gradients that have gathered; whether it was taken.

        Gradients are averaged over processes, the norm is clipped, a non-finite norm is counted and the step skipped.

        Raises:
            RunStopped: too many skipped.
        """
        norm = self.optimizers.step(name, self.counters[name])
        if norm is None:
            self._count_skipped(name)
            return False
        self.counters[name] += 1
        self.skipped_in_a_row[name] = 0
        self.method.log(f"grad_norm/{name}", norm)
        if name == "student" and self.ema is not None:
            self.ema.update()
        return True

    def repeat(self, phase: Phase, after: Callable[[tqdm, str], None], planned: int | None = None) -> None:
        """Iterate until the phase's counter is at its count: bar, stopping.

        Args:
            after: called with the bar and the counter's name when an iteration has moved it.
            planned: what the bar goes to, where the passes are known to end before the phase's count.
        """
        main, counter, total = self.accelerator.is_main_process, phase.counter, phase.count
        done, moved = self.counters[counter], True  # a spent budget ends the loop where the counter has just moved
        with tqdm(total=planned or total, initial=done, desc=phase.title, unit="update", disable=not main) as bar:
            while self.counters[counter] < total and not (self.spent() and moved):
                self.roles.watch.clear()
                self._iterate(phase.updates())
                self.seconds = time.monotonic() - self._started
                if moved := self.counters[counter] > done:
                    done = self.counters[counter]
                    bar.update(1)
                    after(bar, counter)
                self._maybe_stop()

    def _after_earlier(self, bar: tqdm, counter: str) -> None:
        if self.counters[counter] % self.config.train.log_every == 0:
            self.recorder.write_row(bar)

    def _after_update(self, bar: tqdm, counter: str) -> None:
        train, done = self.config.train, self.counters[counter]
        for watch in self.watchers:
            watch(self)
        if done % train.log_every == 0:
            self.recorder.write_row(bar)
        if done % train.sample_every == 0 or done == train.updates or self.spent():
            self.recorder.save_samples()
        if done % train.checkpoint_every == 0 and done < train.updates:
            self.save()

    @property
    def passes(self) -> int:
        """Network passes so far, of all processes: one picture each, backward counted in forwards."""
        return self.passes_before_resume + self.roles.meter.total * self.world

    def spent(self) -> bool:
        """Whether ``train.max_passes`` is reached."""
        limit = self.config.train.max_passes
        return limit is not None and self.passes >= limit

    @contextlib.contextmanager
    def exported(self, average: bool = True) -> Iterator[None]:
        """The student as it is exported and sampled within the block: averaged, if there is an average."""
        with contextlib.ExitStack() as stack:
            if average and self.ema is not None:
                stack.enter_context(self.ema.applied())
            stack.enter_context(self.method.exported())
            yield

    # -- updates that were skipped -------------------------------------------------------------------------

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
        return {role.name for role in self.roles.trained()} | set(self.method.networks)

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

    # -- stopping ------------------------------------------------------------------------------------------

    def _maybe_stop(self) -> None:
        over = self.counters["student"] >= self.config.train.updates or self.spent()
        requested = self.stopping.requested(self.seconds - self._seconds_before)
        stop = (requested and not over) or self.recorder.failure is not None
        sets = self.parts.image_sets()
        if self.world > 1:
            unreadable = sum(len(images.unreadable) for _, images in sets)
            flags = torch.tensor([float(stop), float(unreadable)], device=self.family.device)
            torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
            stop = bool(flags[0])
            if flags[1] > self._unreadable:
                self._share_unreadable()
        if stop:
            self.save()
            on_main(self.accelerator, lambda: self.recorder.raise_failure(self._where_saved()))
            raise Interrupted(*(self.stopping.reason or ("another process was stopped", 1)))
        for key, images in sets:
            if images.too_many_unreadable and not over:
                self._stop_for(key, images)

    def _share_unreadable(self) -> None:
        """Every process knows which pictures the others could not read."""
        sets = self.parts.image_sets()
        for unreadable in gather_object([[images.unreadable for _, images in sets]]):
            for (_, images), indices in zip(sets, unreadable, strict=True):
                images.unreadable |= indices
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

    # -- checkpoints ---------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
        """Everything needed to go on: groups of tensors, and a JSON object."""
        return snapshot.take(self)

    def restore(self, tensors: dict[str, dict[str, Tensor]], meta: dict[str, Any], where: str) -> None:
        """Go on from :meth:`state`.

        Raises:
            UserError: the checkpoint is of another method or teacher, or does not fit the networks.
        """
        snapshot.restore(self, tensors, meta, where)

    def save(self) -> None:
        """Write a checkpoint (the main process) and wait for it (the others).

        Raises:
            UserError: it cannot be written.
        """
        run = self.run
        if run is None:
            return

        def write() -> None:
            tensors, meta = self.state()
            step, failure = self.counters["iteration"], self.recorder.failure
            try:
                checkpoint.save(run.checkpoints, step, tensors, meta, self.config.train.keep_checkpoints)
            except UserError as error:
                raise UserError(str(error) if failure is None else f"{failure}; {error}") from None

        on_main(self.accelerator, write)
