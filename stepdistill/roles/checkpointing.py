"""Gradient checkpointing of networks with adapters.

It runs the forward pass again during the backward pass, when another adapter may be on than the first time.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint

from stepdistill.errors import UserError

from .adapters import AdapterSwitch


def enable_checkpointing(network: nn.Module, switch: AdapterSwitch | None) -> None:
    """Gradient checkpointing that recomputes each block under the adapter that was on in its forward pass.

    Raises:
        UserError: the network has no gradient checkpointing.
    """

    def run_block(block: nn.Module, *inputs: Any) -> Any:
        if switch is None:
            return checkpoint(block.__call__, *inputs, use_reentrant=False)
        adapter = switch.active

        def run_with_adapter(*inputs: Any) -> Any:
            with switch.using(adapter):
                return block(*inputs)

        return checkpoint(run_with_adapter, *inputs, use_reentrant=False)

    model: Any = network
    try:
        model.enable_gradient_checkpointing(gradient_checkpointing_func=run_block)
    except (AttributeError, ValueError):
        raise UserError(
            f"train.gradient_checkpointing: {type(network).__name__} does not support it; set it to false"
        ) from None
