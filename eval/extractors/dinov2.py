"""DINOv2 as dgm-eval uses it (Stein et al., 2306.04675): FD-DINOv2, from files on this machine.  Nothing is downloaded.

The weights may be transformers', torch.hub's or timm's; the network is transformers' ``Dinov2Model``.  Its position
embeddings are interpolated to the picture by size, where torch.hub's code adds 0.1 to the size first: features differ
a little, so a reference belongs to the extractor that made it (the fingerprint sees to that).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from stepdistill.errors import UserError, reading, show_value
from stepdistill.plain_files import read_json
from stepdistill.readers import read_weights
from stepdistill.stock.loading import load_network

from .base import Extractor, module_fingerprint

SIDE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
REMEDY = (
    "download facebook/dinov2-large (config.json and model.safetensors), torch.hub's dinov2_vitl14_pretrain.pth or "
    "timm's vit_large_patch14_dinov2.lvd142m, and name the folder or file as dinov2:PATH"
)
SIZES = {384: "vits14", 768: "vitb14", 1024: "vitl14", 1536: "vitg14"}


class DinoFeatures(nn.Module):
    """The class token after the last norm of uint8 pictures (B, 1 or 3, H, W): PIL's bicubic filter to 224x224."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: Any):
        super().__init__()
        self.network: Any = network
        self.num_features = network.config.hidden_size
        for name, value in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(value).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, F)."""
        arrays = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
        resized = [Image.fromarray(array).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for array in arrays]
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image in resized])).permute(0, 3, 1, 2)
        pixels = pixels.to(self.mean.device).float() / 255
        return self.network((pixels - self.mean) / self.std).pooler_output


def load_dinov2(path: str | Path) -> Extractor:
    """DINOv2 from a transformers folder, or from torch.hub's or timm's weights (a file, or the folder that holds it).

    Called FD-DINOv2 where its architecture is ViT-L/14, dgm-eval's; the weights cannot be known by their shape, so the
    fingerprint is what tells two apart.

    Raises:
        UserError: no such file or folder, or not DINOv2.
    """
    path = Path(path)
    file = path / "config.json"
    if not path.exists():
        raise UserError(f"extractor dinov2: {path} is missing; {REMEDY}")
    with reading("extractor dinov2", REMEDY, f"{path} is no DINOv2"):
        kind = read_json(file).get("model_type") if file.is_file() else None
        network: Any = _build_from_weights(path) if kind is None else _load_transformers(path, kind)
    config = network.config
    name = f"dinov2_{SIZES.get(config.hidden_size, f'width{config.hidden_size}')}"
    is_large = (config.hidden_size, config.num_hidden_layers, config.patch_size) == (1024, 24, 14)
    module = DinoFeatures(network.eval().requires_grad_(False))
    return Extractor(
        module,
        name=name,
        fingerprint=module_fingerprint(module, "dgm-eval"),
        resize=f"dgm-eval: PIL bicubic to {SIDE}x{SIDE}",
        titles=("FD-DINOv2", "KD-DINOv2") if is_large else None,
    )


def _load_transformers(folder: Path, kind: Any) -> nn.Module:
    from transformers import Dinov2Model

    if kind != "dinov2":
        name = kind if isinstance(kind, str) else show_value(kind)
        raise UserError(f"extractor dinov2: {folder} is a model of type {name}, not dinov2; {REMEDY}")
    return load_network(Dinov2Model, folder, f"extractor dinov2: {folder}", with_others=True)


def _build_from_weights(path: Path) -> nn.Module:
    from transformers import Dinov2Config, Dinov2Model

    state = _read_state(path)
    if not {"cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.ls1.gamma", "norm.weight"} <= set(state):
        raise UserError(f"extractor dinov2: {path} is not torch.hub's or timm's DINOv2; {REMEDY}")
    if any("register" in key or "reg_token" in key for key in state) or "blocks.0.mlp.fc1.weight" not in state:
        raise UserError(
            f"extractor dinov2: {path} has registers or a gated MLP (ViT-g), which only the folder of transformers "
            f"gives; {REMEDY}"
        )
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    side = round((state["pos_embed"].shape[1] - 1) ** 0.5) * patch
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        num_attention_heads=max(1, width // 64),  # of every DINOv2
        mlp_ratio=state["blocks.0.mlp.fc1.weight"].shape[0] // width,
        image_size=side,
        patch_size=patch,
        use_mask_token="mask_token" in state,
    )
    network = Dinov2Model(config)
    network.load_state_dict(rename_weights(state))
    return network


def rename_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torch.hub's and timm's names to ``Dinov2Model``'s; the joint projection of q, k and v in three."""
    names = [
        (r"^(cls_token|mask_token)$", r"embeddings.\1"),
        (r"^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^norm\.", "layernorm."),
        (r"^blocks\.", "encoder.layer."),
        (r"\.attn\.proj\.", ".attention.o_proj."),
        (r"\.ls([12])\.gamma$", r".layer_scale\1.lambda1"),
    ]
    renamed = {}
    for key, value in state.items():
        for old, new in names:
            key = re.sub(old, new, key)
        if ".attn.qkv." in key:
            for part, weight in zip("qkv", value.chunk(3), strict=True):
                renamed[key.replace(".attn.qkv.", f".attention.{part}_proj.")] = weight
        elif not key.startswith("head."):
            renamed[key] = value
    return renamed


def _read_state(path: Path) -> dict[str, Any]:
    files = (
        [path] if path.is_file() else sorted(f for f in path.iterdir() if f.suffix in (".pth", ".bin", ".safetensors"))
    )
    if len(files) != 1:
        raise UserError(f"extractor dinov2: {path} holds {len(files)} files of weights, one is needed; {REMEDY}")
    state = read_weights(files[0])
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"extractor dinov2: {files[0]} holds no state dict; {REMEDY}")
    return state
