"""The config of a distillation run, section by section.  A method adds its own section under its own name."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator

from stepdistill.attention.kernels import AUTO, BACKENDS, NATIVE
from stepdistill.data.picture_settings import PictureSettings
from stepdistill.roles.settings import RolesSettings

from .config import Section, UserPath
from .sampler import Final, Transition
from .seeds import RunSeed, Seed


class TeacherSettings(Section):
    path: UserPath = Field(description="a diffusers folder, a hub id (owner/name), or asset:NAME for a shipped one")
    family: str = Field("auto", description="auto reads it off the folder")
    revision: str | None = Field(None, description="of a hub id: a branch, tag or commit")
    variant: str | None = Field(None, description="of the weights, e.g. fp16 for *.fp16.safetensors; the plain ones")
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="of the frozen weights")
    null_label: int | None = Field(
        None,
        ge=0,
        description="which label stands for no class (1000 of ImageNet's 1001); by default as its folder says",
    )
    steps: int = Field(25, ge=1, le=10_000, description="the teacher's full number of steps, for grids and evaluation")


class ImagesSettings(PictureSettings):
    """Real images, from one of four places."""

    folder: UserPath | None = None
    npz: UserPath | None = Field(
        None, description="'images' uint8 (N, H, W[, C]) and 'labels', integers or captions; asset:NAME is allowed"
    )
    dataset: UserPath | None = Field(None, description="a Hugging Face dataset: a save_to_disk folder or a hub id")
    split: str = "train"
    revision: str | None = None
    image_column: str = "image"
    label_column: str | None = Field(
        None, description="class labels, numbers or names: the dataset's column, or that of a folder's metadata.jsonl"
    )
    caption_column: str | None = Field(
        None, description="captions, or lists of them to draw from; of a folder's metadata: text, prompt or caption"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        sources = [key for key in ("folder", "npz", "dataset") if getattr(self, key) is not None]
        if len(sources) != 1:
            raise ValueError(f"set exactly one of folder, npz, dataset (set: {', '.join(sources) or 'none'})")
        if self.label_column is not None and self.caption_column is not None:
            raise ValueError("set label_column or caption_column, not both: a teacher takes labels or captions")
        return self


class PromptColumnSettings(Section):
    name: UserPath = Field(description="a save_to_disk folder or a hub id")
    column: str | None = Field(
        None, description="texts, or lists of them to draw from; by default the first of text, prompt, caption"
    )
    split: str = "train"
    revision: str | None = None


class PartSettings(Section):
    """One of several students: it trains on the conditions that the router gives it."""

    router: UserPath = Field(description="the router's file (stepdistill.data.router)")
    student: int = Field(ge=0, le=999)


class DataSettings(Section):
    """Conditions, and real images for the methods that want them."""

    labels: Literal["all"] | list[int] = Field("all", description="for class-conditional teachers")
    prompts: UserPath | None = Field(
        None,
        description="a .txt file, one prompt a line; a column of a .csv, .tsv, .jsonl, .json or .parquet file; a "
        "folder of pictures with captions, or of save_to_disk; asset:NAME is allowed",
    )
    prompt_column: str | None = Field(
        None, description="the column of prompts; by default the first of text, prompt, caption that it has"
    )
    prompt_dataset: PromptColumnSettings | None = None
    prompts_from_images: bool = Field(False, description="the prompts are the captions of images")
    shown: list[str] = Field([], description="the prompts of a run's pictures; by default the first of its prompts")
    images: ImagesSettings | None = None
    part: PartSettings | None = Field(None, description="set for each student by msd; not by hand")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if self.prompts is not None and self.prompt_dataset is not None:
            raise ValueError("set prompts or prompt_dataset, not both")
        if self.prompt_column is not None and self.prompts is None:
            raise ValueError("prompt_column names a column of the file prompts; set that, or remove it")
        if self.prompts_from_images and (self.prompts is not None or self.prompt_dataset is not None):
            raise ValueError("prompts_from_images: the prompts are named already; remove one of them")
        if self.prompts_from_images and self.images is None:
            raise ValueError("prompts_from_images: there are no images; set images")
        if self.labels != "all" and not self.labels:
            raise ValueError("labels is empty; name some or say all")
        return self


class SamplerSettings(Section):
    """How the student is called."""

    steps: int = Field(1, ge=1, le=64, description="the student's steps")
    start: float | None = Field(None, description="the first step's time; the schedule's last by default (SDXL: 399)")
    init_sigma: float | None = Field(
        None, gt=0, description="the first step's time named by its sigma/alpha in place of start (SIM: 2.5)"
    )
    transition: Transition = Field(
        "renoise",
        description="between steps: fresh noise (LCM), the student's own ODE (DDIM, Euler), tcd or ancestral between",
    )
    eta: float = Field(0.3, ge=0, le=1, description="of tcd (its gamma): 0 is the ODE, 1 fresh noise")
    final: Final = Field(
        "clean", description="where the last ode step ends: at x0, or at timestep 0, where PCM's lowest phase ends"
    )
    also_steps: list[int] = Field([], description="other numbers of steps it is meant for; divisors of steps")

    @model_validator(mode="after")
    def _one_start(self) -> Self:
        if self.start is not None and self.init_sigma is not None:
            raise ValueError("set start or init_sigma, not both: they name the same time")
        if odd := [n for n in self.also_steps if n < 1 or self.steps % n or n == self.steps]:
            raise ValueError(f"also_steps: {odd[0]} is not a smaller divisor of steps = {self.steps}")
        return self


Beta = Annotated[float, Field(ge=0, lt=1)]
"""A decay of Adam's averages."""
Steps = Annotated[int, Field(ge=1, le=10_000)]
"""A number of sampling steps."""


class OptimizerSettings(Section):
    """AdamW of one role."""

    lr: float = Field(1e-5, gt=0)
    betas: tuple[Beta, Beta] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    warmup: int = Field(0, ge=0, le=10**9, description="linear, over the updates of this role; starts at lr / warmup")
    decay: int = Field(
        0, ge=0, le=10**9, description="then linearly towards 0 at this many of its updates; 0 is constant"
    )
    clip: float = Field(10.0, gt=0, description="the gradient norm is clipped to this")


class OptimizersSettings(Section):
    student: OptimizerSettings = OptimizerSettings()
    fake_score: OptimizerSettings = OptimizerSettings()
    discriminator: OptimizerSettings = OptimizerSettings()


class TrainSettings(Section):
    updates: int = Field(ge=1, le=10**9, description="student updates in all")
    batch_size: int = Field(ge=1, le=65_536, description="samples a process and micro-batch")
    gradient_accumulation: int = Field(1, ge=1, le=65_536)
    precision: Literal["float32", "bf16"] = Field("float32", description="of the networks; masters are float32")
    attention: str = Field(
        NATIVE,
        description="native: SDPA, torch's own choice of kernel; auto: the fastest exact one, timed; or one of "
        "diffusers' backends (_native_cudnn, flash, xformers, ...)",
    )
    gradient_checkpointing: bool = False
    ema_decay: float = Field(0.0, ge=0, lt=1, description="of the student's weights, per update; 0 is none")
    max_minutes: float | None = Field(None, gt=0, description="save and stop after this time")
    max_passes: int | None = Field(
        None, ge=1, description="end the training, short of updates, after so many network passes (one picture each)"
    )
    non_finite_limit: int = Field(
        10,
        ge=1,
        le=10**9,
        description="stop after this many skipped updates of a role in a row; or in all, where what is not finite is "
        "frozen (the teacher) and more than 1 % are skipped",
    )
    log_every: int = Field(10, ge=1, le=10**9, description="student updates between rows of metrics")
    sample_every: int = Field(100, ge=1, le=10**9, description="student updates between sample grids")
    sample_count: int = Field(40, ge=1, le=256)
    checkpoint_every: int = Field(100, ge=1, le=10**9, description="student updates between checkpoints")
    keep_checkpoints: int = Field(2, ge=1, le=10**6)
    trackers: list[Literal["tensorboard", "wandb", "trackio"]] = ["tensorboard"]

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The number format that networks compute in; None is float32."""
        return torch.bfloat16 if self.precision == "bf16" else None

    @field_validator("attention")
    @classmethod
    def _known(cls, value: str) -> str:
        if value not in (AUTO, *BACKENDS):
            raise ValueError(f"{value} is unknown; use auto or one of {', '.join(sorted(BACKENDS))}")
        return value


class JudgeSettings(Section):
    """What is measured once the student is exported."""

    enabled: bool = True
    samples: int = Field(5000, ge=2, le=10**7)
    batch_size: int = Field(250, ge=1, le=65_536)
    seed: Seed = 1234
    extractor: UserPath | None = Field(None, description="feature network: asset:NAME, a file, or inception")
    reference: UserPath | None = Field(None, description="reference statistics: asset:NAME or a file")
    teacher_steps: list[Steps] = Field([], description="more numbers of steps at which the teacher is measured")
    teacher_guidance_scale: float | None = Field(None, ge=0)
    latency: bool = True
    stages: bool = Field(False, description="of a recipe: the student of every stage too")


class RunSettings(Section):
    """Everything but the method's own section."""

    method: str
    output: UserPath = Field(description="the run folder")
    seed: RunSeed = 0
    teacher: TeacherSettings
    data: DataSettings = DataSettings()
    roles: RolesSettings = RolesSettings()
    sampler: SamplerSettings = SamplerSettings()
    optimizer: OptimizersSettings = OptimizersSettings()
    train: TrainSettings
    evaluation: JudgeSettings = JudgeSettings()
