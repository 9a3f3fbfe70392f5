"""Exports: students as stock diffusers folders and LoRA files."""

from stepdistill.pipelines.export import export_student
from stepdistill.pipelines.merge import merge_students
from stepdistill.pipelines.schedulers import check_expressible, student_scheduler

__all__ = ["check_expressible", "export_student", "merge_students", "student_scheduler"]
