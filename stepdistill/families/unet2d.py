"""Pixel-space UNet2DModel teachers, unconditional or class-conditional.

The teacher's folder holds ``unet`` and ``scheduler`` and nothing else (as DDPMPipeline, DDIMPipeline, PNDMPipeline and
ConsistencyModelPipeline write it).  The null label for guidance is ``null_label`` under ``_stepdistill`` in the UNet's
config, or ``teacher.null_label`` of the run's; a teacher without one is guided by nothing.  Labels are the embedding's
own numbers everywhere; the null one is no class, wherever it is.
"""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from diffusers import ConsistencyModelPipeline, DDIMPipeline, DDPMPipeline, ModelMixin, PNDMPipeline, UNet2DModel
from torch import Tensor, nn

from stepdistill.conditions import ConditionKind
from stepdistill.denoiser import Condition
from stepdistill.errors import UserError
from stepdistill.schedule import EDMSchedule, FlowSchedule, from_scheduler

from .base import Family
from .calls import StockCalls
from .condition_encoders import ConditionEncoder, Labels, NoConditions, class_labels
from .latents import Pixels


class UNet2DCalls(StockCalls):
    """Pixel pipelines, called by the number of pictures and, where the network has classes, by their labels."""

    def with_noise(self) -> UNet2DCalls:
        """The consistency pipeline around the same network and scheduler, able to start from noise of any shape.

        DDPM's, DDIM's and PNDM's pipelines have no ``latents``; the consistency pipeline runs the same loop and has
        them.  Its own input check demands three channels and squares whatever its network has, which nothing after the
        check does, so latents are hidden from the check; and it calls every scheduler in one way
        (:func:`_as_the_loop_calls`).
        """
        pipeline = self.pipeline
        if isinstance(pipeline, DDPMPipeline | DDIMPipeline | PNDMPipeline):
            pipeline = ConsistencyModelPipeline(unet=pipeline.unet, scheduler=pipeline.scheduler)
        stock_check = pipeline.check_inputs

        def check_inputs(
            steps: Any, timesteps: Any, latents: Any, batch_size: Any, img_size: Any, callback_steps: Any
        ) -> None:
            stock_check(steps, timesteps, None, batch_size, img_size, callback_steps)

        pipeline.check_inputs = check_inputs
        _as_the_loop_calls(pipeline.scheduler)
        return UNet2DCalls(pipeline)

    @property
    def condition_kind(self) -> ConditionKind:
        labelled = self.network.config.get("num_class_embeds") and "class_labels" in self.arguments_known
        return "label" if labelled else "none"

    @property
    def null_label(self) -> int | None:
        return stamp_of(self.network).get("null_label")

    def labels(self, null_label: int | None) -> list[int]:
        if self.condition_kind != "label":
            return []
        return list(class_labels(self.network.config.num_class_embeds, null_label))

    def example(self) -> dict[str, Any]:
        if self.condition_kind != "label":
            return super().example()
        return self.conditioned(self.labels(self.null_label)[:1])

    def notes(self) -> list[str]:
        if self.null_label is None or not self.network.config.get("num_class_embeds"):
            return []
        return [f"Label {self.null_label} stands for no class; a call without `class_labels` may draw it."]


def _as_the_loop_calls(scheduler: Any) -> None:
    """Let the consistency pipeline's loop call a scheduler: some take no generator (PNDM, Heun, UniPC); those of flow
    models start from unit noise that they do not scale, and do not say so."""
    if not hasattr(scheduler, "init_noise_sigma"):
        scheduler.init_noise_sigma = 1.0
        scheduler.scale_model_input = lambda sample, timestep=None: sample
    step = scheduler.step
    if "generator" not in inspect.signature(step).parameters:
        scheduler.step = lambda *arguments, generator=None, **named: step(*arguments, **named)


class UNet2DFamily(Family):
    name = "unet2d"
    component = "unet"
    calls = UNet2DCalls
    pipelines = ("ConsistencyModelPipeline", "DDPMPipeline", "DDIMPipeline", "PNDMPipeline")
    parts = {"unet": "UNet2DModel", "scheduler": None}
    plain_config = {
        "class_embed_type": ((None,), "its classes are not told by a number, so no stock pipeline tells them"),
        "time_embedding_type": (
            ("positional", "learned"),
            "it divides its output by its time, as score-SDE models do, whose schedulers are not supported",
        ),
    }
    architecture_keys = (
        "block_out_channels",
        "layers_per_block",
        "down_block_types",
        "up_block_types",
        "attention_head_dim",
        "norm_num_groups",
    )
    lora_targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_shortcut", "time_emb_proj"]

    network: UNet2DModel

    def __init__(self, network: UNet2DModel, scheduler: Any):
        schedule, kind = from_scheduler(scheduler)
        if isinstance(schedule, FlowSchedule):
            schedule.integer_labels = True  # the stock schedulers of pixel pipelines truncate their labels
        shape = UNet2DCalls.noise_shape_of(network.config)
        _, height, width = shape
        if height == width:
            network.register_to_config(sample_size=height)  # the consistency pipeline takes no pair
        network = network.requires_grad_(False).eval()
        null = stamp_of(network).get("null_label")
        super().__init__(network, schedule, kind, shape, condition_encoder_of(network, null), Pixels(shape), scheduler)
        # a folder that stepdistill exported says all that it knows
        self.knows_null = self.condition_kind == "none" or self.has_null or "version" in stamp_of(network)

    @property
    def null_label(self) -> int | None:
        """The label that stands for no class; None: there is none."""
        encoder = self.condition_encoder
        return encoder.null_label if isinstance(encoder, Labels) else None

    def state_null_label(self, label: int, source: str) -> None:
        if self.condition_kind == "none":
            super().state_null_label(label, source)
        if self.null_label not in (None, label):
            raise UserError(
                f"teacher.null_label = {label}: the teacher {source} itself says {self.null_label}, under _stepdistill "
                "in its unet/config.json; remove the key, or correct that"
            )
        _check_null(label, self.network, f"teacher.null_label = {label}: the teacher {source}")
        self.network.register_to_config(_stepdistill={**stamp_of(self.network), "null_label": label})
        self.condition_encoder = condition_encoder_of(self.network, label)
        self.knows_null = True

    @classmethod
    def from_pipeline(cls, pipeline: DDPMPipeline | ConsistencyModelPipeline, source: str) -> UNet2DFamily:
        """From a loaded pipeline.

        Raises:
            UserError: a network that is called in another way, without a sample size, or that learns its variance;
                pictures that are not square, where no stock pipeline draws them.
        """
        network = pipeline.unet
        cls.check_network(network, source)
        null = stamp_of(network).get("null_label")
        if null is not None:
            where = f"teacher {source}: null_label = {null!r} under _stepdistill in its unet/config.json, which"
            _check_null(null, network, where)
        family = cls(network, pipeline.scheduler)
        labels = family.condition_kind == "label"
        if not family.is_square and (labels or isinstance(family.schedule, EDMSchedule)):
            _, height, width = family.sample_shape
            raise UserError(
                f"teacher {source}: its pictures are {width}x{height}, and stock diffusers draws none that are not "
                f"square {'by class labels' if labels else 'with EDM schedulers'}, so nobody could use its student; "
                "take a teacher of squares"
            )
        return family

    @property
    def is_square(self) -> bool:
        _, height, width = self.sample_shape
        return height == width

    def forward(self, network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        return network(x, time, class_labels=condition.get("label")).sample

    def mid_block(self, network: UNet2DModel) -> nn.Module:
        return network.mid_block

    def feature_blocks(self, network: UNet2DModel) -> list[nn.Module]:
        return [*network.down_blocks, network.mid_block, *network.up_blocks]

    def fresh_network(self, like: nn.Module | None = None) -> UNet2DModel:
        return UNet2DModel.from_config((self.network if like is None else like).config)

    def complete_weights(self, weights: dict[str, Tensor], like: nn.Module) -> dict[str, Tensor]:
        """An exported student has no null label: that of ``like`` is put back."""
        key = "class_embedding.weight"
        if not self.has_null or key not in weights:
            return weights
        embeddings = like.state_dict()[key]
        last = len(embeddings) - 1
        if self.null_label == last and len(weights[key]) == last:
            return {**weights, key: torch.cat([weights[key], embeddings[last:]])}
        return weights

    def pipeline(self, network: UNet2DModel, scheduler: Any) -> ConsistencyModelPipeline | DDPMPipeline:
        """ConsistencyModelPipeline: the one stock class for (class-conditional) pixel students; DDPMPipeline for
        pictures that are not square, which that one cannot draw.

        Where the null label is the last one it is cut off, so that a call without labels never draws it; elsewhere it
        stays, since cutting it would give the classes after it other numbers.

        Raises:
            UserError: pictures that are not square with a scheduler that scales its first noise, as DDPMPipeline
                does not.
        """
        if not self.is_square:
            if scheduler.init_noise_sigma != 1:
                raise UserError(
                    f"no stock pipeline draws pictures that are not square with {type(scheduler).__name__}; set "
                    "sampler.transition to renoise, ode or tcd"
                )
            return DDPMPipeline(unet=network, scheduler=scheduler)
        if self.has_null and self.null_label == network.config.num_class_embeds - 1:
            network = _without_last_label(network)
        return ConsistencyModelPipeline(unet=network, scheduler=scheduler)

    @property
    def guidance_off(self) -> dict[str, float]:
        return {}


def stamp_of(network: ModelMixin) -> dict[str, Any]:
    """What stepdistill wrote into a network's config, {} for others' networks."""
    stamp = network.config.get("_stepdistill")
    return dict(stamp) if isinstance(stamp, dict) else {}


def condition_encoder_of(network: UNet2DModel, null_label: int | None) -> ConditionEncoder:
    """The labels of a network's embedding; nothing where it has none."""
    embeddings = network.config.num_class_embeds
    return Labels(embeddings, null_label) if embeddings else NoConditions()


def _check_null(label: Any, network: UNet2DModel, what: str) -> None:
    """Refuse a null label that the network has no embedding of; ``what`` begins the error.

    Raises:
        UserError: there is none.
    """
    count = network.config.num_class_embeds or 0
    if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label < count:
        has = f"labels 0..{count - 1}" if count else "no labels"
        raise UserError(f"{what} has {has}; correct it")


def _without_last_label(network: UNet2DModel) -> UNet2DModel:
    """A copy of ``network`` whose class embedding has one row fewer."""
    shorter = copy.deepcopy(network)
    weight = shorter.class_embedding.weight
    shorter.class_embedding = nn.Embedding.from_pretrained(weight[:-1].detach().clone(), freeze=False)
    provenance = {k: v for k, v in stamp_of(network).items() if k != "null_label"}
    shorter.register_to_config(num_class_embeds=len(weight) - 1, _stepdistill=provenance)
    return shorter


def build_teacher_network(
    resolution: int, channels: int, num_labels: int, block_channels: list[int], layers_per_block: int
) -> UNet2DModel:
    """A small class-conditional UNet2DModel with a null label, self-attention at its lowest resolution.

    The label ``num_labels`` is the null label.
    """
    down = len(block_channels) - 1
    network = UNet2DModel(
        sample_size=resolution,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(block_channels),
        layers_per_block=layers_per_block,
        down_block_types=("DownBlock2D",) * down + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * down,
        norm_num_groups=8,
        attention_head_dim=min(32, block_channels[-1]),
        num_class_embeds=num_labels + 1,
    )
    network.register_to_config(_stepdistill={"null_label": num_labels})
    return network
