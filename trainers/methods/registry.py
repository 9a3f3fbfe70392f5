"""The methods by name."""

from .base import Method
from .boot import BOOT
from .diffinstruct import DiffInstruct
from .disback import DisBack
from .dmd2 import DMD2
from .enhance import Enhance
from .feedback import Feedback
from .pso import PSO
from .regression import Regression
from .sim import SIM
from .swiftbrush import SwiftBrush
from .tscd import TSCD
from .tsm import TSM

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (DMD2, SIM, SwiftBrush, DiffInstruct, DisBack, BOOT, TSCD, PSO, Feedback, Enhance, Regression, TSM)
}
