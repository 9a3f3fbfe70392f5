"""What every kind of reward does with its files and inputs."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError, reading
from stepdistill.readers import read_weights

from .settings import NEEDS

Network = TypeVar("Network", bound=nn.Module)


def freeze(model: Network, device: str | torch.device) -> Network:
    """The model on ``device``, in eval mode, without gradients to its parameters."""
    return model.eval().requires_grad_(False).to(device)


def require_prompts(items: list, pixels: Tensor, name: str) -> list[str]:
    """``items`` where they are a prompt for each picture.

    Raises:
        UserError: they are not.
    """
    if len(items) != len(pixels) or not all(isinstance(item, str) for item in items):
        raise UserError(f"reward {name}: needs a prompt for each picture, and this run has none; name another reward")
    return items


def read_state(path: str, name: str) -> dict[str, Tensor]:
    """The tensors of a .safetensors file or of a file by ``torch.save``, on the CPU; no code in it is run."""
    with reading(f"reward {name}: weights {path}", "replace the file"):
        state = read_weights(path)
    if name == "hps" and isinstance(state, dict) and "state_dict" in state:
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"reward {name}: weights {path} holds no state dict; download {NEEDS[name]['weights']}")
    return state
