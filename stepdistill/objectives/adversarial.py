"""GAN losses on logits of noised samples: DMD2's, non-saturating (2405.14867, 4.3), and PCM's hinge (2405.18407).

Logits are a tensor of any shape, or a list of such, one a head: the mean over each, then over the list.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

Logits = Tensor | list[Tensor]
AdversarialLoss = Literal["softplus", "hinge"]


def discriminator_loss(real_logits: Logits, fake_logits: Logits, kind: AdversarialLoss = "softplus") -> Tensor:
    """The loss of a discriminator whose logits are above 0 for real samples.

    - ``softplus``: ``mean softplus(l_fake) + mean softplus(-l_real)``, 2 ln 2 = 1.386 for logits of 0;
    - ``hinge``: ``mean max(0, 1 + l_fake) + mean max(0, 1 - l_real)``, 2 for logits of 0.
    """
    penalty = _PENALTIES[kind]
    return _mean(fake_logits, penalty) + _mean(real_logits, lambda logits: penalty(-logits))


def generator_loss(fake_logits: Logits, kind: AdversarialLoss = "softplus") -> Tensor:
    """The loss of a generator.

    - ``softplus``: ``mean softplus(-l_fake)``, ln 2 = 0.693 for logits of 0;
    - ``hinge``: ``mean max(0, 1 - l_fake)``, 1 for logits of 0 (PCM's code; others take ``-mean l_fake``).
    """
    penalty = _PENALTIES[kind]
    return _mean(fake_logits, lambda logits: penalty(-logits))


def _hinge(logits: Tensor) -> Tensor:
    return torch.relu(1 + logits)


_PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"softplus": softplus, "hinge": _hinge}


def _mean(logits: Logits, penalty: Callable[[Tensor], Tensor]) -> Tensor:
    if isinstance(logits, Tensor):
        return penalty(logits).mean()
    return torch.stack([penalty(head).mean() for head in logits]).mean()
