"""The methods: one file each, all on the loop in ``base``."""

from stepdistill.trainers.base import Trainer
from stepdistill.trainers.dmd2 import DMD2

METHODS: dict[str, type[Trainer]] = {method.name: method for method in (DMD2,)}

__all__ = ["DMD2", "METHODS", "Trainer"]
