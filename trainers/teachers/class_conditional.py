"""Training a small teacher from scratch: how the shipped one was made, and a base for your own.

The plain diffusion loss (2006.11239, 2202.00512): a weighted squared error of the network's own target, t uniform
over the schedule's levels, labels dropped to the null label with probability ``label_dropout``.  The loop (rate,
average, saves, resuming) is that of ``text_teacher`` too.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Literal

import torch
from diffusers import ConsistencyModelPipeline, DDIMScheduler
from pydantic import Field, model_validator
from torch import Tensor, nn
from tqdm import tqdm

from stepdistill.config import Section, UserPath
from stepdistill.data.arrays import read_idx, read_npz
from stepdistill.data.order import Order
from stepdistill.data.pictures import mirror_half
from stepdistill.denoiser import Prediction
from stepdistill.errors import UserError, reading
from stepdistill.families.unet2d import UNet2DFamily, build_teacher_network
from stepdistill.files import replacing_folder, write_tensors
from stepdistill.finiteness import is_finite
from stepdistill.objectives.denoising import denoising_loss
from stepdistill.precision import computing
from stepdistill.readers import read_tensors
from stepdistill.seeds import RunSeed
from stepdistill.stock.folders import check_replaceable, without_places

NON_FINITE_LIMIT = 10
"""Skipped steps in a row that end a training."""


class TeacherData(Section):
    idx_images: UserPath | None = Field(None, description="images in MNIST's idx format")
    idx_labels: UserPath | None = Field(None, description="labels in MNIST's idx format")
    npz: UserPath | None = Field(None, description="an .npz with 'images' and 'labels'")
    num_labels: int = Field(10, ge=1, le=10**6)
    label_names: list[str] | None = Field(None, description="kept in the UNet's config, for pictures")
    mirror: bool = Field(False, description="mirror half of the pictures, left to right")


Channels = Annotated[int, Field(ge=8, le=4096)]


class TeacherNetwork(Section):
    resolution: int = Field(16, ge=8, le=1024)
    channels: Literal[1, 3] = 1
    block_channels: list[Channels] = Field(
        [16, 32, 64], min_length=1, max_length=8, description="multiples of 8, a resolution each"
    )
    layers_per_block: int = Field(1, ge=1, le=32)

    @model_validator(mode="after")
    def _fits(self):
        odd = [c for c in self.block_channels if c < 8 or c % 8]
        if odd:
            raise ValueError(f"block_channels: {odd[0]} is not a multiple of 8")
        if self.resolution % 2 ** (len(self.block_channels) - 1):
            raise ValueError(f"resolution {self.resolution} cannot be halved {len(self.block_channels) - 1} times")
        return self


class LoopSettings(Section):
    """AdamW with a warm-up and a cosine, an average of the weights, and saves to go on from."""

    steps: int = Field(
        20000, ge=1, le=10**9, description="optimizer steps; fewer than are done already ends the training"
    )
    batch_size: int = Field(64, ge=1, le=65_536)
    lr: float = Field(1e-3, gt=0, description="peak learning rate of AdamW")
    warmup: int = Field(500, ge=0, le=10**9)
    final_lr: float = Field(1e-5, ge=0, description="the cosine ends here")
    weight_decay: float = Field(0.0, ge=0)
    ema_decay: float = Field(0.9995, ge=0, lt=1)
    clip: float = Field(1.0, gt=0)
    save_every: int = Field(2000, ge=1, le=10**9, description="steps between resumable saves")


class TeacherConfig(LoopSettings):
    """``stepdistill teacher train CONFIG``: a class-conditional v-predicting UNet2DModel on a cosine schedule with
    zero terminal SNR."""

    kind: Literal["class_conditional"] = "class_conditional"
    output: UserPath = Field(description="the stock diffusers folder to write")
    seed: RunSeed = 0
    data: TeacherData = TeacherData()
    network: TeacherNetwork = TeacherNetwork()
    label_dropout: float = Field(0.1, ge=0, le=1)
    bf16: bool = Field(False, description="autocast to bfloat16 in training")


def teacher_scheduler() -> DDIMScheduler:
    """The shipped teacher's scheduler: cosine betas with zero terminal SNR, v-prediction, trailing DDIM steps."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
    )


def autocast(bf16: bool, device: str) -> contextlib.AbstractContextManager:
    """For a training's forward passes: bfloat16 where it is safe, or nothing; weights stay float32."""
    return computing(torch.device(device), torch.bfloat16 if bf16 else None)


def _learning_rate(config: LoopSettings, step: int) -> float:
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = 0.5 * (1 + torch.cos(torch.tensor(progress * torch.pi)).item())
    return config.final_lr + (config.lr - config.final_lr) * cosine


def fit(
    network: nn.Module,
    loss_at: Callable[[int], Tensor],
    settings: LoopSettings,
    partial: Path,
    generator: torch.Generator,
    title: str,
    at_save: Callable[[int, dict[str, Tensor]], None] | None = None,
) -> int:
    """Minimise ``loss_at(step)``; ``network`` ends with the averaged weights, in eval mode.  Gives the steps done.

    Goes on from ``partial`` if it is there.  ``generator`` is all that ``loss_at`` draws from beside ``step``.
    ``at_save``: called at every save but the last with the step and the average.  A step whose gradient is not finite
    is skipped.

    Raises:
        UserError: too many of them in a row.
    """
    network.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    ema = {name: p.detach().clone() for name, p in network.named_parameters()}
    start = _resume(partial, network, ema, optimizer, generator)
    bar = tqdm(range(start, settings.steps), initial=start, total=settings.steps, desc=title, unit="step")
    running, in_a_row = None, 0
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = _learning_rate(settings, step)
        loss = loss_at(step)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(network.parameters(), settings.clip)
        in_a_row = 0 if is_finite(norm) else in_a_row + 1
        if in_a_row:
            optimizer.zero_grad()
            if in_a_row == NON_FINITE_LIMIT:
                raise UserError(
                    f"{title}: stopped at step {step}: {in_a_row} non-finite gradients in a row; lower lr, or look at "
                    f"the data; what was saved last is in {partial}"
                )
            continue
        optimizer.step()
        optimizer.zero_grad()
        decay = min(settings.ema_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(ema.values()), [p.detach() for p in network.parameters()], 1 - decay)
        running = loss.item() if running is None else 0.99 * running + 0.01 * loss.item()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{running:.4f}")
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            _save_partial(partial, step + 1, network, ema, optimizer, generator)
            if at_save is not None and step + 1 < settings.steps:
                at_save(step + 1, ema)
    network.load_state_dict(ema, strict=False)
    network.eval().requires_grad_(False)
    return max(start, settings.steps)


def train_teacher(config: TeacherConfig, device: str = "cpu") -> Path:
    """Train, then write a stock folder at ``config.output``; resumes from ``OUTPUT.partial`` if it is there."""
    check_replaceable(config.output, teacher=True)
    net, data = config.network, config.data
    shape = (net.channels, net.resolution, net.resolution)
    if data.npz is not None:
        images = read_npz(data.npz, shape, resize=True, key="data.npz")
    elif data.idx_images is not None:
        images = read_idx(data.idx_images, data.idx_labels, shape, resize=True)
    else:
        raise UserError("data: set npz or idx_images")
    labels = torch.tensor(images.classes(data.num_labels))

    torch.manual_seed(config.seed)
    network = build_teacher_network(
        net.resolution, net.channels, data.num_labels, net.block_channels, net.layers_per_block
    ).to(device)
    family = UNet2DFamily(network, teacher_scheduler())
    generator = torch.Generator().manual_seed(config.seed)
    pixels = images.batch(list(range(len(images))))
    order = Order(len(images), config.seed)

    def loss_at(step: int) -> Tensor:
        index = order.indices(step * config.batch_size, config.batch_size)
        x0, label = pixels[index], labels[index].to(device)
        x0 = (mirror_half(x0, generator) if data.mirror else x0).to(device)
        dropped = torch.rand(len(index), generator=generator) < config.label_dropout
        label = torch.where(dropped.to(device), family.null_label, label)
        eps = torch.randn(x0.shape, generator=generator).to(device)
        t = torch.randint(family.schedule.num_levels, (len(index),), generator=generator).to(device)
        x_t = family.schedule.add_noise(x0, eps, t)
        with autocast(config.bf16, device):
            output = family.forward(network, x_t, t, {"label": label})
        prediction = Prediction(family.schedule, x_t, t, output.float(), family.kind)
        return denoising_loss(prediction, x0, eps, family.kind)

    fit(network, loss_at, config, Path(f"{config.output}.partial"), generator, "teacher")
    network.register_to_config(
        _stepdistill={
            "null_label": family.null_label,
            "label_names": data.label_names,
            "trained_by": "stepdistill teacher train",
            "config": without_places(config.model_dump(mode="json", exclude={"output", "save_every"})),
            "finished": time.strftime("%Y-%m-%d"),
        }
    )
    with replacing_folder(config.output) as temporary:
        ConsistencyModelPipeline(unet=network.cpu(), scheduler=family.scheduler).save_pretrained(temporary)
    return Path(config.output)


def _save_partial(path: Path, step: int, network, ema, optimizer, generator) -> None:
    """All that resuming needs, in one safetensors file, written beside and renamed in."""
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.items()}
    for index, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{k}": v for k, v in state.items()}
    tensors["generator"] = generator.get_state()
    write_tensors(path, tensors, {"step": json.dumps(step)})


def _resume(path: Path, network, ema, optimizer, generator) -> int:
    if not path.exists():
        return 0
    remedy = "remove it to start again, or set another output"
    with reading(path, remedy, "cannot be gone on with"):
        tensors, metadata = read_tensors(path)
        step = int(metadata["step"])
        own = {k.removeprefix("network."): v for k, v in tensors.items() if k.startswith("network.")}
        try:
            network.load_state_dict(own)
        except RuntimeError:
            raise UserError(f"{path}: saved by a training of another network; {remedy}") from None
        for name in ema:
            ema[name].copy_(tensors[f"ema.{name}"])
        state: dict[int, dict] = {}
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                state.setdefault(int(index), {})[name] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
        generator.set_state(tensors["generator"])
    return step
