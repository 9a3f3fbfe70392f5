"""The non-saturating GAN losses of DMD2 (2405.14867, section 4.3), on logits of noised samples."""

from torch import Tensor
from torch.nn.functional import softplus


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """``mean softplus(l_fake) + mean softplus(-l_real)``; logits of any shape; 2 ln 2 = 1.386 when it knows nothing."""
    return softplus(fake_logits).mean() + softplus(-real_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    """``mean softplus(-l_fake)``; ln 2 = 0.693 when the discriminator knows nothing."""
    return softplus(-fake_logits).mean()
