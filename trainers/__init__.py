"""The methods: one file each, all on the loop in ``base``."""

from stepdistill.trainers.loop.trainer import Trainer
from stepdistill.trainers.methods.boot import BOOT
from stepdistill.trainers.methods.disback import DisBack
from stepdistill.trainers.methods.dmd2 import DMD2
from stepdistill.trainers.methods.enhance import Enhance
from stepdistill.trainers.methods.feedback import Feedback
from stepdistill.trainers.methods.pso import PSO
from stepdistill.trainers.methods.regression import Regression
from stepdistill.trainers.methods.sim import SIM
from stepdistill.trainers.methods.swiftbrush import SwiftBrush
from stepdistill.trainers.methods.tscd import TSCD
from stepdistill.trainers.methods.tsm import TSM

METHODS: dict[str, type[Trainer]] = {
    method.name: method
    for method in (DMD2, SIM, SwiftBrush, DisBack, BOOT, TSCD, PSO, Feedback, Enhance, Regression, TSM)
}

__all__ = ["METHODS", "Trainer", *(method.__name__ for method in METHODS.values())]
