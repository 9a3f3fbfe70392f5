"""Stable Diffusion of real and reduced sizes with random weights: what a network costs does not depend on what it
knows."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from stepdistill.precision import keep_norms_in_float32

from .stable_diffusion import StableDiffusionFamily

RANDOM_SIZES: dict[str, dict[str, Any]] = {
    "sd-small": {"block_out_channels": (64, 128, 256, 256), "cross_attention_dim": 256, "sample_size": 32},
    "sd15": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768, "sample_size": 64},
}
"""UNets of teachers: a reduced Stable Diffusion, and SD 1.5's own size."""

SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
    "sample_size": 128,
}
PIPELINE_SIZES = {**RANDOM_SIZES, "sdxl": SDXL}
"""UNets of whole pipelines."""
VAE_CHANNELS = {"sd-small": (32, 64, 128, 128)}
TEXT_ENCODERS = {  # width, layers, heads of CLIP's
    "sd-small": [(256, 6, 4)],
    "sd15": [(768, 12, 12)],
    "sdxl": [(768, 12, 12), (1280, 32, 20)],
}


def random_family(size: str, dtype: torch.dtype = torch.float32) -> StableDiffusionFamily:
    """A teacher of a size of :data:`RANDOM_SIZES`, its frozen weights random and in ``dtype``."""
    pipeline = random_pipeline(size, dtype)
    keep_norms_in_float32(pipeline.unet)
    return StableDiffusionFamily.from_pipeline(pipeline, size)


def random_pipeline(
    size: str, dtype: torch.dtype = torch.float32
) -> StableDiffusionPipeline | StableDiffusionXLPipeline:
    """A whole stock pipeline of a size of :data:`PIPELINE_SIZES`, random weights, a tokenizer of single characters."""
    torch.manual_seed(0)
    channels = VAE_CHANNELS.get(size, (128, 256, 512, 512))
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
    )
    shapes = TEXT_ENCODERS[size]
    encoders = [_text_encoder(*shape, projects=index > 0) for index, shape in enumerate(shapes)]
    parts = {
        "unet": UNet2DConditionModel(**PIPELINE_SIZES[size]),
        "vae": vae,
        "scheduler": _scheduler(),
        "text_encoder": encoders[0],
        "tokenizer": _tokenizer(),
    }
    if size == "sdxl":
        pipe = StableDiffusionXLPipeline(**parts, text_encoder_2=encoders[1], tokenizer_2=_tokenizer())
    else:
        pipe = StableDiffusionPipeline(
            **parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False
        )
    for module in (pipe.unet, vae, *encoders):
        module.requires_grad_(False).eval().to(dtype)
    return pipe


def _scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def _text_encoder(width: int, layers: int, heads: int, projects: bool) -> CLIPTextModel | CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        projection_dim=width,
    )
    return CLIPTextModelWithProjection(config) if projects else CLIPTextModel(config)


def _tokenizer() -> CLIPTokenizer:
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        Path(folder, "merges.txt").write_text("#version: 0.2\n")
        return CLIPTokenizer.from_pretrained(folder, model_max_length=77)
