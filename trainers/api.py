"""The loop with one method, for programs.

::

    from stepdistill.trainers import DMD2Trainer

    trainer = DMD2Trainer({
        "teacher": {"path": "path/or/hub-id"},
        "data": {"prompts": "prompts.txt"},
        "output": "runs/mine",
        "train": {"updates": 1000, "batch_size": 4},
    })
    trainer.fit()
    trainer.export("student")       # a stock diffusers folder

The config's keys are those of the YAML files.  Several stages, several students, evaluation and reports are plans
(:mod:`stepdistill.trainers.plans`), which the command line runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from accelerate import Accelerator

from stepdistill.config import apply_overrides, read_yaml
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.pipelines.export import export_student
from stepdistill.run import RunFolder

from .loop.trainer import Trainer
from .methods.base import Method
from .methods.boot import BOOT
from .methods.diffinstruct import DiffInstruct
from .methods.disback import DisBack
from .methods.dmd2 import DMD2
from .methods.enhance import Enhance
from .methods.feedback import Feedback
from .methods.pso import PSO
from .methods.regression import Regression
from .methods.sim import SIM
from .methods.swiftbrush import SwiftBrush
from .methods.tscd import TSCD
from .methods.tsm import TSM
from .plans.build import make_accelerator, make_parts, provenance
from .plans.build import resume as resume_run
from .plans.job import make_job


class MethodTrainer(Trainer):
    """One run of a method, from a config.

    Args:
        config: a mapping, or the path of a YAML file; ``method`` may be left out.
        overrides: ``key=value`` strings, as on the command line.
        family: a teacher that is loaded already; the config's by default.
        writes: write checkpoints, rows of metrics and sample grids to the config's ``output``.
        resume: go on from the newest checkpoint there.

    Raises:
        UserError: the config names another method, is not right, or does not fit the teacher or the data; the output
            folder holds a run already, without ``resume``.
    """

    method_class: ClassVar[type[Method]]

    def __init__(
        self,
        config: Mapping[str, Any] | str | Path,
        overrides: Sequence[str] = (),
        *,
        family: Family | None = None,
        accelerator: Accelerator | None = None,
        writes: bool = True,
        resume: bool = False,
    ):
        raw = read_yaml(config) if isinstance(config, str | Path) else dict(config)
        raw = apply_overrides({"method": self.method_class.name, **raw}, list(overrides))
        if raw["method"] != self.method_class.name:
            raise UserError(f"method = {raw['method']}: {type(self).__name__} is for {self.method_class.name}")
        self.job = make_job(raw)
        accelerator = accelerator or make_accelerator()
        run = RunFolder(self.job.config.output) if writes else None
        exists = run is not None and run.check(self.job.config, resume)
        super().__init__(self.job.method, make_parts(self.job, accelerator, run, family), run, accelerator)
        self.use_attention()
        if run is not None and not exists and accelerator.is_main_process:
            run.create(self.job.config, self.job.config.seed, self.teacher_digests)
            self.job.method.make_record(self.job.config).save(run.path)
        accelerator.wait_for_everyone()
        if run is not None and exists:
            resume_run(self, run)

    def fit(self) -> None:
        """As :meth:`Trainer.fit`; no other process may write in the run's folder meanwhile."""
        run = self.run if self.accelerator.is_main_process else None
        with contextlib.nullcontext() if run is None else run.lock():
            super().fit()

    def export(self, folder: str | Path) -> Path:
        """Write the student as a stock diffusers folder, averaged if there is an average.

        Raises:
            UserError: it cannot be written, or the folder holds something else.
        """
        also_steps = self.config.sampler.also_steps
        with self.exported():
            facts = provenance(self.job, self)
            return export_student(
                self.family, self.roles.student, self.sampler, Path(folder), facts, also_steps=also_steps
            )


class DMD2Trainer(MethodTrainer):
    """Distribution matching with two time scales and an optional GAN loss (2405.14867)."""

    method_class = DMD2


class SIMTrainer(MethodTrainer):
    """Score implicit matching (2410.16794), and SiD (2404.04057)."""

    method_class = SIM


class SwiftBrushTrainer(MethodTrainer):
    """Variational score distillation with a LoRA fake score (2312.05239, 2408.14176, 2412.02687)."""

    method_class = SwiftBrush


class DiffInstructTrainer(MethodTrainer):
    """Integral KL divergence of the noised distributions (2305.18455)."""

    method_class = DiffInstruct


class DisBackTrainer(MethodTrainer):
    """Distribution backtracking around a score method (2408.15991)."""

    method_class = DisBack


class BOOTTrainer(MethodTrainer):
    """Bootstrapping along the teacher's ODE, without data (2306.05544)."""

    method_class = BOOT


class TSCDTrainer(MethodTrainer):
    """Trajectory-segmented consistency: Hyper-SD's stages (2404.13686); consistency, LCM and PCM as cases."""

    method_class = TSCD


class FeedbackTrainer(MethodTrainer):
    """Human feedback: rewards with hinges on the student's pictures (2404.13686)."""

    method_class = Feedback


class EnhanceTrainer(MethodTrainer):
    """One-step enhancement: DMD2 on the first step, with an MSE term and rewards (2404.13686)."""

    method_class = Enhance


class PSOTrainer(MethodTrainer):
    """Pairwise sample optimisation of a distilled model (2410.03190)."""

    method_class = PSO


class RegressionTrainer(MethodTrainer):
    """Regression on the teacher's noise-sample pairs (2311.18828)."""

    method_class = Regression


class TSMTrainer(MethodTrainer):
    """Teacher score matching, for a student smaller than its teacher (2410.23274)."""

    method_class = TSM
