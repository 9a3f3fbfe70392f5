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
    """What a discriminator that says real above 0 is trained by.

    - ``softplus``: ``mean softplus(l_fake) + mean softplus(-l_real)``, 2 ln 2 = 1.386 when it knows nothing;
    - ``hinge``: ``mean max(0, 1 + l_fake) + mean max(0, 1 - l_real)``, 2 when it knows nothing.
    """
    penalty = _PENALTIES[kind]
    return _mean(fake_logits, penalty) + _mean(real_logits, lambda logits: penalty(-logits))


def generator_loss(fake_logits: Logits, kind: AdversarialLoss = "softplus") -> Tensor:
    """What a generator is trained by.

    - ``softplus``: ``mean softplus(-l_fake)``, ln 2 = 0.693 when the discriminator knows nothing;
    - ``hinge``: ``mean max(0, 1 - l_fake)``, 1 when it knows nothing (PCM's code; others take ``-mean l_fake``).
    """
    penalty = _PENALTIES[kind]
    return _mean(fake_logits, lambda logits: penalty(-logits))


def _hinge(logits: Tensor) -> Tensor:
    return torch.relu(1 + logits)


_PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {"softplus": softplus, "hinge": _hinge}


def _mean(logits: Logits, of: Callable[[Tensor], Tensor]) -> Tensor:
    if isinstance(logits, Tensor):
        return of(logits).mean()
    return torch.stack([of(one).mean() for one in logits]).mean()
