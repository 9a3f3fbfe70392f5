"""What a run has before its trainer: the teacher and the sampler, each made once."""

from __future__ import annotations

from dataclasses import dataclass

from stepdistill.families.base import Family
from stepdistill.sampler import FewStepSampler

from .build import check_judge, check_named, check_teacher_steps, load_teacher
from .job import Job


@dataclass(frozen=True)
class Prepared:
    """A job with its teacher and its student's sampler."""

    job: Job
    family: Family
    sampler: FewStepSampler


def prepare(job: Job) -> Prepared:
    """Load the teacher, make the sampler, and refuse what could not be trained, exported or measured in the end.

    Raises:
        UserError: it names the key and the remedy.
    """
    family = load_teacher(job.config)
    sampler = job.method.make_sampler(job.config, family)
    family.student_scheduler(sampler)
    check_teacher_steps(job, family)
    check_named(job, family)
    check_judge(job.config, family)
    return Prepared(job, family, sampler)
