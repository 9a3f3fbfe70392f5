"""A network's training loss as a perceptual loss: L_percep = L_instance(m_I(x0'), GT(x0)) (Hyper-SD, 2404.13686, 14).

A frozen network m_I is given the prediction x0', and its training loss says how far what it finds is from the instances
that the real picture x0 is known to have.  The paper's m_I is SOLO (1912.04488) with COCO's annotations: neither is
shipped, so users name theirs as ``module:attribute`` (:class:`PerceptualModel`).  SOLO's loss is in :mod:`.instances`.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stepdistill.errors import UserError, describe_value, running
from stepdistill.plugins import call_factory, import_attribute


class PerceptualModel(Protocol):
    """What the perceptual loss needs: a frozen network with its training loss."""

    def loss(self, pixels: Tensor, real: Tensor, indices: list[int]) -> Tensor:
        """(B,), differentiable in ``pixels``.

        Args:
            pixels: (B, C, H, W) about [-1, 1], the prediction x0', decoded; real: the same shape, the real pictures x0
                that it came from; indices: their B places in the run's data, for a table of annotations.
        """
        ...


def load_perceptual(spec: str, device: str | torch.device = "cpu") -> PerceptualModel:
    """The perceptual model at ``module:attribute``: an object, or a class or function without arguments that gives one.

    An nn.Module is moved to ``device`` and frozen (eval, no parameter with a gradient).

    Raises:
        UserError: it cannot be imported, or has no ``loss``.
    """
    model: Any = import_attribute(spec, "perceptual model")
    if isinstance(model, type) or (callable(model) and not hasattr(model, "loss")):
        model = call_factory(model, spec, "perceptual model")
    if not callable(getattr(model, "loss", None)):
        raise UserError(f"perceptual model {spec!r}: has no method loss(pixels, real, indices)")
    if isinstance(model, nn.Module):
        model.eval().requires_grad_(False).to(device)
    return model


def perceptual_loss(model: PerceptualModel, spec: str, pixels: Tensor, real: Tensor, indices: list[int]) -> Tensor:
    """The model's loss (B,) of pixels (B, C, H, W) against real pictures.

    Raises:
        UserError: it fails, or gives something else than (B,) floating-point numbers with a gradient.
    """
    with running(f"perceptual model {spec!r}: called on {len(pixels)} pictures it"):
        loss = model.loss(pixels, real, indices)
    if not isinstance(loss, Tensor) or loss.shape != (len(pixels),) or not loss.is_floating_point():
        raise UserError(
            f"perceptual model {spec!r}: gave {describe_value(loss)} for {len(pixels)} pictures; (B,) is needed"
        )
    if pixels.requires_grad and not loss.requires_grad:
        raise UserError(f"perceptual model {spec!r}: its loss has no gradient to the pictures")
    return loss
