"""The config of a comparison."""

from __future__ import annotations

from typing import Self

from pydantic import Field, field_validator, model_validator

from stepdistill.config import Section, UserPath
from stepdistill.errors import show_value
from stepdistill.judges.clip import ClipSettings
from stepdistill.seeds import RunSeed

from .compared import ComparedRunSettings

FILES = {"compare.json", "compare.png", "evaluation.json", "grid.png", "report.html", "table.md", "teacher.json"}
"""What a comparison writes next to its runs' folders."""


class ComparisonSettings(Section):
    """What is compared, and at which cost."""

    output: UserPath = Field(description="the folder of the runs, the picture and the table")
    runs: dict[str, UserPath | ComparedRunSettings] = Field(
        min_length=1,
        description="name to config, relative to this file, or to a section (stepdistill.trainers.plans.compared)",
    )
    overrides: list[str] = Field([], description="key=value for every run")
    seeds: list[RunSeed] = Field(
        [], max_length=1000, description="each run at each of these; the configs' own seed by default"
    )
    passes: int = Field(ge=1, description="network passes of every run")
    points: int = Field(12, ge=1, le=100_000, description="measurements over training, at equal steps of passes")
    samples: int = Field(5000, ge=2, le=10**7, description="of each measurement")
    final_samples: int = Field(10000, ge=2, le=10**7, description="of the finished students and the teacher")
    precision_recall: bool = Field(False, description="of the finished students too")
    diversity: bool = Field(False, description="of the finished students too")
    clip: ClipSettings | None = Field(None, description="how well their pictures fit their prompts too")

    @field_validator("runs")
    @classmethod
    def _names_are_folders(
        cls, runs: dict[str, UserPath | ComparedRunSettings]
    ) -> dict[str, UserPath | ComparedRunSettings]:
        for name in runs:
            if not name.isprintable() or set(name) & set("/\\") or name != name.strip(" .") or not 0 < len(name) <= 100:
                raise ValueError(
                    f"{show_value(name)} cannot be the name of a run's folder; use 1 to 100 characters without slashes "
                    "that neither start nor end with a dot or a space"
                )
            if name.lower() in FILES:
                raise ValueError(f"{name!r} is a file of the comparison; give the run another name")
        return runs

    @model_validator(mode="after")
    def _seeds_differ(self) -> Self:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: one is named twice")
        return self

    def columns(self) -> list[float]:
        """The passes, of those where curves are measured, that a table of them shows."""
        points = {max(1, round(self.points * share)) for share in (0.125, 0.25, 0.5, 0.75, 1.0)}
        return [self.passes * point / self.points for point in sorted(points)]
