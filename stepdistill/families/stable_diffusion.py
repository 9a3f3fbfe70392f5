"""Stable Diffusion 1.x and 2.x: UNet2DConditionModel on VAE latents, CLIP text.

Latent consistency models with a guidance embedding (``time_cond_proj_dim``) are of this family too: always called with
the scale of their pipeline's default, and not guided by a null prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import PreTrainedModel

from stepdistill.denoiser import Condition
from stepdistill.errors import UserError
from stepdistill.schedule import from_scheduler

from .base import Family
from .calls import StockCalls
from .clip_text import CLIPText, PromptEncoder
from .latents import Latents, VAELatents

TEXT_TO_IMAGE: dict[type, type] = {
    StableDiffusionImg2ImgPipeline: StableDiffusionPipeline,
    StableDiffusionInpaintPipeline: StableDiffusionPipeline,
    LatentConsistencyModelImg2ImgPipeline: LatentConsistencyModelPipeline,
}
"""Pipelines that change pictures, and the one that draws from prompts alone with the very same parts."""
EMBEDDED_SCALE = 8.5
"""What LatentConsistencyModelPipeline embeds by default."""


def guidance_embedding(w: Tensor, width: int) -> Tensor:
    """Sines and cosines (B, width) of a guidance scale less 1, w (B,): latent consistency's (2310.04378)."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=w.device) * (-math.log(10000.0) / (half - 1)))
    angles = 1000 * w[:, None] * rates[None]
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, width % 2))


class StableDiffusionCalls(StockCalls):
    """Pipelines of prompts with one CLIP text encoder and a VAE."""

    encoder_parts = ("text_encoder", "tokenizer")
    shared_parts = (*encoder_parts, "vae")

    def with_noise(self) -> StableDiffusionCalls:
        """The pipeline that draws from prompts alone, in place of one that changes pictures."""
        target = TEXT_TO_IMAGE.get(type(self.pipeline))
        vae = self.pipeline.vae
        if target is None or self.network.config.in_channels != vae.config.latent_channels:
            return self
        return StableDiffusionCalls(target(**self.pipeline.components, requires_safety_checker=False))

    @staticmethod
    def prompt_encoder(parts: Mapping[str, Any]) -> PromptEncoder:
        return PromptEncoder(parts["tokenizer"], parts["text_encoder"])

    def embedded(self, hidden: Tensor) -> dict[str, Any]:
        return {"prompt_embeds": hidden}


class StableDiffusionFamily(Family):
    name = "stable_diffusion"
    component = "unet"
    calls = StableDiffusionCalls
    pipelines = (
        "StableDiffusionPipeline",
        "LatentConsistencyModelPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "LatentConsistencyModelImg2ImgPipeline",
    )
    parts = {
        "unet": "UNet2DConditionModel",
        "scheduler": None,
        "vae": "AutoencoderKL",
        "text_encoder": None,
        "tokenizer": None,
    }
    left_out = ("safety_checker", "feature_extractor")
    plain_config = {
        "addition_embed_type": ((None,), "it takes more than a prompt (SDXL, DeepFloyd IF, Kandinsky)"),
        "class_embed_type": ((None,), "it takes class labels beside the prompt (upscalers, unCLIP)"),
        "num_class_embeds": ((None,), "it takes class labels beside the prompt (upscalers)"),
        "encoder_hid_dim_type": ((None,), "its prompts are changed on the way in (DeepFloyd IF, Kandinsky)"),
        "attention_type": (("default",), "it takes boxes beside the prompt (GLIGEN)"),
        "dual_cross_attention": ((False,), "it takes two kinds of conditions (Versatile Diffusion)"),
    }
    kohya_prefix = "lora_unet"
    # the module set of DMD2's LoRA recipe and of LCM-LoRA
    lora_targets = [
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
        "proj_in",
        "proj_out",
        "ff.net.0.proj",
        "ff.net.2",
        "conv1",
        "conv2",
        "conv_shortcut",
        "downsamplers.0.conv",
        "upsamplers.0.conv",
        "time_emb_proj",
    ]
    architecture_keys = (
        "block_out_channels",
        "layers_per_block",
        "down_block_types",
        "up_block_types",
        "mid_block_type",
        "transformer_layers_per_block",
        "attention_head_dim",
        "norm_num_groups",
    )
    passes_eta = True
    takes_negatives = True

    condition_encoder: CLIPText

    def __init__(self, network: UNet2DConditionModel, scheduler: Any, condition_encoder: CLIPText, latents: Latents):
        schedule, kind = from_scheduler(scheduler)
        shape = StableDiffusionCalls.noise_shape_of(network.config)
        network = network.requires_grad_(False).eval()
        super().__init__(network, schedule, kind, shape, condition_encoder, latents, scheduler)
        self.embeds_guidance = bool(network.config.get("time_cond_proj_dim"))

    @classmethod
    def of(
        cls, network: UNet2DConditionModel, scheduler: Any, vae: AutoencoderKL, text_encoder: Any, tokenizer: Any
    ) -> StableDiffusionFamily:
        """From the parts of a pipeline."""
        _, height, width = StableDiffusionCalls.noise_shape_of(network.config)
        factor = 2 ** (len(vae.config.block_out_channels) - 1)
        image_shape = (vae.config.in_channels, height * factor, width * factor)
        return cls(network, scheduler, CLIPText(tokenizer, text_encoder), VAELatents(vae, image_shape))

    @classmethod
    def from_pipeline(cls, pipeline: StableDiffusionPipeline, source: str) -> StableDiffusionFamily:
        """From a loaded pipeline.

        Raises:
            UserError: the UNet is an inpainting or depth one, or is called in another way.
        """
        network, vae = pipeline.unet, pipeline.vae
        if network.config.in_channels != vae.config.latent_channels:
            raise UserError(
                f"teacher {source}: its UNet takes {network.config.in_channels} channels, not the VAE's "
                f"{vae.config.latent_channels}; inpainting and depth models are not supported"
            )
        cls.check_network(network, source)
        return cls.of(network, pipeline.scheduler, vae, pipeline.text_encoder, pipeline.tokenizer)

    @property
    def text_encoder(self) -> PreTrainedModel:
        return self.condition_encoder.text_encoder

    @property
    def tokenizer(self) -> Any:
        return self.condition_encoder.tokenizer

    @property
    def has_null(self) -> bool:
        return self.condition_encoder.has_null and not self.embeds_guidance

    def forward(self, network: UNet2DConditionModel, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
        text = condition["text"]
        dtype = torch.promote_types(text.dtype, torch.float32)
        guidance = None
        if self.embeds_guidance:
            scale = torch.full((len(x),), EMBEDDED_SCALE - 1, device=x.device)
            guidance = guidance_embedding(scale, network.config.time_cond_proj_dim)
        steer = None
        if "negative_text" in condition:
            negative = condition["negative_text"].to(dtype)
            steer = {"negative_hidden_states": negative, "negative_scale": condition["negative_scale"]}
        call = {"encoder_hidden_states": text.to(dtype), "cross_attention_kwargs": steer}
        return network(x, time, timestep_cond=guidance, **call).sample

    def mid_block(self, network: UNet2DConditionModel) -> nn.Module:
        return network.mid_block

    def feature_blocks(self, network: UNet2DConditionModel) -> list[nn.Module]:
        return [*network.down_blocks, network.mid_block, *network.up_blocks]

    def fresh_network(self, like: nn.Module | None = None) -> UNet2DConditionModel:
        return UNet2DConditionModel.from_config((self.network if like is None else like).config)

    @property
    def prompt_encoder(self) -> PromptEncoder:
        return PromptEncoder(self.tokenizer, self.text_encoder)

    def null_condition(self, count: int) -> Condition:
        if self.embeds_guidance:
            raise UserError("this model has its guidance embedded, so it is not guided again: set guidance_scale to 1")
        return super().null_condition(count)

    def steering(self, negative: Condition, scale: Tensor) -> Condition:
        return {"negative_text": negative["text"], "negative_scale": scale}

    def pipeline(self, network: nn.Module, scheduler: Any) -> StableDiffusionPipeline | LatentConsistencyModelPipeline:
        """A stock pipeline, without safety checker and feature extractor."""
        stock = LatentConsistencyModelPipeline if self.embeds_guidance else StableDiffusionPipeline
        return stock(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=network,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    @property
    def guidance_off(self) -> dict[str, float]:
        return {"guidance_scale": EMBEDDED_SCALE if self.embeds_guidance else 0.0}
