"""Distillation: a method answers (``methods``), a loop asks (``loop``), a plan decides (``plans``)."""

from .methods.base import Method
from .methods.boot import BOOT
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

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (DMD2, SIM, SwiftBrush, DisBack, BOOT, TSCD, PSO, Feedback, Enhance, Regression, TSM)
}

__all__ = ["METHODS", "Method", *(method.__name__ for method in METHODS.values())]
