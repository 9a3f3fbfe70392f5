"""Pixel-space UNet2DModel teachers, unconditional or class-conditional.

The teacher's folder holds ``unet`` and ``scheduler`` and nothing else (as DDPMPipeline, DDIMPipeline, PNDMPipeline and
ConsistencyModelPipeline write it).  The null label for guidance is ``null_label`` under ``_stepdistill`` in the UNet's
config; a teacher without one is guided by nothing.
"""

from __future__ import annotations

import copy

import torch
from diffusers import ConsistencyModelPipeline, DDPMPipeline, UNet2DModel
from torch import Tensor, nn

from stepdistill.denoiser import Condition
from stepdistill.errors import UserError
from stepdistill.families.base import Family
from stepdistill.schedule import EDMSchedule, FlowSchedule, from_scheduler


class UNet2DFamily(Family):
    name = "unet2d"
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

    def __init__(self, network: UNet2DModel, scheduler):
        self.network = network.requires_grad_(False).eval()
        self.scheduler = scheduler
        self.schedule, self.kind = from_scheduler(scheduler)
        if isinstance(self.schedule, FlowSchedule):
            self.schedule.integer_labels = True  # the stock schedulers of pixel pipelines truncate their labels
        config = network.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        if height == width:
            network.register_to_config(sample_size=height)  # the consistency pipeline takes no pair
        self.sample_shape = (config.in_channels, height, width)
        self.null_label = (config.get("_stepdistill") or {}).get("null_label")
        self.has_null = self.null_label is not None
        if config.num_class_embeds:
            self.condition_kind = "label"
            self.num_labels = config.num_class_embeds - int(self.has_null)

    @classmethod
    def from_components(cls, components: dict, source: str) -> UNet2DFamily:
        """From a loaded pipeline's components.

        Raises:
            UserError: a network that is called in another way, without a sample size, or that learns its variance;
                pictures that are not square, where no stock pipeline draws them.
        """
        cls.check_network(components["unet"], source)
        family = cls(components["unet"], components["scheduler"])
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

    def mid_block(self, network: nn.Module) -> nn.Module:
        return network.mid_block

    def feature_blocks(self, network: nn.Module) -> list[nn.Module]:
        return [*network.down_blocks, network.mid_block, *network.up_blocks]

    def fresh_network(self, like: nn.Module | None = None) -> UNet2DModel:
        return UNet2DModel.from_config((self.network if like is None else like).config)

    def encode_conditions(self, items: list) -> Condition:
        if self.condition_kind == "none":
            return {}
        return {"label": torch.as_tensor(items, dtype=torch.long, device=self.device)}

    def null_condition(self, count: int) -> Condition:
        if not self.has_null:
            raise UserError(
                "this teacher has no null label, so it cannot be guided: set guidance_scale to 1, or name the label "
                "under _stepdistill.null_label in its unet/config.json"
            )
        return {"label": torch.full((count,), self.null_label, dtype=torch.long, device=self.device)}

    def complete_weights(self, found: dict[str, Tensor], like: nn.Module) -> dict[str, Tensor]:
        """An exported student has no null label: that of ``like`` is put back."""
        key = "class_embedding.weight"
        own = like.state_dict().get(key)
        if self.has_null and key in found and len(found[key]) == len(own) - 1 and self.null_label == len(own) - 1:
            return {**found, key: torch.cat([found[key], own[-1:]])}
        return found

    def pipeline(self, network: UNet2DModel, scheduler) -> ConsistencyModelPipeline | DDPMPipeline:
        """ConsistencyModelPipeline: the one stock class for (class-conditional) pixel students; DDPMPipeline for
        pictures that are not square, which that one cannot draw.

        Where the null label is the last one it is cut off, so that a call without labels never draws it.

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


def _without_last_label(network: UNet2DModel) -> UNet2DModel:
    """A copy of ``network`` whose class embedding has one row fewer."""
    shorter = copy.deepcopy(network)
    weight = shorter.class_embedding.weight
    shorter.class_embedding = nn.Embedding.from_pretrained(weight[:-1].detach().clone(), freeze=False)
    provenance = {k: v for k, v in (network.config.get("_stepdistill") or {}).items() if k != "null_label"}
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
