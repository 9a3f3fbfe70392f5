"""The methods: one file each, all on the loop in ``base``."""

from stepdistill.trainers.base import Trainer
from stepdistill.trainers.boot import BOOT
from stepdistill.trainers.disback import DisBack
from stepdistill.trainers.dmd2 import DMD2
from stepdistill.trainers.enhance import Enhance
from stepdistill.trainers.feedback import Feedback
from stepdistill.trainers.pso import PSO
from stepdistill.trainers.regression import Regression
from stepdistill.trainers.sim import SIM
from stepdistill.trainers.swiftbrush import SwiftBrush
from stepdistill.trainers.tscd import TSCD
from stepdistill.trainers.tsm import TSM

METHODS: dict[str, type[Trainer]] = {
    method.name: method
    for method in (DMD2, SIM, SwiftBrush, DisBack, BOOT, TSCD, PSO, Feedback, Enhance, Regression, TSM)
}

__all__ = ["METHODS", "Trainer", *(method.__name__ for method in METHODS.values())]
