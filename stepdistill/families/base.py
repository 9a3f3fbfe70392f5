"""The contract of a teacher family.  A new one is a file beside this one, a line in the table of families and a row in
the contract tests."""

from __future__ import annotations

import abc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from stepdistill import assets, precision
from stepdistill.conditions import ConditionKind, Conditions
from stepdistill.denoiser import Condition, Denoiser, NetworkDenoiser, combine_linearly
from stepdistill.digests import check_folder
from stepdistill.errors import UserError, reading
from stepdistill.sampler import FewStepSampler
from stepdistill.schedule import Clipping, PredictionType, Schedule, clipping_of
from stepdistill.stock.loading import load_network, oversized, read_parts
from stepdistill.stock.variants import choose_variant, find_variants

from . import schedulers
from .calls import StockCalls
from .condition_encoders import ConditionEncoder
from .features import capture_outputs
from .latents import Latents


@dataclass(frozen=True)
class Source:
    """A teacher's path or hub id, its folder on this machine, and which of the weights there."""

    path: str
    folder: Path
    variant: str | None = None


class Family(abc.ABC):
    """A teacher, and everything that only its kind of model knows.

    It answers in four parts: the *denoiser* (its own methods: the network's call, features and weights), the
    *conditions* (:attr:`condition_encoder`), the *latents* (:attr:`latents`) and the *export* (its stock pipeline,
    :attr:`calls` and the scheduler of a few-step student).

    Attributes:
        network: the teacher's denoising network, frozen.
        schedule, kind: the noise schedule, and what the network's output means.
        sample_shape: the shape of one sample of what is denoised: (C, H, W) of pixels or latents.
        condition_encoder: labels or prompts to what the network takes.
        latents: between pixels and what is denoised.
        scheduler: the teacher's own stock scheduler; None where the teacher is a function.
        clipping: how that scheduler bounds x0 when it samples.
        source: where the teacher was loaded from.
    """

    name: ClassVar[str]
    """The family's name in configs."""
    component: ClassVar[str]
    """The network's name among the parts of a diffusers folder: ``unet`` or ``transformer``."""
    calls: ClassVar[type[StockCalls]] = StockCalls
    """How this family's stock pipelines are called."""
    lora_targets: ClassVar[list[str] | str]
    """Names of the modules that LoRA adapts by default (as in peft's ``target_modules``)."""
    kohya_prefix: ClassVar[str | None] = None
    """What kohya's LoRA files put before the network's modules; None where no stock pipeline loads such a file."""
    architecture_keys: ClassVar[tuple[str, ...]] = ()
    """Keys of the network's config that a smaller student may change."""
    pipelines: ClassVar[tuple[str, ...]] = ()
    """diffusers' pipeline classes whose folders hold such a teacher, the one to save as first."""
    parts: ClassVar[dict[str, str | None]] = {}
    """The parts of such a folder; the class that each must have, None where any will do."""
    left_out: ClassVar[tuple[str, ...]] = ()
    """Parts that may be there and take no part in drawing."""
    plain_config: ClassVar[dict[str, tuple[tuple, str]]] = {}
    """Keys of the network's config that change how it must be called: the values that do not, and what others mean."""
    passes_eta: ClassVar[bool] = False
    """Whether the stock pipeline hands its scheduler an ``eta``."""
    takes_negatives: ClassVar[bool] = False
    """Whether there is :meth:`steering`."""
    knows_null: bool = True
    """Whether the folder says which label is the null one, or can have none."""

    def __init__(
        self,
        network: nn.Module,
        schedule: Schedule,
        kind: PredictionType,
        sample_shape: tuple[int, ...],
        condition_encoder: ConditionEncoder,
        latents: Latents,
        scheduler: Any = None,
    ):
        self.network, self.schedule, self.kind, self.sample_shape = network, schedule, kind, sample_shape
        self.condition_encoder, self.latents, self.scheduler = condition_encoder, latents, scheduler
        self.clipping: Clipping | None = None if scheduler is None else clipping_of(scheduler)
        self.source: Source | None = None

    # -- folders -------------------------------------------------------------------------------------------

    @classmethod
    def claims(cls, index: dict[str, Any]) -> bool:
        """Whether a checked ``model_index.json`` is of a pipeline around this family's network.

        What else must be there is for :meth:`check_parts`, whose errors say what is wrong.
        """
        kind = read_parts(index).get(cls.component, ("", ""))[1]
        return kind == cls.parts.get(cls.component)

    @classmethod
    def check_parts(cls, index: dict[str, Any], source: str) -> None:
        """Refuse a claimed pipeline whose class or parts are not those of a teacher of this family.

        Raises:
            UserError: a part that is missing, of another class or not understood, or another pipeline around them.
        """
        name, parts = index["_class_name"], {part: kind for part, (_, kind) in read_parts(index).items()}
        expected = ", ".join(cls.parts)
        known = {*cls.parts, *cls.left_out}
        if more := [f"{part} ({kind})" for part, kind in parts.items() if part not in known]:
            raise UserError(
                f"teacher {source}: a {name} with {', '.join(more)} is not supported: its network does not work on "
                f"what one with {expected} alone works on"
            )
        for part, kind in cls.parts.items():
            if part not in parts:
                raise UserError(f"teacher {source}: its {part} is missing; save the whole pipeline")
            if kind is not None and parts[part] != kind:
                raise UserError(f"teacher {source}: its {part} is of class {parts[part]}; only {kind} is supported")
        if name not in cls.pipelines:
            raise UserError(
                f"teacher {source}: a {name} is not supported; if {cls.pipelines[0]} draws as well with its parts "
                f"({expected}), save them as one"
            )

    @classmethod
    @abc.abstractmethod
    def from_pipeline(cls, pipeline: DiffusionPipeline, source: str) -> Family:
        """The teacher of a loaded pipeline; ``source`` names it in errors.

        Raises:
            UserError: its network is called otherwise than this family calls it.
        """

    @classmethod
    def check_network(cls, network: ModelMixin, source: str) -> None:
        """Refuse a network that wants to be called otherwise than this family calls it.

        Raises:
            UserError: the key of its config that says so.
        """
        config = network.config
        for key, (plain, meaning) in cls.plain_config.items():
            if config.get(key) not in plain:
                raise UserError(
                    f"teacher {source}: {key} = {config[key]} in its {cls.component}'s config is not supported: "
                    f"{meaning}"
                )
        if config.out_channels != config.in_channels:
            raise UserError(
                f"teacher {source}: {config.out_channels} output channels for {config.in_channels} input channels "
                "(a learned variance) is not supported"
            )
        if config.sample_size is None:
            raise UserError(f"teacher {source}: its UNet's config has no sample_size; add it")

    def state_null_label(self, label: int, source: str) -> None:
        """Take it from the user which label is the null one.

        Raises:
            UserError: the teacher takes no labels, has no such one, or says another.
        """
        raise UserError(f"teacher.null_label = {label}: the teacher {source} takes no labels; remove the key")

    # -- calling the network -------------------------------------------------------------------------------

    @abc.abstractmethod
    def forward(self, network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        """Call ``network`` (the teacher's or a copy) on x (B, ...), time (B,) as the schedule counts it;
        gives (B, ...).

        A family whose network counts its time otherwise, or predicts with the other sign, sees to that here.  The bare
        call: others use a role or :meth:`denoiser`, which see to the precision that it computes in.
        """

    def combine(self, output_null: Tensor, output_cond: Tensor, guidance_scale: float | Tensor) -> Tensor:
        """The guided output, as the teacher's own pipeline makes it of the network's outputs (B, ...) under the null
        condition and under the condition; ``guidance_scale``: a number, or (B, 1, ..., 1)."""
        return combine_linearly(output_null, output_cond, guidance_scale)

    def feature_blocks(self, network: nn.Module) -> list[nn.Module]:
        """The modules whose outputs (B, F, h, w) are the features that a discriminator can read, in the order in which
        they run."""
        raise UserError(f"teachers of family {self.name} have no features for a discriminator")

    def mid_block(self, network: nn.Module) -> nn.Module:
        """The one of them whose output is the encoder's last feature."""
        raise UserError(f"teachers of family {self.name} have no features for a discriminator")

    def features(self, network: nn.Module, x: Tensor, time: Tensor, condition: Condition, every: bool) -> list[Tensor]:
        """A forward of ``network`` to its features (B, F, ...): the encoder's last, or those of ``every`` block.

        Takes what :meth:`forward` takes, and is as bare a call as that.
        """
        blocks = self.feature_blocks(network) if every else [self.mid_block(network)]
        return capture_outputs(blocks, lambda: self.forward(network, x, time, condition))

    def denoiser(self, network: nn.Module | None = None, autocast_dtype: torch.dtype | None = None) -> Denoiser:
        """``network`` (the teacher's by default) as a denoiser; it computes as :mod:`stepdistill.precision` says."""
        target = self.network if network is None else network
        dtype = precision.autocast_dtype(target, autocast_dtype)

        def forward(x: Tensor, time: Tensor, condition: Condition) -> Tensor:
            with precision.computing(x.device, dtype):
                return self.forward(target, x, time, condition)

        return NetworkDenoiser(forward, self.schedule, self.kind, self.combine)

    def teacher_denoiser(self) -> Denoiser | None:
        """A teacher that is not ``network``: only for families whose teacher is a function."""
        return None

    @abc.abstractmethod
    def fresh_network(self, like: nn.Module | None = None) -> nn.Module:
        """A new network of the architecture of ``like`` (the teacher's by default); its weights are arbitrary."""

    def altered_network(self, changes: dict[str, Any]) -> nn.Module:
        """A new network of the teacher's class with random weights, some keys of its config changed.

        Raises:
            UserError: a key that is not of the architecture, or values that the class cannot be built from.
        """
        odd = sorted(changes.keys() - self.architecture_keys)
        if odd:
            raise UserError(f"roles.network: {odd[0]} cannot be changed; keys are {', '.join(self.architecture_keys)}")
        if (excess := oversized(changes)) is not None:
            raise UserError(f"roles.network: {excess} is more than any network has")
        lists = {k: tuple(v) if isinstance(v, list) else v for k, v in changes.items()}
        try:
            teacher: ModelMixin = self.network
            network = type(teacher).from_config({**teacher.config, **lists}).requires_grad_(False)
            if any(getattr(module, "heads", 1) == 0 for module in network.modules()):
                raise ValueError("an attention block has fewer channels than one head")
            return network
        except Exception as error:  # of torch or diffusers, many kinds
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"roles.network: no {type(self.network).__name__} can be built so ({reason}); channels must be "
                "divisible by norm_num_groups and by the heads"
            ) from None

    def read_weights(self, path: str, like: nn.Module | None = None) -> dict[str, Tensor]:
        """The network's weights of another diffusers folder (or hub id), e.g. an earlier student; ``like``: the network
        that they must fit, the teacher's by default.

        Plain weights, or the only ones; of the teacher's own folder those that the teacher was loaded with.

        Raises:
            UserError: not there, or a network of another shape.
        """
        like = self.network if like is None else like
        what, place, variant = f"roles.student_from = {path}", assets.resolve(path), None
        if self.source is not None and place == self.source.path:
            place, variant = str(self.source.folder), self.source.variant
        if Path(place).is_dir():
            check_folder(Path(place), what, (self.component,))
        name = self.component
        with reading(what, "name a student that was exported", f"its {name} cannot be loaded"):
            variant = choose_variant({name: find_variants(Path(place) / name)}, variant, what, None)
            loaded = load_network(type(self.network), place, what, variant=variant, subfolder=name).state_dict()
        weights, expected = self.complete_weights(loaded, like), like.state_dict()
        shapes, expected_shapes = ({k: v.shape for k, v in state.items()} for state in (weights, expected))
        different = [k for k in shapes | expected_shapes if shapes.get(k) != expected_shapes.get(k)]
        if different:
            raise UserError(
                f"roles.student_from = {path}: its {name} is not of the student's architecture ({min(different)})"
            )
        return weights

    def complete_weights(self, weights: dict[str, Tensor], like: nn.Module) -> dict[str, Tensor]:
        """Put back what an export leaves out, from ``like``."""
        return weights

    # -- conditions ----------------------------------------------------------------------------------------

    @property
    def condition_kind(self) -> ConditionKind:
        return self.condition_encoder.kind

    @property
    def labels(self) -> tuple[int, ...]:
        """The numbers of the embedding that stand for a class, ascending."""
        return self.condition_encoder.labels

    @property
    def num_labels(self) -> int:
        """How many classes there are."""
        return len(self.labels)

    @property
    def has_null(self) -> bool:
        """Whether there is a null condition, which guidance needs."""
        return self.condition_encoder.has_null

    @property
    def conditions(self) -> Conditions:
        """What the teacher is conditioned on."""
        return Conditions(self.condition_kind, self.labels)

    def prompts_cut(self, prompts: list[str]) -> list[int]:
        """Which of the prompts are longer than the encoder reads, by their places; none where that is not known."""
        return self.condition_encoder.prompts_cut(prompts)

    def encode_conditions(self, items: list) -> Condition:
        """Labels or prompts to what the network takes, batch first, on the network's device."""
        return self.condition_encoder.encode(items, self.device)

    def null_condition(self, count: int) -> Condition:
        """The null condition for ``count`` samples; raises UserError where the teacher has none."""
        return self.condition_encoder.null(count, self.device)

    def steering(self, negative: Condition, scale: Tensor) -> Condition:
        """What a condition holds besides, to lead a network with :func:`stepdistill.attention.modules.install`'s
        processors away from ``negative`` by ``scale`` (B,): NASA."""
        raise UserError(f"teachers of family {self.name} take no negative prompts")

    # -- pixels --------------------------------------------------------------------------------------------

    @property
    def image_shape(self) -> tuple[int, ...]:
        """(C, H, W) of the pictures."""
        return self.latents.image_shape

    @property
    def vae(self) -> nn.Module | None:
        """The network between pixels and latents; None where pixels are denoised."""
        return self.latents.vae

    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The law of the latents of pixels (B, C, H, W) in [-1, 1]: mean and standard deviation, (B, ...) each; of
        teachers with a VAE."""
        mean, std = self.latents.posterior(pixels)
        return mean.to(self.device), std.to(self.device)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [-1, 1] to what is denoised; the identity without a VAE."""
        return self.latents.encode(pixels).to(self.device)

    def decode(self, samples: Tensor) -> Tensor:
        """The inverse: samples to pixels (B, C, H, W) in [-1, 1], clamped."""
        return self.latents.decode(samples)

    def decoder(self, path: str | None = None) -> Callable[[Tensor], Tensor]:
        """Samples to pixels, unclamped and differentiable; ``path``: a smaller decoder for the same latents.

        Raises:
            UserError: a path for a family without a VAE, or one that holds no such decoder.
        """
        return self.latents.decoder(path)

    # -- export --------------------------------------------------------------------------------------------

    @abc.abstractmethod
    def pipeline(self, network: nn.Module, scheduler: Any) -> DiffusionPipeline:
        """A stock diffusers pipeline around ``network`` and ``scheduler``, ready for ``save_pretrained``."""

    def student_scheduler(self, sampler: FewStepSampler) -> Any:
        """A stock scheduler whose config alone makes the stock pipeline sample as ``sampler`` does.

        Raises:
            UserError: there is none; see :meth:`check_expressible`.
        """
        return schedulers.student_scheduler(self, sampler)

    def check_expressible(self, sampler: FewStepSampler) -> None:
        """Refuse a sampler that no stock scheduler can be configured to be; for asking before training starts."""
        schedulers.check_expressible(self, sampler)

    def call(self, sampler: FewStepSampler) -> dict[str, Any]:
        """What a call of the exported pipeline must say, by its arguments' names."""
        call = {"num_inference_steps": sampler.steps, **self.guidance_off}
        if sampler.transition == "tcd" and self.passes_eta:
            call["eta"] = sampler.eta
        return call

    @property
    @abc.abstractmethod
    def guidance_off(self) -> dict[str, float]:
        """The stock pipeline's call arguments that mean "no guidance", {} where it has none; a model with an embedded
        scale gets that."""

    def networks(self) -> dict[str, nn.Module]:
        """The teacher's networks by the names of their folders: what a student is trained from."""
        return {self.component: self.network, **self.latents.networks(), **self.condition_encoder.networks()}

    # -- housekeeping --------------------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> Family:
        """Move the teacher's networks."""
        self.network.to(device)
        self.condition_encoder.to(device)
        self.latents.to(device)
        return self

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device
