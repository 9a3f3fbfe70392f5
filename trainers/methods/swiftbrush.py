"""SwiftBrush (2312.05239), its version 2 (2408.14176), and SNOOPI's random guidance, PG-SB (2412.02687).

Student: variational score distillation, ``grad = E[sigma_t^2 (eps_teacher - eps_fake) dx0/dtheta]``, x0 read off pure
noise at the last timestep.  Fake score: a LoRA on the frozen teacher (``roles.weights: mixed``, this method's default),
denoising on the student's samples, on the null prompt in one batch of ten.  One update of either in turn.

``fake_score_guidance`` moves the fixed point, so it is said and not implied: ``shared`` (the papers': both guided by
the same scale) rests at the teacher's *unguided* distribution; ``none`` (ProlificDreamer, DMD) at the guided one.

Version 2: ``roles.student_from`` starts from another one-step model; ``clip`` adds the clamped CLIP loss with its
decay; ``stepdistill merge`` interpolates a student trained in full with one trained as LoRA.  PG-SB: ``guidance_range``
draws the scale anew each iteration for both networks; in expectation this is the gradient of the mean scale.

NASA-T (2412.02687 version 3, section 5.3): with ``negatives`` the student is told a negative prompt too, inside its
cross-attention (:class:`stepdistill.attention.processor.AttentionProcessor`), the teacher's guidance leads away from it
in place of the null prompt, and the fake score does not know it.

Not verified in the papers, so made choices: the shape of the CLIP weight's decay (linear over the run here), whether
PG-SB draws a scale per batch or per sample (``guidance_draw``), and NASA-T's a (one a sample here).  Departures from
the released code: alpha of the teacher's own schedule where version 1 hard-codes 0.0047 for its square; all conversions
in float32; gradients that are not finite are counted and skipped.  ``null_probability`` is one draw a micro-batch,
shared by all processes (there each process has its own).  Version 2's optional regression on real images is not here.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from stepdistill.attention.modules import install
from stepdistill.conditions import quote_line
from stepdistill.config import Section, UserPath
from stepdistill.data.prompts import content_notes, read_prompts
from stepdistill.denoiser import Condition
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.judges.clip import ClipSettings
from stepdistill.objectives.alignment import clamped_cosine_loss
from stepdistill.objectives.surrogate import surrogate_loss
from stepdistill.objectives.variational import variational_score_gradient
from stepdistill.run_record import RunRecord
from stepdistill.settings import RunSettings

from .base import REWARD, Batch, Losses, Needs, Parts, Passes
from .score import Scale, ScoreMethod, ScoreSettings
from .teachers import AskedTeacher


class ClipLossSettings(ClipSettings):
    """Version 2's CLIP loss: ``weight mean max(0, tau - cos)``."""

    model: UserPath = Field("ViT-B-32", description="open_clip's model name, local-dir:FOLDER, or module:attribute")
    prefix: str = Field("", description="put before every prompt")
    weight: float = Field(0.1, gt=0)
    tau: float = Field(0.35, gt=-1, le=1, description="0.35 in version 2, 0.37 in PG-SB")
    decay: Literal["linear", "none"] = Field("linear", description="of the weight, to 0 at the end of the run")
    decoder: UserPath | None = Field(None, description="a small decoder (TAESD: folder or hub id); else the teacher's")


class NegativesSettings(Section):
    """NASA-T: negative prompts in training."""

    prompts: UserPath = Field(description="a file of negative prompts, as data.prompts; each sample draws one")
    column: str | None = Field(None, description="their column, as data.prompt_column")
    scale: tuple[float, float] = Field((0.0, 1.0), description="a of ``Z+ - a Z-`` is uniform in this range")

    @model_validator(mode="after")
    def _range(self):
        if not 0 <= self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale = {list(self.scale)}: low then high, from 0")
        return self

    def read(self, notes: list[str] | None = None) -> list[str]:
        """The negative prompts, each of several of one row too; ``notes`` gets what a user should know of them."""
        key = "swiftbrush.negatives"
        prompts = read_prompts(self.prompts, f"{key}.prompts", self.column, f"{key}.column", notes)
        return [text for prompt in prompts for text in getattr(prompt, "every", (prompt,))]


class SwiftBrushSettings(ScoreSettings):
    guidance_scale: float = Field(4.5, ge=0, description="kappa; 1 is none")
    guidance_range: tuple[float, float] | None = Field(
        None, description="PG-SB: kappa uniform in this range, drawn anew each iteration; [0.5, 4] for SD"
    )
    guidance_draw: Literal["batch", "sample"] = Field("batch", description="one draw of kappa for all, or one a sample")
    fake_score_guidance: Literal["shared", "none"] = Field("shared", description="whether kappa guides it too")
    fake_score_target: Literal["native", "eps", "v", "x0", "flow"] = "eps"
    alpha_weight: bool = Field(True, description="the fake score's loss times alpha_t^2 (version 1's code)")
    null_probability: float = Field(0.1, ge=0, lt=1)
    clip: ClipLossSettings | None = Field(None, description="version 2's CLIP loss (prompt teachers)")
    negatives: NegativesSettings | None = Field(None, description="NASA-T (prompt teachers)")

    @model_validator(mode="after")
    def _range(self):
        if self.negatives is not None and self.guidance_scale == 1 and self.guidance_range is None:
            raise ValueError("negatives act on the teacher through its guidance; set guidance_scale or guidance_range")
        if self.guidance_range is not None and not 0 <= self.guidance_range[0] <= self.guidance_range[1]:
            raise ValueError(f"guidance_range = {list(self.guidance_range)}: low then high, from 0")
        return self

    @property
    def needs_null(self) -> bool:
        return self.guidance_range is not None or super().needs_null


class SwiftBrush(ScoreMethod):
    name = "swiftbrush"
    title = "variational score distillation, a LoRA fake score, PG-SB's random guidance (2312.05239, 2408.14176)"
    Settings = SwiftBrushSettings
    settings: SwiftBrushSettings
    defaults = {"roles": {"weights": "mixed", "lora": {"rank": 64, "alpha": 128}}}

    def __init__(self, parts: Parts, teacher: AskedTeacher | None = None):
        super().__init__(parts, teacher)
        if self.settings.negatives is not None:
            refused = install(self.roles.student.network, "negative")
            if refused:
                name, reason = next(iter(refused.items()))
                raise UserError(f"swiftbrush.negatives: the teacher's {name} {reason}; remove the section")

    @classmethod
    def needs(cls, config: RunSettings) -> Needs:
        settings, data = cls.settings_of(config), config.data
        clip = settings.clip
        if clip is not None and not (data.prompts or data.prompt_dataset or data.prompts_from_images):
            raise UserError("swiftbrush.clip needs prompts: set data.prompts or data.prompt_dataset, or remove it")
        decoder = None if clip is None else clip.decoder
        needs = super().needs(config)
        return replace(needs, clip=clip, pixels=clip is not None, decoder=decoder, negatives=settings.negatives)

    @classmethod
    def check(cls, config: RunSettings, family: Family) -> list[str]:
        settings = cls.settings_of(config)
        if settings.clip is not None and family.condition_kind != "prompt":
            raise UserError("swiftbrush.clip: this teacher takes no prompts; remove the section")
        if settings.negatives is None:
            return []
        if not family.takes_negatives:
            raise UserError(f"swiftbrush.negatives: teachers of family {family.name} take none; remove the section")
        notes: list[str] = []
        prompts = settings.negatives.read(notes)
        first = ", ".join(quote_line(prompt) for prompt in prompts[:3])
        return [f"{len(prompts):,} negative prompts: {first}", *notes, *content_notes(prompts)]

    @classmethod
    def passes(cls, config: RunSettings) -> Passes:
        """A guidance that both networks share costs each a null branch."""
        settings, passes = cls.settings_of(config), super().passes(config)
        guided = settings.guidance_scale != 1 or settings.guidance_range is not None
        branches = 0
        if guided:
            branches = 2 if settings.fake_score_guidance == "shared" else 1
        return replace(passes, per_update=passes.per_update - float(settings.guidance_scale != 1) + branches)

    def next_batch(self) -> Batch:
        batch, settings, negatives = super().next_batch(), self.settings.negatives, self.parts.negatives
        if settings is None:
            return batch
        index = self.noise.randint(0, len(negatives.items) - 1, len(batch))
        negative, _ = negatives.encode_at(index.tolist())
        low, high = settings.scale
        scale = low + (high - low) * self.noise.uniform(len(batch))
        return replace(batch, negative=negative, steering=self.family.steering(negative, scale))

    @classmethod
    def make_record(cls, config: RunSettings) -> RunRecord:
        """As of any method; where teacher and fake score share a scale, the student's fixed point is the unguided
        teacher, whatever the scale."""
        if cls.settings_of(config).fake_score_guidance == "shared":
            return RunRecord(guidance_scale=1.0)
        return super().make_record(config)

    def teacher_scale(self, count: int) -> Scale:
        if self.settings.guidance_range is None or self.teacher.guidance_scale is not None:
            return super().teacher_scale(count)
        low, high = self.settings.guidance_range
        if self.settings.guidance_draw == "sample":
            return low + (high - low) * self.noise.uniform(count)
        return low + (high - low) * self.noise.shared_uniform()

    def fake_score_scale(self, teacher_scale: Scale) -> Scale:
        return teacher_scale if self.settings.fake_score_guidance == "shared" else 1.0

    def student_losses(self, x0: Tensor, batch: Batch) -> Losses:
        gradient = self.variational_score(x0.detach(), batch.condition, batch.negative)
        losses = {"variational_score": (1.0, surrogate_loss(x0, gradient))}
        weight = self.clip_weight()
        if weight > 0:
            cosine = self.observe(f"{REWARD}clip", self.parts.clip.cosine(self.parts.decode(x0), batch.items))
            losses["clip"] = (weight, clamped_cosine_loss(cosine, self.settings.clip.tau))
        return losses

    @torch.no_grad()
    def variational_score(self, x0: Tensor, condition: Condition, negative: Condition | None = None) -> Tensor:
        """g (B, ...) at one draw of level, noise and, for PG-SB, guidance scale; NASA-T's teacher is guided away from
        ``negative``."""
        pair = self.predict_both(x0, condition, negative)
        _, sigma = self.roles.student.schedule.alpha_sigma(pair.t)
        return variational_score_gradient(pair.teacher.eps, pair.fake_score.eps, sigma)

    def clip_weight(self) -> float:
        """The CLIP loss's weight at this update; 0 without the loss."""
        clip = self.settings.clip
        if clip is None:
            return 0.0
        left = 1 - self.counters["student"] / self.config.train.updates
        return clip.weight * (left if clip.decay == "linear" else 1.0)

    def fake_score_weight(self, t: Tensor) -> Tensor | None:
        """alpha_t^2 (B,): version 1's ``|alpha_t (eps_fake - eps)|^2``."""
        if not self.settings.alpha_weight:
            return None
        alpha, _ = self.roles.student.schedule.alpha_sigma(t)
        return alpha**2
