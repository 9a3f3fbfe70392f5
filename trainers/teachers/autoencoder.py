"""Training a small VAE from scratch, and standardising its latents.

The loss: absolute and squared errors of pixels, absolute errors of the differences of neighbours, a small KL.  The
latents are then standardised inside the VAE's weights, so that its scaling factor is 1.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from pydantic import Field, model_validator
from torch import Tensor

from stepdistill.data.grid import save_grid
from stepdistill.data.order import Order
from stepdistill.errors import UserError
from stepdistill.files import replacing_folder
from stepdistill.run import differences

from .loop import Channels, LoopSettings, autocast, check_multiples, fit
from .networks import build_vae, load_vae


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
    def _check_sizes(self) -> VAESettings:
        check_multiples("block_channels", self.block_channels, 8)
        return self


def vae_loss(vae: AutoencoderKL, x0: Tensor, settings: VAESettings, generator: torch.Generator) -> Tensor:
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
def encode_all(vae: AutoencoderKL, pixels: Tensor, batch_size: int = 64) -> Tensor:
    """The posterior's means of pixels (N, 3, H, W)."""
    return torch.cat([vae.encode(chunk.to(vae.device)).latent_dist.mean.cpu() for chunk in pixels.split(batch_size)])


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, pixels: Tensor, batch_size: int = 64) -> float:
    """Mean PSNR in dB over pictures (N, 3, H, W) in [-1, 1], through the posterior's mean."""
    values = []
    for chunk in pixels.split(batch_size):
        x0 = chunk.to(vae.device)
        error = vae.decode(vae.encode(x0).latent_dist.mean).sample.clamp(-1, 1) - x0
        values.append(10 * torch.log10(4 / error.square().mean(dim=(1, 2, 3)).clamp(min=1e-10)))
    return torch.cat(values).mean().item()


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, pixels: Tensor) -> None:
    """Give each latent channel mean 0 and variance 1 over ``pixels`` by changing the two 1x1 convolutions next to the
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


def train_vae(
    settings: VAESettings, pixels: Tensor, held_out: Tensor, work: Path, seed: int, bf16: bool, device: str
) -> AutoencoderKL:
    """Train a VAE on pixels (N, 3, H, W), standardise its latents, write it to ``work/vae``; or load it from there.

    Args:
        held_out: pixels that are reconstructed to show the progress.
        work: the folder of saves and pictures.
        bf16: autocast to bfloat16.

    Raises:
        UserError: the one in ``work`` was trained with other settings.
    """
    stated = settings.model_dump(mode="json", exclude={"save_every"})
    if (work / "vae").is_dir():
        vae = load_vae(work / "vae").to(device)
        odd = differences((vae.config.get("_stepdistill") or {}).get("vae", stated), stated, "vae")
        if odd:
            raise UserError(
                f"{work / 'vae'}: trained with other settings: {'; '.join(odd[:3])}; remove it, or give them"
            )
        return vae
    torch.manual_seed(seed)
    size = pixels.shape[-1]
    vae = build_vae(settings.block_channels, settings.layers_per_block, settings.latent_channels, size).to(device)
    generator = torch.Generator().manual_seed(seed)
    order = Order(len(pixels), seed)

    def loss_at(step: int) -> Tensor:
        x0 = pixels[order.indices(step * settings.batch_size, settings.batch_size)].to(device)
        with autocast(bf16, device):
            return vae_loss(vae, x0, settings, generator)

    def show(step: int, ema: dict[str, Tensor]) -> None:
        average = copy.deepcopy(vae).requires_grad_(False).eval()
        average.load_state_dict(ema, strict=False)
        _show_reconstructions(average, held_out, work / "pictures" / f"vae-{step}.png")
        print(f"\nvae {step}: {reconstruction_psnr(average, held_out[:128]):.2f} dB")

    fit(vae, loss_at, settings, work / "vae.partial", generator, "vae", show)
    standardise_latents(vae, pixels)
    vae.register_to_config(_stepdistill={"vae": stated})
    _show_reconstructions(vae, held_out, work / "pictures" / "vae.png")
    with replacing_folder(work / "vae") as temporary:
        vae.save_pretrained(temporary)
    return vae


@torch.no_grad()
def _show_reconstructions(vae: AutoencoderKL, pixels: Tensor, path: Path) -> None:
    """Rows of pictures, each followed by the row of its reconstructions."""
    rows = []
    for x0 in pixels[:60].split(20):
        rows += [x0, vae.decode(vae.encode(x0.to(vae.device)).latent_dist.mean).sample.cpu()]
    save_grid(torch.cat(rows), path, columns=min(20, len(pixels)))
