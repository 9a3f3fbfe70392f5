"""Exports: students as stock diffusers folders and LoRA files."""

from stepdistill.pipelines.export import export_student
from stepdistill.pipelines.merge import merge_students
from stepdistill.pipelines.msd import MSDPipeline, export_students
from stepdistill.pipelines.schedulers import check_expressible, student_scheduler

__all__ = [
    "MSDPipeline",
    "check_expressible",
    "export_student",
    "export_students",
    "merge_students",
    "student_scheduler",
]
