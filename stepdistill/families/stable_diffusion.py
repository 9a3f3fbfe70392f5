"""Stable Diffusion 1.x and 2.x: UNet2DConditionModel on VAE latents, CLIP text.

Latent consistency models with a guidance embedding (``time_cond_proj_dim``) are of this family too: always called with
the scale of their pipeline's default, and not guided by a null prompt.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderTiny,
    LatentConsistencyModelImg2ImgPipeline,
    LatentConsistencyModelPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn

from stepdistill.denoiser import Condition
from stepdistill.errors import UserError, reading
from stepdistill.readers import digest_of
from stepdistill.schedule import clipping_of, from_scheduler
from stepdistill.stock.loading import load_network

from .base import Family
from .calls import StockCalls

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


def read_tiny_vae(path: str, key: str) -> AutoencoderTiny:
    """The frozen AutoencoderTiny (TAESD) of a folder or hub id; ``key`` is the config's, for errors.

    Raises:
        UserError: there is none.
    """
    what = f"{key} = {path}"
    with reading(what, "name the folder or hub id of a TAESD", "no AutoencoderTiny can be loaded from it"):
        return load_network(AutoencoderTiny, path, what).requires_grad_(False).eval()


@torch.no_grad()
def encode_prompts(tokenizer, text_encoder: nn.Module, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Last hidden states (B, tokens, width), as the stock pipeline makes them, and which tokens are no padding."""
    tokens = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    )
    device = text_encoder.device
    mask = tokens.attention_mask.to(device)
    seen = mask if getattr(text_encoder.config, "use_attention_mask", False) else None
    return text_encoder(tokens.input_ids.to(device), attention_mask=seen)[0], mask


class PromptEncoder:
    """Prompts as vectors for a router: float32 whatever the pipeline computes in, so that training and serving route
    alike (in bfloat16 about one prompt in a thousand would change sides)."""

    def __init__(self, tokenizer, text_encoder: nn.Module):
        self.tokenizer = tokenizer
        whole = all(p.dtype == torch.float32 for p in text_encoder.parameters())
        self.network = text_encoder if whole else copy.deepcopy(text_encoder).float()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the encoder's weights and the tokenizer's vocabulary."""
        vocabulary = json.dumps(sorted(self.tokenizer.get_vocab().items()))
        return hashlib.sha256(f"{digest_of(self.network.state_dict())} {vocabulary}".encode()).hexdigest()

    def __call__(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Hidden states (B, tokens, width), and their means over the tokens that are no padding, (B, width)."""
        hidden, mask = encode_prompts(self.tokenizer, self.network, prompts)
        mask = mask.to(hidden).unsqueeze(-1)
        return hidden, (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)


class StableDiffusionCalls(StockCalls):
    """Pipelines of prompts with one CLIP text encoder and a VAE."""

    encoder_parts = ("text_encoder", "tokenizer")
    shared_parts = (*encoder_parts, "vae")

    def with_noise(self) -> StableDiffusionCalls:
        """The pipeline that draws from prompts alone, in place of one that changes pictures."""
        target = TEXT_TO_IMAGE.get(type(self.pipeline))
        if target is None or self.network.config.in_channels != self.vae.config.latent_channels:
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
    condition_kind = "prompt"
    has_null = True
    passes_eta = True
    takes_negatives = True

    def __init__(self, network: UNet2DConditionModel, scheduler, vae, text_encoder, tokenizer):
        self.network = network.requires_grad_(False).eval()
        self.scheduler = scheduler
        self.vae = vae.requires_grad_(False).eval()
        self.text_encoder = text_encoder.requires_grad_(False).eval()
        self.tokenizer = tokenizer
        self.schedule, self.kind = from_scheduler(scheduler)
        self.clipping = clipping_of(scheduler)
        size = network.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.sample_shape = (network.config.in_channels, height, width)
        self.vae_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self._null: Tensor | None = None
        self.embeds_guidance = bool(network.config.get("time_cond_proj_dim"))
        self.has_null = not self.embeds_guidance

    @classmethod
    def from_components(cls, components: dict, source: str) -> StableDiffusionFamily:
        """From a loaded pipeline's components.

        Raises:
            UserError: the UNet is an inpainting or depth one, or is called in another way.
        """
        network = components["unet"]
        if network.config.in_channels != components["vae"].config.latent_channels:
            raise UserError(
                f"teacher {source}: its UNet takes {network.config.in_channels} channels, not the VAE's "
                f"{components['vae'].config.latent_channels}; inpainting and depth models are not supported"
            )
        cls.check_network(network, source)
        return cls(
            network,
            components["scheduler"],
            components["vae"],
            components["text_encoder"],
            components["tokenizer"],
        )

    def forward(self, network: nn.Module, x: Tensor, time: Tensor, condition: Condition) -> Tensor:
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

    def mid_block(self, network: nn.Module) -> nn.Module:
        return network.mid_block

    def feature_blocks(self, network: nn.Module) -> list[nn.Module]:
        return [*network.down_blocks, network.mid_block, *network.up_blocks]

    def fresh_network(self, like: nn.Module | None = None) -> UNet2DConditionModel:
        return UNet2DConditionModel.from_config((self.network if like is None else like).config)

    def encode_conditions(self, items: list) -> Condition:
        """Prompts to CLIP's last hidden states, (B, tokens, width); too long ones are cut, as stock does."""
        return {"text": encode_prompts(self.tokenizer, self.text_encoder, items)[0].to(self.device)}

    def prompts_cut(self, prompts: list[str]) -> list[int]:
        cut = []
        for start in range(0, len(prompts), 1000):
            tokens = self.tokenizer([str(p) for p in prompts[start : start + 1000]], verbose=False)["input_ids"]
            cut += [start + i for i, ids in enumerate(tokens) if len(ids) > self.tokenizer.model_max_length]
        return cut

    @property
    def prompt_encoder(self) -> PromptEncoder:
        return PromptEncoder(self.tokenizer, self.text_encoder)

    def null_condition(self, count: int) -> Condition:
        if self.embeds_guidance:
            raise UserError("this model has its guidance embedded, so it is not guided again: set guidance_scale to 1")
        if self._null is None:
            self._null = self.encode_conditions([""])["text"]
        return {"text": self._null.to(self.device).expand(count, -1, -1)}

    def steering(self, negative: Condition, scale: Tensor) -> Condition:
        return {"negative_text": negative["text"], "negative_scale": scale}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        _, height, width = self.sample_shape
        return (self.vae.config.in_channels, height * self.vae_factor, width * self.vae_factor)

    @torch.no_grad()
    def encode_posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The VAE's posterior times its scaling factor."""
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        mean, std = (
            (part * self.vae.config.scaling_factor).float().to(self.device) for part in (posterior.mean, posterior.std)
        )
        return mean, std

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Latents: the posterior's mean."""
        return self.encode_posterior(pixels)[0]

    def decoder(self, path: str | None = None) -> Callable[[Tensor], Tensor]:
        """The VAE's decoder, or an AutoencoderTiny (TAESD) at ``path``, which takes the scaled latents as they are."""
        vae = self.vae
        if path is not None:
            vae = read_tiny_vae(path, "decoder").to(self.device)
        factor = vae.config.scaling_factor
        return lambda samples: vae.decode(samples.to(vae.device, vae.dtype) / factor).sample.float()

    def pipeline(self, network: nn.Module, scheduler) -> StableDiffusionPipeline | LatentConsistencyModelPipeline:
        """A stock pipeline, without safety checker and feature extractor."""
        made = LatentConsistencyModelPipeline if self.embeds_guidance else StableDiffusionPipeline
        return made(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=network,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def networks(self) -> dict[str, nn.Module]:
        return {"unet": self.network, "vae": self.vae, "text_encoder": self.text_encoder}

    @property
    def guidance_off(self) -> dict[str, float]:
        return {"guidance_scale": EMBEDDED_SCALE if self.embeds_guidance else 0.0}

    def to(self, device: torch.device | str) -> StableDiffusionFamily:
        for part in (self.network, self.vae, self.text_encoder):
            part.to(device)
        self._null = None
        return self
