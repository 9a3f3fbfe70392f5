"""Students as stock diffusers folders and LoRA files; any pipeline made faster, or given negative prompts."""

from .acceleration import Acceleration, accelerate
from .export import export_student
from .merge import merge_students
from .msd import MSDPipeline, export_students
from .negative_prompts import NegativePrompts

__all__ = [
    "Acceleration",
    "MSDPipeline",
    "NegativePrompts",
    "accelerate",
    "export_student",
    "export_students",
    "merge_students",
]
