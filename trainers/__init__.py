"""The methods: one file each, all on the loop in ``base``."""

from stepdistill.trainers.base import Trainer
from stepdistill.trainers.disback import DisBack
from stepdistill.trainers.dmd2 import DMD2
from stepdistill.trainers.sim import SIM
from stepdistill.trainers.swiftbrush import SwiftBrush

METHODS: dict[str, type[Trainer]] = {method.name: method for method in (DMD2, SIM, SwiftBrush, DisBack)}

__all__ = ["DMD2", "METHODS", "SIM", "DisBack", "SwiftBrush", "Trainer"]
