"""The distance of a student to the data over its training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from stepdistill import assets
from stepdistill.data.pixels import unit_to_bytes
from stepdistill.errors import UserError
from stepdistill.eval.extractors.load import load_extractor
from stepdistill.eval.measure.draws import step_generator, unit_noise
from stepdistill.eval.measure.reference_statistics import ReferenceStatistics
from stepdistill.eval.show.curves import CURVE, read_curve, write_curve
from stepdistill.finiteness import is_finite
from stepdistill.run import RunFolder
from stepdistill.settings import JudgeSettings
from stepdistill.trainers.loop.trainer import Trainer


def curve_protocol(settings: JudgeSettings, samples: int, extractor: str, reference: str) -> dict[str, Any]:
    """What the points of two curves must share to be drawn together; extractor and reference by their hashes."""
    return {
        "samples": samples,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "extractor": extractor[:12],
        "reference": reference[:12],
    }


class DistanceCurve:
    """Measures a trainer's student each time that one more step of passes is done; the curve is a file of the run.

    The measurement is that of ``stepdistill evaluate``: the same noise, labels and number of samples, the averaged
    student.
    """

    def __init__(self, trainer: Trainer, every: float, samples: int, run: RunFolder):
        self.every, self.samples, self.file = every, samples, run.path / CURVE
        evaluation = trainer.config.evaluation
        self.batch, self.seed = evaluation.batch_size, evaluation.seed
        if evaluation.extractor is None or evaluation.reference is None:
            raise UserError("set evaluation.extractor and evaluation.reference; the distance needs them")
        self.extractor = load_extractor(evaluation.extractor, trainer.family.device)
        self.reference = ReferenceStatistics.load(assets.resolve(evaluation.reference))
        self.reference.check(self.extractor, trainer.family.image_shape)
        self.protocol = curve_protocol(evaluation, samples, self.extractor.fingerprint, self.reference.fingerprint)
        self.points = [point for point in read_curve(self.file, self.protocol) if point[0] <= trainer.passes]
        trainer.watchers.append(self)

    def __call__(self, trainer: Trainer) -> None:
        """Measure, if a point is due."""
        last = self.points[-1][0] if self.points else -1
        ended = trainer.spent() and trainer.passes > last
        if trainer.passes // self.every > last // self.every or ended:
            self.points.append((trainer.passes, self.measure(trainer)))
            write_curve(self.file, self.points, self.protocol)

    @torch.no_grad()
    def measure(self, trainer: Trainer) -> float:
        """The Fréchet distance of the averaged student's samples.

        Raises:
            UserError: its pictures are not finite.
        """
        starts = range(0, self.samples, self.batch)
        with trainer.roles.meter.paused(), trainer.exported():
            features = [self._features(trainer, batch, start) for batch, start in enumerate(starts)]
        return self.reference.frechet(torch.cat(features))

    def _features(self, trainer: Trainer, batch: int, start: int) -> torch.Tensor:
        """The features (B, F) of one batch of samples, those from number ``start``."""
        family, items = trainer.family, trainer.parts.conditions.items
        count = min(self.batch, self.samples - start)
        noise = unit_noise(self.seed, batch, count, family.sample_shape).to(family.device)
        condition = {}
        if items:
            condition = family.encode_conditions([items[i % len(items)] for i in range(start, start + count)])
        draw = _drawn_by(step_generator(self.seed, batch))
        pixels = family.decode(trainer.sampler.sample(trainer.roles.student, noise, condition, draw))
        if not is_finite(pixels):
            raise UserError(f"the student's pictures are not finite after {trainer.passes:,} network passes")
        return self.extractor(unit_to_bytes((pixels + 1) / 2))


def _drawn_by(generator: torch.Generator) -> Callable[[torch.Tensor], torch.Tensor]:
    """Noise like a tensor, drawn on the CPU."""
    return lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype).to(like.device)
