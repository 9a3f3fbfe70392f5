"""What a config file describes."""

from __future__ import annotations

from pathlib import Path

from stepdistill.config import apply_overrides, read_yaml
from stepdistill.errors import UserError

from .job import Job, make_job


def read_job(path: str | Path, overrides: list[str] | None = None) -> Job:
    """Read, merge, override and check a config file of one run.  Nothing is loaded.

    Raises:
        UserError: anything wrong with it, a recipe of stages, or several students.
    """
    raw = apply_overrides(read_yaml(path), overrides or [])
    if "msd" in raw:
        raise UserError(f"{path}: several students (msd); name the config, or the run folder, of one student")
    if "stages" in raw:
        raise UserError(f"{path}: a recipe of stages; name the config, or the run folder, of one stage")
    return make_job(raw, str(path))
