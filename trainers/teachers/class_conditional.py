"""Training a small class-conditional teacher from scratch, as the shipped one was trained.

The plain diffusion loss (2006.11239, 2202.00512): a weighted squared error of the network's target, t uniform over the
schedule's levels, labels dropped to the null label with probability ``label_dropout``.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Literal

import torch
from diffusers import ConsistencyModelPipeline, DDIMScheduler
from pydantic import Field, model_validator
from torch import Tensor

from stepdistill.config import Section, UserPath
from stepdistill.data.arrays import read_idx, read_npz
from stepdistill.data.order import Order
from stepdistill.data.pictures import mirror_half
from stepdistill.denoiser import Prediction
from stepdistill.errors import UserError
from stepdistill.families.unet2d import UNet2DFamily, build_teacher_network
from stepdistill.files import replacing_folder
from stepdistill.objectives.denoising import denoising_loss
from stepdistill.seeds import RunSeed
from stepdistill.stock.folders import check_replaceable, without_places

from .loop import Channels, LoopSettings, autocast, check_multiples, fit


class TeacherData(Section):
    """The pictures to train on, with their labels."""

    idx_images: UserPath | None = Field(None, description="images in MNIST's idx format")
    idx_labels: UserPath | None = Field(None, description="labels in MNIST's idx format")
    npz: UserPath | None = Field(None, description="an .npz with 'images' and 'labels'")
    num_labels: int = Field(10, ge=1, le=10**6)
    label_names: list[str] | None = Field(None, description="written into the UNet's config, for pictures")
    mirror: bool = Field(False, description="mirror half of the pictures, left to right")


class TeacherNetwork(Section):
    """The size of the UNet."""

    resolution: int = Field(16, ge=8, le=1024)
    channels: Literal[1, 3] = 1
    block_channels: list[Channels] = Field(
        [16, 32, 64], min_length=1, max_length=8, description="multiples of 8, a resolution each"
    )
    layers_per_block: int = Field(1, ge=1, le=32)

    @model_validator(mode="after")
    def _check_sizes(self) -> TeacherNetwork:
        check_multiples("block_channels", self.block_channels, 8)
        if self.resolution % 2 ** (len(self.block_channels) - 1):
            raise ValueError(f"resolution {self.resolution} cannot be halved {len(self.block_channels) - 1} times")
        return self


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
    null_label = torch.tensor(family.null_label, device=device)
    generator = torch.Generator().manual_seed(config.seed)
    pixels = images.batch(list(range(len(images))))
    order = Order(len(images), config.seed)

    def loss_at(step: int) -> Tensor:
        index = order.indices(step * config.batch_size, config.batch_size)
        x0, label = pixels[index], labels[index].to(device)
        x0 = (mirror_half(x0, generator) if data.mirror else x0).to(device)
        dropped = torch.rand(len(index), generator=generator) < config.label_dropout
        label = torch.where(dropped.to(device), null_label, label)
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
