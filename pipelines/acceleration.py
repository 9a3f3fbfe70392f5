"""A loaded pipeline made as fast as its network passes, in parts that can each be undone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from torch import nn

from stepdistill.attention import kernels
from stepdistill.attention.choice import choose_fastest, require_backend
from stepdistill.attention.fused import is_fused
from stepdistill.attention.modules import find_attention, fuse, head_width, set_backend, unfuse
from stepdistill.errors import UserError
from stepdistill.families import calls_of
from stepdistill.families.calls import compiled_blocks
from stepdistill.families.latents import read_tiny_vae

Choice = bool | Literal["auto"]


class Acceleration:
    """What :func:`accelerate` did to a pipeline, and how to take it back.

    Attributes:
        done: what was done, by part, in words.
        skipped: what was not, with the reason.
    """

    def __init__(self) -> None:
        self.done: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self._undo: dict[str, list[Callable[[], Any]]] = {}

    def add(self, part: str, what: str, *undo: Callable[[], Any]) -> None:
        self.done[part] = what
        self._undo[part] = list(undo)

    def undo(self, *parts: str) -> None:
        """Take the named parts back, all of them by default; the pipeline is then what it was.

        Raises:
            UserError: a part that was not done.
        """
        for part in parts or tuple(reversed(self._undo)):
            if part not in self._undo:
                raise UserError(f"{part}: was not done; done are {', '.join(self._undo) or 'none'}")
            for step in reversed(self._undo.pop(part)):
                step()
            del self.done[part]

    def __enter__(self) -> Acceleration:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __str__(self) -> str:
        done = [f"{part}: {what}" for part, what in self.done.items()]
        return "\n".join([*done, *(f"skipped {part} ({reason})" for part, reason in self.skipped.items())])


def accelerate(
    pipe: DiffusionPipeline,
    attention: str = "auto",
    fuse_qkv: bool = True,
    channels_last: Choice = "auto",
    compile: Choice | dict[str, Any] = "auto",
    tiny_vae: str | AutoencoderTiny | None = None,
) -> Acceleration:
    """Make any loaded diffusers pipeline faster, in place; stock again by ``.undo()`` or on leaving a ``with``.

    Args:
        attention: ``auto`` times the exact kernels that run here and takes the fastest; or a name of diffusers'
            (``native``, ``flash``, ``xformers``, ``sage``, ``flash_hub``, ...).  Of this pipeline alone: diffusers'
            process-wide default stays untouched.
        fuse_qkv: Q, K and V as one product.  A live LoRA keeps the layers that it is in as they are.
        channels_last: the memory format of networks and VAE; ``auto`` is on a GPU alone.
        compile: ``torch.compile`` block by block, not the whole; ``auto`` is on a GPU alone; a mapping is passed on.
        tiny_vae: a small decoder for the same latents (TAESD): a folder, hub id or AutoencoderTiny.  The one part that
            changes the pictures by more than rounding.

    Saving an accelerated pipeline writes the stock one (with the VAE that it has).

    Raises:
        UserError: a backend that does not run here, a tiny VAE that does not load or fit.
    """
    calls = calls_of(pipe)
    main: Any = calls.network
    networks = {calls.component: main} | ({} if calls.vae is None else {"vae": calls.vae})
    acceleration = Acceleration()
    device, dtype = next(main.parameters()).device, main.dtype
    require_backend(attention, "attention", device, dtype, gradients=False, networks=[main])
    if tiny_vae is not None:  # first: the other parts are for the VAE that stays
        networks["vae"] = _replace_vae(acceleration, pipe, tiny_vae, device, dtype)
    for name, network in sorted(networks.items(), key=lambda item: item[1] is not main):
        _set_attention(acceleration, name, network, main, attention)
    if fuse_qkv:
        _fuse(acceleration, networks)
    _channels_last(acceleration, networks, device, channels_last)
    _compile(acceleration, networks, device, compile)
    return acceleration


def _runs_on(backend: str, network: Any) -> bool:
    return kernels.try_backend(backend, network.device, network.dtype, _widest(network)) is None


def _set_attention(acceleration: Acceleration, name: str, network: nn.Module, main: Any, choice: str) -> None:
    chosen, dtype = choice, main.dtype
    if network is main and choice == kernels.AUTO:
        chosen, reasons = choose_fastest(network, next(network.parameters()).device, dtype)
        acceleration.skipped |= {f"attention: {other}": reason for other, reason in reasons.items()}
    elif choice == kernels.AUTO:
        return  # a VAE's one attention is no matter
    if network is not main and not _runs_on(chosen, network):
        acceleration.skipped[f"{name} attention"] = f"{chosen} does not run on its heads of {_widest(network)}"
        return
    before = {
        module: module.processor._attention_backend
        for module in find_attention(network)
        if hasattr(module.processor, "_attention_backend")
    }
    refused = set_backend(network, chosen)
    for module, reason in refused.items():
        acceleration.skipped[f"{name}.{module}"] = reason

    def back() -> None:
        set_backend(network, kernels.NATIVE)
        for backend in {backend for backend in before.values() if backend is not None}:
            set_backend(network, backend.value)  # what was chosen before, with its processors
        for module, backend in before.items():
            if hasattr(module.processor, "_attention_backend"):
                module.processor._attention_backend = backend

    if network is main:
        acceleration.add("attention", chosen, back)
    else:
        acceleration._undo["attention"].append(back)


def _widest(network: nn.Module) -> int:
    return max((head_width(module) for module in find_attention(network)), default=64)


def _fuse(acceleration: Acceleration, networks: dict[str, nn.Module]) -> None:
    count = 0
    for name, network in networks.items():
        left = fuse(network)
        count += sum(is_fused(module) for module in find_attention(network))
        acceleration.skipped |= {f"{name}.{module}": reason for module, reason in left.items()}
    undo = [lambda n=n: unfuse(n) for n in networks.values()]
    if count:
        acceleration.add("fuse_qkv", f"{count} attentions", *undo)
    else:
        for step in undo:  # stock processors again
            step()
        acceleration.skipped["fuse_qkv"] = "no attention module that it is for"


def _channels_last(
    acceleration: Acceleration, networks: dict[str, nn.Module], device: torch.device, choice: Choice
) -> None:
    if choice == "auto" and device.type != "cuda":
        acceleration.skipped["channels_last"] = f"auto, on a {device.type}; True does it"
    elif choice:

        def all_to(memory_format: torch.memory_format) -> None:
            for network in networks.values():
                network.to(memory_format=memory_format)

        all_to(torch.channels_last)
        acceleration.add("channels_last", ", ".join(networks), lambda: all_to(torch.contiguous_format))


def _compile(
    acceleration: Acceleration, networks: dict[str, nn.Module], device: torch.device, choice: Choice | dict[str, Any]
) -> None:
    if choice == "auto" and device.type != "cuda":
        acceleration.skipped["compile"] = f"auto, on a {device.type}: minutes of compiling for nothing; True does it"
        return
    if choice is False:
        return
    arguments = choice if isinstance(choice, dict) else {}
    blocks = [b for network in networks.values() for b in compiled_blocks(network)]
    before = [block._compiled_call_impl for block in blocks]
    for block in blocks:
        block.compile(**arguments)

    def plain() -> None:
        for block, compiled in zip(blocks, before, strict=True):
            block._compiled_call_impl = compiled

    acceleration.add("compile", f"{len(blocks)} blocks, each when it is first called", plain)


def _replace_vae(
    acceleration: Acceleration,
    pipe: DiffusionPipeline,
    tiny_vae: str | AutoencoderTiny,
    device: torch.device,
    dtype: torch.dtype,
) -> AutoencoderTiny:
    old = getattr(pipe, "vae", None)
    if old is None:
        raise UserError(f"tiny_vae: {type(pipe).__name__} has no VAE; leave it out")
    tiny = read_tiny_vae(tiny_vae, "tiny_vae") if isinstance(tiny_vae, str) else tiny_vae
    if "block_out_channels" not in old.config:
        raise UserError(f"tiny_vae: an AutoencoderTiny cannot stand in for an {type(old).__name__}; leave it out")
    factor = 2 ** (len(old.config.block_out_channels) - 1)
    tiny_factor = 2 ** (len(tiny.config.decoder_block_out_channels) - 1)
    if tiny.config.latent_channels != old.config.latent_channels or tiny_factor != factor:
        raise UserError(
            f"tiny_vae: it decodes {tiny.config.latent_channels} channels by {tiny_factor}, the pipeline's VAE "
            f"{old.config.latent_channels} by {factor}; take the one for this model"
        )
    pipe.vae = tiny.to(device, dtype).eval()
    acceleration.add(
        "tiny_vae", f"{sum(p.numel() for p in tiny.parameters()) / 1e6:.1f}M", lambda: setattr(pipe, "vae", old)
    )
    return tiny
