"""Exports: students as stock diffusers folders and LoRA files."""

from stepdistill.pipelines.export import export_student
from stepdistill.pipelines.schedulers import check_expressible, student_scheduler

__all__ = ["check_expressible", "export_student", "student_scheduler"]
