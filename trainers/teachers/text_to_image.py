"""Training a small text-to-image teacher from scratch: a stock StableDiffusionPipeline folder from captioned pictures.

First a VAE (:mod:`.autoencoder`); then a v-predicting UNet2DConditionModel together with its CLIP text encoder on the
fixed latents, with a BPE vocabulary of the captions.  The empty prompt is the null condition.

``OUTPUT.work`` has what a stopped training resumes from (the finished VAE, the tokenizer, the saves) and pictures.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import random
import time
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from diffusers.models.attention_processor import AttnProcessor
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import CLIPTokenizer

from stepdistill.config import Section, UserPath
from stepdistill.data.grid import save_grid
from stepdistill.data.order import Order
from stepdistill.denoiser import Prediction
from stepdistill.errors import UserError
from stepdistill.families.clip_text import encode_prompts
from stepdistill.families.stable_diffusion import StableDiffusionFamily
from stepdistill.files import replacing_folder, write_tensors
from stepdistill.objectives.denoising import capped_snr_weight, denoising_loss
from stepdistill.pipelines.saving import save_in_one_dtype
from stepdistill.readers import read_tensors
from stepdistill.seeds import RunSeed
from stepdistill.stock.folders import check_replaceable, without_places

from . import networks
from .autoencoder import VAESettings, encode_all, reconstruction_psnr, train_vae
from .captioned import Entry, read_pictures, training_caption
from .class_conditional import teacher_scheduler
from .loop import Channels, LoopSettings, autocast, check_multiples, fit


class TextSettings(Section):
    """The text encoder and its vocabulary."""

    vocabulary: int = Field(2048, ge=514, le=10**6, description="tokens at most; 514 are the bytes, start and end")
    max_tokens: int = Field(24, ge=4, le=4096, description="start and end counted; longer prompts are cut")
    width: int = Field(128, ge=8, le=8192, multiple_of=8)
    layers: int = Field(3, ge=1, le=128)
    heads: int = Field(4, ge=1, le=1024)

    @model_validator(mode="after")
    def _check_sizes(self) -> TextSettings:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        return self


class DenoiserSettings(LoopSettings):
    """The UNet, and the training of it and the text encoder."""

    block_channels: list[Channels] = Field([64, 128, 192], min_length=1, max_length=8, description="multiples of 16")
    attention: list[bool] = Field([False, True, True], description="whether each resolution attends to the text")
    layers_per_block: int = Field(1, ge=1, le=32)
    heads: int = Field(4, ge=1, le=1024)
    snr_cap: float = Field(5.0, gt=0, description="levels of a higher alpha^2/sigma^2 than this count less in the loss")
    noise_bias: float = Field(1.0, ge=1, description="t = T u^(1/noise_bias), u uniform: above 1 favours much noise")
    text_dropout: float = Field(0.1, ge=0, le=1, description="share of captions replaced by the empty one")

    @model_validator(mode="after")
    def _check_sizes(self) -> DenoiserSettings:
        check_multiples("block_channels", self.block_channels, 16)
        if len(self.attention) != len(self.block_channels):
            raise ValueError("attention: one value for each of block_channels")
        odd = [c for c in self.block_channels if c % self.heads]
        if odd:
            raise ValueError(f"block_channels: {odd[0]} is not a multiple of heads {self.heads}")
        return self


class SampleSettings(Section):
    """The pictures drawn at every save; steps and guidance are stated in the teacher's folder too."""

    prompts: list[str] = Field(["grinning face, noto style"], min_length=1)
    steps: int = Field(25, ge=1, le=10_000)
    guidance_scale: float = Field(3.0, ge=0)


class TextTeacherConfig(Section):
    """``stepdistill teacher train CONFIG`` with ``kind: text_to_image``."""

    kind: Literal["text_to_image"]
    output: UserPath = Field(description="the stock diffusers folder to write")
    data: UserPath = Field(description="a folder written by stepdistill teacher emoji")
    seed: RunSeed = 0
    bf16: bool = Field(False, description="autocast to bfloat16 in training")
    dtype: Literal["float32", "float16"] = Field("float32", description="of the weights that are written")
    vae: VAESettings = VAESettings(warmup=100)
    text: TextSettings = TextSettings()
    denoiser: DenoiserSettings = DenoiserSettings()
    samples: SampleSettings = SampleSettings()


def text_teacher_scheduler() -> DDIMScheduler:
    """The other teachers' scheduler with the steps_offset that the stock pipeline insists on; trailing steps do
    not use it."""
    return DDIMScheduler.from_config(teacher_scheduler().config, steps_offset=1)


def train_text_teacher(config: TextTeacherConfig, device: str = "cpu") -> Path:
    """Train both phases, then write a stock folder at ``config.output``; goes on from ``OUTPUT.work``."""
    check_replaceable(config.output, teacher=True)
    images, entries = read_pictures(config.data)
    factor = 2 ** (len(config.vae.block_channels) - 1 + len(config.denoiser.block_channels) - 1)
    if images.shape[1] != images.shape[2] or images.shape[1] % factor:
        raise UserError(
            f"data: {config.data} has pictures of {images.shape[2]}x{images.shape[1]}; this VAE and UNet need squares "
            f"of a multiple of {factor}"
        )
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    trained = torch.tensor([entry.split == "train" for entry in entries])
    known = [entry for entry in entries if entry.split == "train"]
    if not known:
        raise UserError(f"data: {config.data} has no picture of split train")
    which, held_out = ("held-out", pixels[~trained]) if len(known) < len(entries) else ("training", pixels)
    held_out = held_out[torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))]
    work = Path(f"{config.output}.work")
    vae = train_vae(config.vae, pixels[trained], held_out, work, config.seed, config.bf16, device)
    latents, psnr = _encode_latents(config, vae, pixels[trained], held_out)
    print(f"vae: {psnr:.2f} dB on {len(held_out)} {which} pictures")
    tokenizer = _find_tokenizer(config, entries)
    del pixels, images
    torch.manual_seed(config.seed + 1)
    text, net = config.text, config.denoiser
    text_encoder: nn.Module = networks.build_text_encoder(tokenizer, text.width, text.layers, text.heads)
    channels, height, width = latents.shape[1:]
    shape = (channels, height, width)
    unet = networks.build_unet(net.block_channels, net.attention, net.layers_per_block, net.heads, shape, text.width)
    unet, text_encoder = unet.to(device), text_encoder.to(device)
    family = StableDiffusionFamily.of(unet, text_teacher_scheduler(), vae, text_encoder, tokenizer)
    steps = _train_denoiser(config, family, latents, known, device)
    unet.register_to_config(
        _stepdistill={
            "trained_by": "stepdistill teacher train",
            "trained_steps": steps,
            "vae_psnr": round(psnr, 2),
            "config": without_places(config.model_dump(mode="json", exclude={"output", "data"})),
            "finished": time.strftime("%Y-%m-%d"),
        }
    )
    call = {"num_inference_steps": config.samples.steps, "guidance_scale": config.samples.guidance_scale}
    family.scheduler.register_to_config(_stepdistill={"steps": config.samples.steps, "call": call})
    path = Path(config.output)
    with replacing_folder(path) as temporary:
        save_in_one_dtype(family.to("cpu").pipeline(unet, family.scheduler), temporary, getattr(torch, config.dtype))
    return path


def _encode_latents(
    config: TextTeacherConfig, vae: AutoencoderKL, pixels: Tensor, held_out: Tensor
) -> tuple[Tensor, float]:
    """Latents of the training pictures and the held-out PSNR, stored in ``OUTPUT.work`` for this VAE and pictures."""
    file = Path(f"{config.output}.work") / "latents.safetensors"
    digest = hashlib.sha256()
    for tensor in (*vae.state_dict().values(), pixels, held_out):
        digest.update(tensor.cpu().contiguous().numpy())
    fingerprint = digest.hexdigest()
    if file.exists():
        with contextlib.suppress(OSError, ValueError, KeyError, SafetensorError):
            tensors, metadata = read_tensors(file)
            if metadata.get("fingerprint") == fingerprint:
                return tensors["latents"], tensors["psnr"].item()
        print(f"{file}: damaged, or of another VAE or other pictures; made anew")
    psnr = torch.tensor(reconstruction_psnr(vae, held_out), dtype=torch.float64)
    latents = encode_all(vae, pixels).contiguous()
    write_tensors(file, {"latents": latents, "psnr": psnr}, {"fingerprint": fingerprint})
    return latents, psnr.item()


def _find_tokenizer(config: TextTeacherConfig, entries: list[Entry]) -> CLIPTokenizer:
    """The one in ``OUTPUT.work``, or a new one of the captions and keywords, held-out ones too."""
    folder = Path(f"{config.output}.work") / "tokenizer"
    if folder.is_dir():
        return networks.load_tokenizer(folder)
    texts = [text for entry in entries for text in (entry.caption, *entry.keywords)]
    tokenizer = networks.build_tokenizer(texts, config.text.vocabulary, config.text.max_tokens)
    with replacing_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)
    return networks.load_tokenizer(folder)


def _train_denoiser(
    config: TextTeacherConfig, family: StableDiffusionFamily, latents: Tensor, entries: list[Entry], device: str
) -> int:
    """Train ``family``'s UNet and text encoder on latents (N, C, h, w); returns the steps done."""
    settings, work = config.denoiser, Path(f"{config.output}.work")
    if torch.device(device).type == "cpu":  # the fused kernel's backward is several times slower on so few tokens
        unet: Any = family.network
        unet.set_attn_processor(AttnProcessor())
    both = nn.ModuleDict({"unet": family.network, "text_encoder": family.text_encoder})
    generator = torch.Generator().manual_seed(config.seed)
    order = Order(len(latents), config.seed)

    def loss_at(step: int) -> Tensor:
        index = order.indices(step * settings.batch_size, settings.batch_size)
        draw = random.Random(f"{config.seed} {step}")
        captions = ["" if draw.random() < settings.text_dropout else training_caption(entries[i], draw) for i in index]
        x0 = latents[index].to(device)
        eps = torch.randn(x0.shape, generator=generator).to(device)
        share = torch.rand(len(index), generator=generator) ** (1 / settings.noise_bias)
        t = (family.schedule.num_levels * share).long().clamp(max=family.schedule.num_levels - 1).to(device)
        x_t = family.schedule.add_noise(x0, eps, t)
        with autocast(config.bf16, device):
            text = encode_prompts(family.tokenizer, family.text_encoder, captions)[0]
            output = family.forward(family.network, x_t, t, {"text": text})
        prediction = Prediction(family.schedule, x_t, t, output.float(), family.kind)
        return denoising_loss(prediction, x0, eps, family.kind, capped_snr_weight(family.schedule, t, settings.snr_cap))

    def show(step: int, ema: dict[str, Tensor]) -> None:
        average = copy.deepcopy(both).requires_grad_(False).eval()
        average.load_state_dict(ema, strict=False)
        _show_samples(config, family, average, work / "pictures" / f"samples-{step}.png")

    steps = fit(both, loss_at, settings, work / "denoiser.partial", generator, "denoiser", show)
    _show_samples(config, family, both, work / "pictures" / "samples.png")
    return steps


def _show_samples(config: TextTeacherConfig, family: StableDiffusionFamily, both: nn.ModuleDict, path: Path) -> None:
    """Pictures of the configured prompts by the stock pipeline, from fixed noise."""
    settings, prompts = config.samples, config.samples.prompts
    averaged = StableDiffusionFamily.of(
        both["unet"], text_teacher_scheduler(), family.vae, both["text_encoder"], family.tokenizer
    )
    pipeline = averaged.pipeline(averaged.network, averaged.scheduler)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(len(prompts), *family.sample_shape, generator=torch.Generator().manual_seed(0))
    pictures = pipeline(
        prompts,
        latents=noise.to(family.device),
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance_scale,
        output_type="np",
    ).images
    save_grid(torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) * 2 - 1, path)
