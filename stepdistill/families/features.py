"""The outputs of a network's inner blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn


class _Reached(Exception):
    """Raised by a hook to end a forward pass once all features are there: what follows is never run."""


def capture_outputs(modules: Sequence[nn.Module], forward: Callable[[], object]) -> list[Tensor]:
    """The outputs of ``modules`` during ``forward()``, (B, F, h, w) each; what runs after the last is not computed."""
    outputs: dict[nn.Module, Tensor] = {}

    def keep(module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs[module] = output[0] if isinstance(output, tuple) else output
        if len(outputs) == len(modules):
            raise _Reached

    handles = [module.register_forward_hook(keep) for module in modules]
    try:
        forward()
    except _Reached:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return [outputs[module] for module in modules]
