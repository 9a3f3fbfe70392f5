"""Training a small text-to-image teacher from scratch: a stock StableDiffusionPipeline folder from captioned pictures.

First a VAE (absolute and squared errors of pixels, absolute ones of their differences, a small KL), whose latents are
then standardised inside its own weights, so that its scaling factor is 1; then a v-predicting UNet2DConditionModel
together with its CLIP text encoder on the fixed latents, with a BPE vocabulary of the captions.  The empty prompt is
the null condition.

What a stopped training goes on from is in ``OUTPUT.work``: the VAE once it is done, the tokenizer, the saves, pictures.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import random
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, ModelMixin
from diffusers.models.attention_processor import AttnProcessor
from pydantic import Field, model_validator
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from stepdistill.config import Section, UserPath
from stepdistill.data.order import Order
from stepdistill.denoiser import Prediction
from stepdistill.errors import UserError
from stepdistill.families.stable_diffusion import StableDiffusionFamily, encode_prompts
from stepdistill.files import replacing_folder, write_tensors
from stepdistill.objectives.denoising import capped_snr_weight, denoising_loss
from stepdistill.pipelines.saving import save_in_one_dtype
from stepdistill.readers import read_tensors
from stepdistill.run import differences
from stepdistill.seeds import RunSeed
from stepdistill.stock.folders import check_replaceable, without_places
from stepdistill.trainers.loop.grids import save_grid

from . import networks as small
from .captioned import Entry, read_pictures, training_caption
from .class_conditional import Channels, LoopSettings, autocast, fit, teacher_scheduler


def _multiples(key: str, channels: list[int], of: int) -> None:
    odd = [c for c in channels if c < of or c % of]
    if odd:
        raise ValueError(f"{key}: {odd[0]} is not a multiple of {of}")


class VAESettings(LoopSettings):
    """The autoencoder and its training."""

    block_channels: list[Channels] = Field(
        [24, 32, 64], min_length=1, max_length=8, description="multiples of 8; halved between them"
    )
    layers_per_block: int = Field(1, ge=1, le=32)
    latent_channels: int = Field(4, ge=1, le=1024)
    kl_weight: float = Field(3e-4, ge=0, description="of the mean KL, against the mean absolute error")
    square_weight: float = Field(2.0, ge=0, description="of the mean squared error: colours come sooner")
    edge_weight: float = Field(0.5, ge=0, description="of the absolute error of differences between neighbours")

    @model_validator(mode="after")
    def _fits(self):
        _multiples("block_channels", self.block_channels, 8)
        return self


class TextSettings(Section):
    """The text encoder and its vocabulary."""

    vocabulary: int = Field(2048, ge=514, le=10**6, description="tokens at most; 514 are the bytes, start and end")
    max_tokens: int = Field(24, ge=4, le=4096, description="start and end counted; longer prompts are cut")
    width: int = Field(128, ge=8, le=8192, multiple_of=8)
    layers: int = Field(3, ge=1, le=128)
    heads: int = Field(4, ge=1, le=1024)

    @model_validator(mode="after")
    def _fits(self):
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
    def _fits(self):
        _multiples("block_channels", self.block_channels, 16)
        if len(self.attention) != len(self.block_channels):
            raise ValueError("attention: one value for each of block_channels")
        odd = [c for c in self.block_channels if c % self.heads]
        if odd:
            raise ValueError(f"block_channels: {odd[0]} is not a multiple of heads {self.heads}")
        return self


class SampleSettings(Section):
    """The pictures drawn at every save; the folder says that the teacher is called so."""

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


# -- the VAE -----------------------------------------------------------------------------------------------


def vae_loss(vae: ModelMixin, x0: Tensor, settings: VAESettings, generator: torch.Generator) -> Tensor:
    """Mean absolute and squared error of pixels (B, 3, H, W), absolute error of their differences, and the KL's mean
    over latents."""
    posterior = vae.encode(x0).latent_dist
    error = vae.decode(posterior.sample(generator)).sample.float() - x0
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    pixels = error.abs().mean() + settings.square_weight * error.square().mean()
    return pixels + settings.edge_weight * edges + settings.kl_weight * kl


@torch.no_grad()
def encode_all(vae: ModelMixin, pixels: Tensor, batch_size: int = 64) -> Tensor:
    """The posterior's means of pixels (N, 3, H, W)."""
    return torch.cat([vae.encode(chunk.to(vae.device)).latent_dist.mean.cpu() for chunk in pixels.split(batch_size)])


@torch.no_grad()
def reconstruction_psnr(vae: ModelMixin, pixels: Tensor, batch_size: int = 64) -> float:
    """Mean PSNR in dB over pictures (N, 3, H, W) in [-1, 1], through the posterior's mean."""
    values = []
    for chunk in pixels.split(batch_size):
        x0 = chunk.to(vae.device)
        error = vae.decode(vae.encode(x0).latent_dist.mean).sample.clamp(-1, 1) - x0
        values.append(10 * torch.log10(4 / error.square().mean(dim=(1, 2, 3)).clamp(min=1e-10)))
    return torch.cat(values).mean().item()


@torch.no_grad()
def standardise_latents(vae: ModelMixin, pixels: Tensor) -> None:
    """Give each latent channel mean 0 and variance 1 over ``pixels`` by changing the two 1x1 convolutions beside the
    latents: what is decoded stays the same, and ``scaling_factor`` is 1."""
    latents = encode_all(vae, pixels)
    mean, std = (f(latents, dim=(0, 2, 3)).to(vae.device) for f in (torch.mean, torch.std))
    into, out = vae.quant_conv, vae.post_quant_conv
    out.bias += (out.weight[..., 0, 0] * mean).sum(1)
    out.weight *= std[None, :, None, None]
    count = len(std)
    into.weight[:count] /= std[:, None, None, None]
    into.bias[:count] = (into.bias[:count] - mean) / std
    into.bias[count:] -= 2 * std.log()
    vae.register_to_config(scaling_factor=1.0)


def train_vae(config: TextTeacherConfig, pixels: Tensor, held_out: Tensor, device: str) -> ModelMixin:
    """Train the VAE on pixels (N, 3, H, W), standardise its latents, keep it in ``OUTPUT.work/vae``; loads it from
    there if it is done already.

    Raises:
        UserError: the one that is done was trained with other settings.
    """
    work, settings = Path(f"{config.output}.work"), config.vae
    said = settings.model_dump(mode="json", exclude={"save_every"})
    if (work / "vae").is_dir():
        vae = small.load_vae(work / "vae").to(device)
        odd = differences((vae.config.get("_stepdistill") or {}).get("vae", said), said, "vae")
        if odd:
            raise UserError(
                f"{work / 'vae'}: trained with other settings: {'; '.join(odd[:3])}; remove it, or give them"
            )
        return vae
    torch.manual_seed(config.seed)
    net, size = settings, pixels.shape[-1]
    vae = small.build_vae(net.block_channels, net.layers_per_block, net.latent_channels, size).to(device)
    generator = torch.Generator().manual_seed(config.seed)
    order = Order(len(pixels), config.seed)

    def loss_at(step: int) -> Tensor:
        x0 = pixels[order.indices(step * settings.batch_size, settings.batch_size)].to(device)
        with autocast(config.bf16, device):
            return vae_loss(vae, x0, settings, generator)

    def show(step: int, ema: dict[str, Tensor]) -> None:
        average = copy.deepcopy(vae).requires_grad_(False).eval()
        average.load_state_dict(ema, strict=False)
        _show_reconstructions(average, held_out, work / "pictures" / f"vae-{step}.png")
        print(f"\nvae {step}: {reconstruction_psnr(average, held_out[:128]):.2f} dB")

    fit(vae, loss_at, settings, work / "vae.partial", generator, "vae", show)
    standardise_latents(vae, pixels)
    vae.register_to_config(_stepdistill={"vae": said})
    _show_reconstructions(vae, held_out, work / "pictures" / "vae.png")
    with replacing_folder(work / "vae") as temporary:
        vae.save_pretrained(temporary)
    return vae


@torch.no_grad()
def _show_reconstructions(vae: ModelMixin, pixels: Tensor, path: Path) -> None:
    """Rows of pictures, each followed by the row of its reconstructions."""
    rows = []
    for x0 in pixels[:60].split(20):
        rows += [x0, vae.decode(vae.encode(x0.to(vae.device)).latent_dist.mean).sample.cpu()]
    save_grid(torch.cat(rows), path, columns=min(20, len(pixels)))


# -- the denoiser ------------------------------------------------------------------------------------------


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
    vae = train_vae(config, pixels[trained], held_out, device)
    latents, psnr = _latents(config, vae, pixels[trained], held_out)
    print(f"vae: {psnr:.2f} dB on {len(held_out)} {which} pictures")
    tokenizer = _tokenizer(config, entries)
    del pixels, images
    torch.manual_seed(config.seed + 1)
    text, net, shape = config.text, config.denoiser, tuple(latents.shape[1:])
    text_encoder = small.build_text_encoder(tokenizer, text.width, text.layers, text.heads).to(device)
    unet = small.build_unet(net.block_channels, net.attention, net.layers_per_block, net.heads, shape, text.width)
    unet = unet.to(device)
    family = StableDiffusionFamily(unet, text_teacher_scheduler(), vae, text_encoder, tokenizer)
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


def _latents(config: TextTeacherConfig, vae: ModelMixin, pixels: Tensor, held_out: Tensor) -> tuple[Tensor, float]:
    """Latents of the training pictures and the held-out PSNR, kept in ``OUTPUT.work`` for this VAE and pictures."""
    file = Path(f"{config.output}.work") / "latents.safetensors"
    digest = hashlib.sha256()
    for tensor in (*vae.state_dict().values(), pixels, held_out):
        digest.update(tensor.cpu().contiguous().numpy())
    made_of = {"made_of": digest.hexdigest()}
    if file.exists():
        with contextlib.suppress(OSError, ValueError, KeyError, SafetensorError):
            tensors, metadata = read_tensors(file)
            if metadata.get("made_of") == made_of["made_of"]:
                return tensors["latents"], tensors["psnr"].item()
        print(f"{file}: damaged, or of another VAE or other pictures; made anew")
    psnr = torch.tensor(reconstruction_psnr(vae, held_out), dtype=torch.float64)
    latents = encode_all(vae, pixels).contiguous()
    write_tensors(file, {"latents": latents, "psnr": psnr}, made_of)
    return latents, psnr.item()


def _tokenizer(config: TextTeacherConfig, entries: list[Entry]) -> PreTrainedTokenizerBase:
    """The one in ``OUTPUT.work``, or a new one of the captions and keywords, held-out ones too."""
    folder = Path(f"{config.output}.work") / "tokenizer"
    if folder.is_dir():
        return small.load_tokenizer(folder)
    texts = [text for entry in entries for text in (entry.caption, *entry.keywords)]
    tokenizer = small.build_tokenizer(texts, config.text.vocabulary, config.text.max_tokens)
    with replacing_folder(folder) as temporary:
        tokenizer.save_pretrained(temporary)
    return small.load_tokenizer(folder)


def _train_denoiser(
    config: TextTeacherConfig, family: StableDiffusionFamily, latents: Tensor, entries: list[Entry], device: str
) -> int:
    """Train ``family``'s UNet and text encoder on latents (N, C, h, w); gives the steps done."""
    settings, work = config.denoiser, Path(f"{config.output}.work")
    if torch.device(device).type == "cpu":  # the fused kernel's backward is several times slower on so few tokens
        family.network.set_attn_processor(AttnProcessor())
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
    """The configured prompts, drawn by the stock pipeline from fixed noise."""
    settings, prompts = config.samples, config.samples.prompts
    averaged = StableDiffusionFamily(
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
