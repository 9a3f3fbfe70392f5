"""A stock diffusers folder, called in one way whatever its pipeline class.

Nothing of ours takes part in the drawing: what is measured is what a user of plain diffusers gets.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn

from stepdistill import assets
from stepdistill.conditions import ConditionKind, label_ranges
from stepdistill.errors import UserError, reading
from stepdistill.families import calls_of
from stepdistill.finiteness import is_finite
from stepdistill.pipelines.msd import MSDPipeline, is_msd_folder
from stepdistill.stock.folders import hub_folder
from stepdistill.stock.loading import load_pipeline


class StockPipeline:
    """A loaded pipeline with what evaluation must know of it.

    Attributes:
        pipeline: the diffusers pipeline, or several students' (``MSDPipeline``).
        first: the pipeline itself, or the first student's.
        calls: how that is called.
        path: where it came from.
        provenance: the ``_stepdistill`` mapping of its scheduler's config, {} for a folder that is not ours.
        null_label: the label that stands for no class, as ``null_label`` or else its network's config says; None: none.
    """

    def __init__(self, pipeline: DiffusionPipeline | MSDPipeline, path: str, null_label: int | None = None):
        self.path = path
        if isinstance(pipeline, MSDPipeline):
            self.calls = calls_of(pipeline.student(0))
            self.pipeline = pipeline
        else:
            self.calls = calls_of(pipeline).with_noise()
            self.pipeline = self.calls.pipeline
        self.pipeline.set_progress_bar_config(disable=True)
        self.first = self.calls.pipeline
        if not {"latents", "num_inference_steps"} <= self.calls.arguments_known:
            raise UserError(
                f"{path}: {type(pipeline).__name__} cannot be given its noise or its number of steps, so it "
                "cannot be compared; use a pipeline that takes latents= and num_inference_steps="
            )
        self.provenance: dict = dict(self.first.scheduler.config.get("_stepdistill") or {})
        self.null_label = self.calls.null_label if null_label is None else null_label

    @classmethod
    def load(
        cls,
        path: str | Path,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        null_label: int | None = None,
        variant: str | None = None,
    ) -> StockPipeline:
        """``DiffusionPipeline.from_pretrained`` on a folder of this machine (or ``asset:NAME``); no downloads.

        Every part is loaded, and computes, in ``dtype``, whatever the folder's weights are stored in.

        Args:
            variant: of the weights (``fp16``); the plain ones by default, or the only ones that there are.

        Raises:
            UserError: no such folder, not a diffusers folder, or one that diffusers cannot load.
        """
        folder = pipeline_folder(path)
        if is_msd_folder(folder):
            with _quiet():
                return cls(MSDPipeline.from_pretrained(folder, dtype, device), str(path))
        with _quiet():
            pipeline = load_pipeline(folder, f"pipeline {path}", "export it again", dtype, variant)
        return cls(pipeline.to(device), str(path), null_label)

    # -- what it is ----------------------------------------------------------------------------------------

    @property
    def denoiser(self) -> ModelMixin:
        """The network that is called at every step; of several students the first's."""
        return self.calls.network

    @property
    def denoisers(self) -> list[nn.Module]:
        """The same of every student."""
        if isinstance(self.pipeline, MSDPipeline):
            return [calls_of(self.pipeline.student(k)).network for k in range(self.pipeline.students)]
        return [self.denoiser]

    @property
    def condition_kind(self) -> ConditionKind:
        return self.calls.condition_kind

    @property
    def num_labels(self) -> int:
        """How many classes can be drawn; 0 without labels."""
        return len(self.labels)

    @property
    def labels(self) -> list[int]:
        """The labels that can be drawn, ascending: all but the null one; of several students those that they divide."""
        if self.condition_kind == "label" and isinstance(self.pipeline, MSDPipeline):
            return self.pipeline.router.labels
        return self.calls.labels(self.null_label)

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """The shape of one sample's noise: (C, H, W) of pixels, or of latents where there is a VAE."""
        return self.calls.noise_shape

    @property
    def default_steps(self) -> int | None:
        """The steps that its maker says, None where nobody says."""
        return self.provenance.get("steps")

    @property
    def default_guidance(self) -> float | None:
        """The guidance scale that its maker says, None where nobody says."""
        return (self.provenance.get("call") or {}).get("guidance_scale")

    @property
    def device(self) -> torch.device:
        return next(self.denoiser.parameters()).device

    # -- drawing -------------------------------------------------------------------------------------------

    def generate(
        self,
        conditions: list | None,
        noise: Tensor,
        steps: int,
        generator: torch.Generator | None = None,
        guidance_scale: float | None = None,
        **further: Any,
    ) -> Tensor:
        """Draw pictures.

        Args:
            conditions: B labels or B prompts, None for an unconditional pipeline.
            noise: (B, ...) unit normal, of the shape that :attr:`noise_shape` says; the pipeline scales it by its
                scheduler's ``init_noise_sigma``.
            steps: ``num_inference_steps``.
            generator: for what the scheduler draws between steps.
            guidance_scale: passed on where the call has it; None leaves the pipeline's own default.
            further: other arguments of the pipeline's call.

        Returns:
            Pixels (B, C, H, W), float32, in [0, 1].

        Raises:
            UserError: noise or conditions that do not fit this pipeline, guidance that it does not have, a number of
                steps that its scheduler refuses, or pixels that are not numbers.
        """
        self._check(conditions, noise, guidance_scale)
        noise = noise.to(self.device, self.denoiser.dtype)
        eta = (self.provenance.get("call") or {}).get("eta")
        call = self.calls.arguments(conditions, noise, steps, generator, guidance_scale=guidance_scale, eta=eta)
        remedy = "give other steps, or look at the configs of its parts"
        with reading(f"pipeline {self.path}", remedy, f"cannot be sampled in {steps} steps"):
            images = self.calls.pictures(self.pipeline(**call, **further))
        if not is_finite(images):
            raise UserError(
                f"pipeline {self.path}: drew pixels that are not numbers; its weights are broken, or its dtype too "
                "narrow"
            )
        return images.float().clamp(0, 1)

    def _check(self, conditions: list | None, noise: Tensor, guidance_scale: float | None) -> None:
        if tuple(noise.shape[1:]) != self.noise_shape:
            raise UserError(
                f"pipeline {self.path}: needs noise of shape (B, {', '.join(map(str, self.noise_shape))}), not "
                f"{tuple(noise.shape)}"
            )
        kind = self.condition_kind
        if kind != "none" and (conditions is None or len(conditions) != len(noise)):
            count = "none" if conditions is None else len(conditions)
            raise UserError(f"pipeline {self.path}: needs one {kind} for each of {len(noise)} samples, got {count}")
        wrong = [label for label in conditions or [] if label not in self.labels] if kind == "label" else []
        if wrong:
            raise UserError(f"pipeline {self.path}: label {wrong[0]} is outside {label_ranges(self.labels)}")
        if guidance_scale not in (None, 0, 1) and "guidance_scale" not in self.calls.arguments_known:
            raise UserError(
                f"pipeline {self.path}: {type(self.pipeline).__name__} has no guidance, so guidance_scale = "
                f"{guidance_scale} cannot be; leave it out"
            )


def is_pipeline(folder: Path) -> bool:
    """Whether a folder holds a stock pipeline, or several students."""
    return (folder / "model_index.json").is_file() or is_msd_folder(folder)


def pipeline_folder(path: str | Path) -> Path:
    """The folder that ``path`` names: a folder, ``asset:NAME`` or a hub id that is in the cache.

    Raises:
        UserError: no such folder, or not a diffusers folder.
    """
    folder = Path(hub_folder(assets.resolve(str(path))))
    if not folder.is_dir():
        raise UserError(
            f"pipeline {path}: no such folder, nor a hub id that is in this machine's cache; name a folder that "
            "save_pretrained wrote"
        )
    if not is_pipeline(folder):
        raise UserError(
            f"pipeline {path}: has no model_index.json, so it is not a diffusers folder; name one that "
            "save_pretrained wrote"
        )
    return folder


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """diffusers' bar over components off while loading."""
    shown = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            diffusers_logging.enable_progress_bar()
