"""Distillation: a method answers (``methods``), a loop asks (``loop``), a plan decides (``plans``).

``DMD2Trainer({...}).fit()`` is the loop with that method, for programs; see :mod:`stepdistill.trainers.api`.
"""

from .api import (
    BOOTTrainer,
    DiffInstructTrainer,
    DisBackTrainer,
    DMD2Trainer,
    EnhanceTrainer,
    FeedbackTrainer,
    MethodTrainer,
    PSOTrainer,
    RegressionTrainer,
    SIMTrainer,
    SwiftBrushTrainer,
    TSCDTrainer,
    TSMTrainer,
)

__all__ = [
    "BOOTTrainer",
    "DMD2Trainer",
    "DiffInstructTrainer",
    "DisBackTrainer",
    "EnhanceTrainer",
    "FeedbackTrainer",
    "MethodTrainer",
    "PSOTrainer",
    "RegressionTrainer",
    "SIMTrainer",
    "SwiftBrushTrainer",
    "TSCDTrainer",
    "TSMTrainer",
]
