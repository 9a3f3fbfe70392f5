"""How a stock diffusers pipeline is called, whatever its class: the network inside it, what it draws from, the shape
of its noise and the arguments of its call.

A family states what is special about its own pipelines in a subclass of :class:`StockCalls`; every other pipeline is
described by the signature of its call.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from stepdistill.conditions import ConditionKind
from stepdistill.errors import UserError

COMPONENTS = ("unet", "transformer")
"""The names that diffusers' pipelines give their denoising network."""
CONDITION_ARGUMENTS: dict[ConditionKind, str] = {"label": "class_labels", "prompt": "prompt"}
"""The argument of a pipeline's call that says what is drawn, by the kind of condition."""
EXAMPLE_PROMPTS = ("a photo of a cat", "a red bus")


class StockCalls:
    """A loaded stock pipeline and how it is called.

    Attributes:
        pipeline: the pipeline.
        arguments_known: the names of its call's arguments.
    """

    shared_parts: ClassVar[tuple[str, ...]] = ()
    """The parts that several students of one teacher have in common: all but their networks and schedulers."""
    encoder_parts: ClassVar[tuple[str, ...]] = ()
    """Those of them that turn a prompt into what the network takes."""

    def __init__(self, pipeline: DiffusionPipeline):
        self.pipeline = pipeline
        self.arguments_known = frozenset(inspect.signature(type(pipeline).__call__).parameters)

    def with_noise(self) -> StockCalls:
        """The same for a pipeline that can be given its noise, where this one's class cannot and another's can."""
        return self

    # -- its parts -----------------------------------------------------------------------------------------

    @property
    def component(self) -> str:
        """The name of the denoising network among the pipeline's components.

        Raises:
            UserError: there is none.
        """
        for name in COMPONENTS:
            if getattr(self.pipeline, name, None) is not None:
                return name
        raise UserError(f"{type(self.pipeline).__name__}: has neither a {' nor a '.join(COMPONENTS)}")

    @property
    def network(self) -> ModelMixin:
        """The network that is called at every step."""
        return getattr(self.pipeline, self.component)

    @property
    def vae(self) -> ModelMixin | None:
        return getattr(self.pipeline, "vae", None)

    @property
    def text_encoders(self) -> list[nn.Module]:
        return [
            part
            for name, part in self.pipeline.components.items()
            if name.startswith("text_encoder") and part is not None
        ]

    # -- what it draws -------------------------------------------------------------------------------------

    @property
    def condition_kind(self) -> ConditionKind:
        return "prompt" if CONDITION_ARGUMENTS["prompt"] in self.arguments_known else "none"

    @property
    def null_label(self) -> int | None:
        """The label that stands for no class, as the network's config says."""
        return None

    def labels(self, null_label: int | None) -> list[int]:
        """The labels that can be drawn where ``null_label`` stands for no class, ascending."""
        return []

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """The shape of one sample's noise, without the batch.

        Raises:
            UserError: the network's config does not say it.
        """
        return self.noise_shape_of(self.network.config)

    @staticmethod
    def noise_shape_of(config: Mapping[str, Any]) -> tuple[int, ...]:
        """The shape (C, H, W) of one sample's noise, from the config of a network that works on maps of a fixed size.

        Raises:
            UserError: the config does not say its size or channels.
        """
        size, channels = config.get("sample_size"), config.get("in_channels")
        if size is None or channels is None:
            raise UserError("its network's config has no sample_size or in_channels; add them")
        height, width = (size, size) if isinstance(size, int) else size
        return (channels, height, width)

    # -- the call ------------------------------------------------------------------------------------------

    def conditioned(self, items: Sequence) -> dict[str, Any]:
        """The arguments that say what is drawn: B labels or prompts."""
        return {CONDITION_ARGUMENTS[self.condition_kind]: items}

    @staticmethod
    def prompt_encoder(parts: Mapping[str, Any]) -> Callable[[list[str]], tuple[Tensor, Tensor]]:
        """The encoder of prompts that routes them among students, from :attr:`encoder_parts` by name.

        Raises:
            UserError: pipelines of this kind have none.
        """
        raise UserError("prompts of these students cannot be routed: their family names no encoder for it")

    def embedded(self, hidden: Tensor) -> dict[str, Any]:
        """The arguments that say what is drawn, from encoded prompts (B, tokens, width)."""
        raise UserError(f"{type(self.pipeline).__name__}: takes no encoded prompts")

    def arguments(
        self,
        items: Sequence | None,
        noise: Tensor,
        steps: int,
        generator: torch.Generator | None = None,
        **optional: Any,
    ) -> dict[str, Any]:
        """The arguments of a call that draws one picture for each sample of ``noise`` (B, ...), as tensors.

        Args:
            items: B labels or prompts; not used by a pipeline that draws unconditionally.
            optional: further arguments, passed on where the call has them and they are not None.
        """
        call = {"batch_size": len(noise), "latents": noise, "num_inference_steps": steps, "generator": generator}
        call |= {"output_type": "pt", **optional}
        if items is not None and self.condition_kind != "none":
            call |= self.conditioned(items)
        return {key: value for key, value in call.items() if key in self.arguments_known and value is not None}

    def pictures(self, output: Any) -> Tensor:
        """The pictures in what a call returned, (B, C, H, W) in [0, 1]."""
        return output.images

    def example(self) -> dict[str, Any]:
        """The arguments that say what one picture is drawn of, for a model card."""
        return {"prompt": EXAMPLE_PROMPTS[0]} if self.condition_kind == "prompt" else {"batch_size": 1}

    def notes(self) -> list[str]:
        """What a user of the pipeline must know besides its arguments, a sentence each."""
        return []


def compiled_blocks(network: nn.Module) -> list[nn.Module]:
    """The modules that are compiled, each by itself: a UNet's down, mid and up blocks, those of a VAE's decoder, the
    repeated blocks of a transformer, and the whole network where it has none of these.  (Smaller parts, such as every
    ResNet, share code and so run into torch's limit of recompilations.)"""
    network = getattr(network, "decoder", network)
    parts = [getattr(network, name, None) for name in ("down_blocks", "mid_block", "up_blocks")]
    blocks: list[nn.Module] = []
    for part in parts:
        if part is not None:
            blocks += part if isinstance(part, nn.ModuleList) else [part]
    repeated = getattr(network, "_repeated_blocks", None) or ()
    return blocks or [module for module in network.modules() if type(module).__name__ in repeated] or [network]
