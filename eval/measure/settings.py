"""The settings of a measurement: what is measured, and how."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from stepdistill.config import Section, UserPath
from stepdistill.judges.clip import ClipSettings
from stepdistill.judges.rewards import RewardSettings
from stepdistill.seeds import SEEDS, Seed
from stepdistill.settings import ImagesSettings, PromptColumnSettings


class Protocol(Section):
    """What is measured, and how.  Numbers of two protocols do not compare."""

    samples: int = Field(5000, ge=2, le=10**7, description="pictures drawn from each target")
    batch_size: int = Field(250, ge=1, le=65_536, description="pictures at a time; a part of the protocol, as noise is")
    seed: Seed = 0
    seeds: int = Field(
        1, ge=1, le=1000, description="repeats, with seed, seed + 1, ...; means and standard deviations of them"
    )
    extractor: UserPath = Field(
        "fashion_mnist",
        description="an asset's name, a file, inception, inception_tensorflow, dinov2:PATH, module:attribute",
    )
    reference: UserPath | None = Field(
        None,
        description="reference statistics, or with resize a folder of pictures; None: next to the extractor's file",
    )
    reference_files: Literal["shown", "stored"] = Field(
        "shown",
        description="a reference folder's pictures: as a viewer shows them (EXIF orientation, white under "
        "transparency), or the stored pixels, as clean-fid's and DMD2's code reads them",
    )
    drawn_side: int | None = Field(None, ge=1, le=65_536, description="refuse pictures that are not drawn at this side")
    quantise: Literal["round", "floor"] = Field("round", description="pixels to bytes")
    resize: int | None = Field(
        None, ge=1, le=8192, description="centre crop and PIL's Lanczos filter to this side before the extractor"
    )
    clip_resize: int | None = Field(None, ge=1, le=8192, description="the same before the CLIP model")
    kid: bool = Field(True, description="the kernel distance too, where the reference keeps features")
    kid_subsets: int = Field(100, ge=1, le=100_000)
    kid_subset_size: int = Field(1000, ge=2, le=10**6)
    precision_recall: bool = Field(False, description="improved precision and recall too")
    neighbours: int = Field(3, ge=1, le=1000, description="their k")
    diversity: bool = Field(False, description="the mean distance of pictures of one condition too")
    clip: ClipSettings | None = Field(None, description="the CLIP score too (prompt pipelines)")
    rewards: list[RewardSettings] = Field([], description="means of these over the pictures too")
    labels: Literal["uniform"] | list[int] = Field(
        "uniform", description="which labels, taken in turn: all of them, or the ones named"
    )
    prompts: UserPath | None = Field(
        None, description="a file or folder as a run's data.prompts, taken in turn; of several captions the first"
    )
    prompt_column: str | None = Field(None, description="its column; by default the first of text, prompt, caption")
    prompt_dataset: PromptColumnSettings | None = Field(None, description="a dataset's column in place of a file")
    prompt_images: ImagesSettings | None = Field(None, description="the captions of pictures in place of a file")
    distinct_prompts: bool = Field(False, description="refuse fewer prompts than samples")
    preset: str | None = Field(None, description="the preset that these settings are, and what differs from it")
    latency: bool = Field(False, description="time single calls, with the share of each part")
    latency_batch: int = Field(1, ge=1, le=65_536)
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="what the pipelines are loaded in")

    @field_validator("labels")
    @classmethod
    def _names_a_label(cls, labels: Literal["uniform"] | list[int]) -> Literal["uniform"] | list[int]:
        if labels == []:
            raise ValueError("names no label; leave it out for all of them")
        return labels

    @model_validator(mode="after")
    def _last_seed_is_in_range(self) -> Protocol:
        if self.seed + self.seeds > SEEDS:
            raise ValueError(f"seed = {self.seed}: the last of {self.seeds} seeds is above {SEEDS - 1:,}; take a lower")
        return self

    def list_seeds(self) -> list[int]:
        """The seeds of the repeats."""
        return list(range(self.seed, self.seed + self.seeds))
