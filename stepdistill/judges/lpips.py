"""LPIPS (1801.03924) by torchmetrics."""

from __future__ import annotations

import torch
from torch import nn

from stepdistill.errors import UserError


def load_lpips() -> nn.Module:
    """torchmetrics' LPIPS network on VGG, frozen: pictures (B, 3, H, W) in [-1, 1] to distances (B, 1, 1, 1).

    Raises:
        UserError: VGG's weights are not in torch's hub cache and cannot be fetched.
    """
    from torchmetrics.functional.image.lpips import _LPIPS

    try:
        network = _LPIPS(pretrained=True, net="vgg")
    except Exception as error:  # of the download, of its certificate, of a torchvision that is missing
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"regression.distance = lpips: VGG's weights cannot be loaded ({reason}); put vgg16-397923af.pth into "
            f"{torch.hub.get_dir()}/checkpoints, or set regression.distance=mse"
        ) from None
    return network.eval().requires_grad_(False)
