"""Tiny but complete teachers, built on the spot and saved as stock diffusers folders."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    CMStochasticIterativeScheduler,
    ConsistencyModelPipeline,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UnCLIPScheduler,
    UNet2DConditionModel,
    UNet2DModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def scheduler(name: str):
    """Teachers' schedulers by a short name."""
    pixel = {"clip_sample": False, "timestep_spacing": "trailing"}
    make = {
        "eps": lambda: DDIMScheduler(prediction_type="epsilon", **pixel),
        "x0": lambda: DDIMScheduler(prediction_type="sample", **pixel),
        "v": lambda: DDIMScheduler(
            prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2", rescale_betas_zero_snr=True, **pixel
        ),
        "cosine_eps": lambda: DDIMScheduler(beta_schedule="squaredcos_cap_v2", **pixel),
        "cosine_ddpm": lambda: DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        "unclip": lambda: UnCLIPScheduler(),
        "sigmoid": lambda: DDPMScheduler(beta_schedule="sigmoid"),
        "eps_4000": lambda: DDIMScheduler(num_train_timesteps=4000, beta_schedule="squaredcos_cap_v2", **pixel),
        "v_100": lambda: DDIMScheduler(num_train_timesteps=100, prediction_type="v_prediction", **pixel),
        "flow": lambda: FlowMatchEulerDiscreteScheduler(),
        "flow_100": lambda: FlowMatchEulerDiscreteScheduler(num_train_timesteps=100),
        "flow_shift": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        "edm": lambda: CMStochasticIterativeScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5),
        "sd_ddim_eps": lambda: DDIMScheduler(
            **SD_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type="epsilon"
        ),
        "sd_pndm_eps": lambda: PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1),
        "sd_euler_v": lambda: EulerDiscreteScheduler(**SD_BETAS, prediction_type="v_prediction", steps_offset=1),
        "sd_dpm_v": lambda: DPMSolverMultistepScheduler(**SD_BETAS, prediction_type="v_prediction", steps_offset=1),
        "sd_zero_snr_v": lambda: DDIMScheduler(
            **SD_BETAS,
            clip_sample=False,
            steps_offset=1,
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            timestep_spacing="trailing",
        ),
        "sd_x0": lambda: DDIMScheduler(**SD_BETAS, clip_sample=False, steps_offset=1, prediction_type="sample"),
    }
    return make[name]()


def unet(channels: int = 1, labels: int | None = None, null: bool = False, seed: int = 0, size: int = 8) -> UNet2DModel:
    """A UNet2DModel of about 20k parameters; with ``null`` the label ``labels`` is the null label."""
    torch.manual_seed(seed)
    network = UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        attention_head_dim=4,
        num_class_embeds=None if labels is None else labels + int(null),
    )
    if null:
        network.register_to_config(_stepdistill={"null_label": labels})
    return network


def save_pixels(path: Path, kind: str = "v", provenance: dict | None = None, **network) -> Path:
    """A ConsistencyModelPipeline folder around :func:`unet` with the scheduler ``kind``."""
    stock = scheduler(kind)
    if provenance is not None:
        stock.register_to_config(_stepdistill=provenance)
    ConsistencyModelPipeline(unet(**network), stock).save_pretrained(path)
    return path


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIPTokenizer that knows single characters, from files written on the spot."""
    folder.mkdir(parents=True, exist_ok=True)
    letters = [chr(c) for c in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=16)


def condition_unet() -> UNet2DConditionModel:
    """A UNet2DConditionModel on 8x8 latents with text of width 8."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def save_stable_diffusion(path: Path, kind: str = "sd_ddim_eps") -> Path:
    """A complete StableDiffusionPipeline folder: 8x8 latents, 16x16 pictures."""
    words = tokenizer(path.with_name(f"{path.name}-tokenizer"))
    torch.manual_seed(0)
    StableDiffusionPipeline(
        unet=condition_unet(),
        vae=AutoencoderKL(
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
            sample_size=16,
        ),
        text_encoder=CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=8,
                intermediate_size=8,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=16,
                bos_token_id=len(words) - 2,
                eos_token_id=len(words) - 1,
            )
        ),
        tokenizer=words,
        scheduler=scheduler(kind),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(path)
    return path


def save_in_dtypes(folder: Path, path: Path, text_encoder_config: str | None = None, **dtypes: torch.dtype) -> Path:
    """The pipeline in ``folder`` again at ``path``, each part that is named in its dtype, as fine-tunes are saved.

    Args:
        text_encoder_config: the dtype that the text encoder's config names; that of its weights by default.
    """
    pipeline = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    for name, dtype in dtypes.items():
        torch.nn.Module.to(getattr(pipeline, name), dtype)
    pipeline.save_pretrained(path)
    if text_encoder_config is not None:
        file = path / "text_encoder" / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "dtype": text_encoder_config}))
    return path
