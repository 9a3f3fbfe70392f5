"""The latent part of a family: between pixels and what its network denoises."""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence

import torch
from diffusers import AutoencoderTiny, ModelMixin
from torch import Tensor, nn

from stepdistill.errors import UserError, reading
from stepdistill.stock.loading import load_network

PIXELS_AT_ONCE = 2**21
"""Pixels that a VAE encodes or decodes in one call, where no gradient is wanted: two pictures of 1024 x 1024."""


class Latents(abc.ABC):
    """What a network denoises, and the pictures that it stands for.

    Attributes:
        image_shape: (C, H, W) of the pictures.
        vae: the network between them; None where the pictures themselves are denoised.
    """

    image_shape: tuple[int, ...]
    vae: ModelMixin | None = None

    @abc.abstractmethod
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The law of the latents of pixels (B, C, H, W) in [-1, 1]: mean and standard deviation, float32 (B, ...) each.

        Raises:
            UserError: there is no VAE.
        """

    @abc.abstractmethod
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels (B, C, H, W) in [-1, 1] to what is denoised: a VAE posterior's mean, float32."""

    @abc.abstractmethod
    def decoder(self, path: str | None = None) -> Callable[[Tensor], Tensor]:
        """Samples to pixels, unclamped and differentiable; ``path``: a smaller decoder for the same latents.

        Raises:
            UserError: ``path`` holds no such decoder, or there is no VAE.
        """

    @torch.no_grad()
    def decode(self, samples: Tensor) -> Tensor:
        """Samples to pixels (B, C, H, W) in [-1, 1], clamped; a few at once."""
        decoder = self.decoder()
        parts = [decoder(part) for part in samples.split(self._count_at_once())]
        return torch.cat(parts).clamp(-1, 1)

    def _count_at_once(self) -> int:
        return max(1, PIXELS_AT_ONCE // math.prod(self.image_shape[1:]))

    def networks(self) -> dict[str, nn.Module]:
        """Its networks by the names of their folders."""
        return {} if self.vae is None else {"vae": self.vae}

    def to(self, device: torch.device | str) -> None:
        """Move its networks."""
        for network in self.networks().values():
            network.to(device)


class Pixels(Latents):
    """Pictures that are denoised as they are."""

    def __init__(self, image_shape: tuple[int, ...]):
        self.image_shape = image_shape

    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        raise UserError("this teacher has no VAE: its samples are the pictures")

    def encode(self, pixels: Tensor) -> Tensor:
        return pixels

    def decoder(self, path: str | None = None) -> Callable[[Tensor], Tensor]:
        if path is not None:
            raise UserError(f"decoder = {path}: this teacher's samples are pixels already; remove it")
        return lambda samples: samples


class VAELatents(Latents):
    """Latents of a VAE: ``latent = (encoded - shift) * scale``, of any rank.

    Args:
        image_shape: (C, H, W) of the pictures.
        scale, shift: numbers, or one a channel; by default the VAE's ``scaling_factor`` and no shift.
    """

    vae: ModelMixin

    def __init__(
        self,
        vae: ModelMixin,
        image_shape: tuple[int, ...],
        scale: float | Sequence[float] | None = None,
        shift: float | Sequence[float] = 0.0,
    ):
        self.vae = vae.requires_grad_(False).eval()
        self.image_shape = image_shape
        self.scale = vae.config.scaling_factor if scale is None else scale
        self.shift = shift

    @torch.no_grad()
    def posterior(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        means, stds = [], []
        for part in pixels.split(self._count_at_once()):
            law = self.vae.encode(part.to(self.vae.device, self.vae.dtype)).latent_dist
            scale = _per_channel(self.scale, law.mean)
            means.append(((law.mean - _per_channel(self.shift, law.mean)) * scale).float())
            stds.append((law.std * scale).float())
        return torch.cat(means), torch.cat(stds)

    def encode(self, pixels: Tensor) -> Tensor:
        return self.posterior(pixels)[0]

    def decoder(self, path: str | None = None) -> Callable[[Tensor], Tensor]:
        """The VAE's decoder, or an AutoencoderTiny (TAESD) at ``path``, which takes the scaled latents as they are."""
        vae, scale, shift = self.vae, self.scale, self.shift
        if path is not None:
            vae = read_tiny_vae(path, "decoder").to(vae.device)
            scale, shift = vae.config.scaling_factor, 0.0

        def decode(samples: Tensor) -> Tensor:
            latents = samples.to(vae.device, vae.dtype)
            latents = latents / _per_channel(scale, latents) + _per_channel(shift, latents)
            return vae.decode(latents).sample.float()

        return decode


def _per_channel(values: float | Sequence[float], like: Tensor) -> float | Tensor:
    """A number as it is; one a channel as a tensor that multiplies ``like`` (B, C, ...)."""
    if isinstance(values, int | float):
        return values
    return torch.tensor(values, dtype=like.dtype, device=like.device).reshape(1, -1, *[1] * (like.ndim - 2))


def read_tiny_vae(path: str, key: str) -> AutoencoderTiny:
    """The frozen AutoencoderTiny (TAESD) of a folder or hub id; ``key`` is the config's, for errors.

    Raises:
        UserError: there is none.
    """
    what = f"{key} = {path}"
    with reading(what, "name the folder or hub id of a TAESD", "no AutoencoderTiny can be loaded from it"):
        return load_network(AutoencoderTiny, path, what).requires_grad_(False).eval()
