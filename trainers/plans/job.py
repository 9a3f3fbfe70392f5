"""A job: the checked config of one training run, with its method.  Nothing is loaded to make one."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import create_model

from stepdistill.config import Section, check, merge
from stepdistill.errors import UserError
from stepdistill.settings import RunSettings
from stepdistill.trainers.methods.base import Method, Needs, planned_passes
from stepdistill.trainers.methods.registry import METHODS


@dataclass(frozen=True)
class Job:
    """A checked config with its method.

    Attributes:
        needs: what the settings need, of the config as it was checked; a rehearsal's config lacks the students that
            earlier stages have still to make.
        sections: the config's sections that the method reads.
        unused: sections of other methods that the file also holds.
        cache: where latents are stored, ``cache`` in the run folder by default.
    """

    config: RunSettings
    method: type[Method]
    needs: Needs
    sections: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    cache: Path | None = None

    @property
    def settings(self) -> Section:
        return self.method.settings_of(self.config)

    @property
    def planned_passes(self) -> int:
        """Network passes of the whole run on one process."""
        return planned_passes(self.method, self.config)


def make_job(raw: dict[str, Any], where: str = "config") -> Job:
    """Check the raw config of one run.  Sections of other methods are checked and set aside.

    Raises:
        UserError: one line that names the key, its value and what is allowed.
    """
    if "method" not in raw:
        raise UserError(f"{where}: key 'method' is missing; methods are {', '.join(METHODS)}")
    name = raw["method"]
    if not isinstance(name, str) or name not in METHODS:
        raise UserError(f"{where}: method = {name!r}: unknown; methods are {', '.join(METHODS)}")
    method = METHODS[name]
    sections = method.sections(raw)
    unused = tuple(other for other in METHODS if other not in sections and other in raw)
    for other in unused:
        check(METHODS[other].Settings, raw[other] or {}, f"{where}: {other}")
    fields: dict[str, Any] = {section: (settings, settings()) for section, settings in sections.items()}
    model = create_model(f"{method.__name__}Config", __base__=RunSettings, **fields)
    used = {key: value for key, value in raw.items() if key not in unused}
    config = check(model, merge(method.defaults_of(raw), used), where)
    job = Job(config, method, method.needs(config), tuple(sections), unused)
    _check_combinations(job)
    return job


def _check_combinations(job: Job) -> None:
    """Refuse keys that do not go together, and trackers that are not installed."""
    config, evaluation = job.config, job.config.evaluation
    if config.roles.weights == "mixed" and not job.method.has_fake_score:
        raise UserError(f"roles.weights = mixed: {job.method.name} has no fake score; use full or shared")
    if (evaluation.extractor is None) != (evaluation.reference is None):
        raise UserError("evaluation: extractor and reference go together; set both or neither")
    if config.teacher.dtype != "float32" and config.train.precision == "float32":
        raise UserError(
            f"teacher.dtype = {config.teacher.dtype} needs train.precision=bf16: a float32 run keeps a float32 teacher"
        )
    for tracker in config.train.trackers:
        if importlib.util.find_spec(tracker) is None:
            raise UserError(f"train.trackers: the package {tracker} is not installed: pip install {tracker}")
