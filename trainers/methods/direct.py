"""The loop of methods whose student has a loss of its own: a graph through its output, one step an iteration."""

from __future__ import annotations

import abc

from stepdistill.trainers.loop.trainer import Batch, Losses, Trainer


class DirectTrainer(Trainer):
    """Student alone; what else a method trains it updates in :meth:`after_student`."""

    @abc.abstractmethod
    def student_losses(self, batch: Batch) -> Losses:
        """The student's losses, with a graph to its parameters."""

    def after_student(self) -> None:
        """What follows the student's update, e.g. a discriminator's."""

    def iteration(self) -> None:
        accumulation = self.config.train.gradient_accumulation
        for _ in range(accumulation):
            losses = self.student_losses(self.next_batch())
            (self.total("student", losses) / accumulation).backward()
        self.update("student")
        self.after_student()

    def next_real_batch(self) -> Batch:
        """Fresh noise with this process's next real samples, their conditions and their labels or captions."""
        real = self.next_real_images(self.config.train.batch_size)
        self.note_conditions(real.condition)
        noise = self.noise.randn_like(real.samples)
        return Batch(real.condition, noise, real.items, real.samples, tuple(real.indices))
