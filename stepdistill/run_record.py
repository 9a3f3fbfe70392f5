"""``record.json`` of a run's folder: what an evaluation and a report need to know, so that they know no method."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from . import files
from .config import Section, check
from .errors import UserError, reading
from .judges.rewards import RewardSettings
from .plain_files import read_json

FILE = "record.json"


class PartRecord(Section):
    """One of the runs that a whole is made of: a stage, or one of several students."""

    name: str = Field(description="what a page calls it")
    folder: str = Field(description="of its run, below the whole's")
    method: str
    undivided: bool = Field(True, description="its student draws every condition, so it can be measured as the whole's")

    @field_validator("folder")
    @classmethod
    def _is_below(cls, folder: str) -> str:
        if Path(folder).is_absolute() or ".." in Path(folder).parts:
            raise ValueError(f"{folder} is outside of the run's folder")
        return folder


class RunRecord(Section):
    """What a run's method says of its teacher, and the runs that it is made of."""

    guidance_scale: float = Field(1.0, ge=0, description="of the teacher that the student was distilled to be")
    baseline: Literal["teacher", "untuned"] = Field(
        "teacher",
        description="what the student is compared with: a teacher of many steps, or a few-step model that it was tuned "
        "from, which is called as the student is",
    )
    rewards: list[RewardSettings] = Field([], description="measured too")
    parts: list[PartRecord] = Field([], max_length=10_000, description="in the order of their training")

    def save(self, run: Path) -> None:
        """Write it into a run's folder.

        Raises:
            UserError: it cannot be written.
        """
        files.write_json(run / FILE, self.model_dump(mode="json"))

    @classmethod
    def load(cls, run: Path) -> RunRecord:
        """The record in a run's folder.

        Raises:
            UserError: there is none, or it is damaged.
        """
        path = run / FILE
        remedy = "go on with the run by stepdistill distill CONFIG --resume, which writes it"
        if not path.exists():
            raise UserError(f"{path}: is missing, and says how the run is measured; {remedy}")
        with reading(path, remedy, "damaged"):
            raw = read_json(path)
        return check(cls, raw, str(path))
