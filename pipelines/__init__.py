"""Students as stock diffusers folders and LoRA files; any pipeline made faster, or given negative prompts."""

from stepdistill.pipelines.export import export_student
from stepdistill.pipelines.merge import merge_students
from stepdistill.pipelines.msd import MSDPipeline, export_students
from stepdistill.pipelines.negative import NegativePrompts
from stepdistill.pipelines.schedulers import check_expressible, student_scheduler
from stepdistill.pipelines.speed import Acceleration, accelerate

__all__ = [
    "Acceleration",
    "MSDPipeline",
    "NegativePrompts",
    "accelerate",
    "check_expressible",
    "export_student",
    "export_students",
    "merge_students",
    "student_scheduler",
]
