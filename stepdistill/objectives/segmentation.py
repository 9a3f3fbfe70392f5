"""The mask loss of an instance-segmentation network such as SOLO (1912.04488, eq. 4).

Its other loss, the sigmoid focal loss of categories (1708.02002, eq. 5), is :func:`torchvision.ops.sigmoid_focal_loss`.
"""

from torch import Tensor


def dice_loss(probabilities: Tensor, target: Tensor) -> Tensor:
    """``1 - 2 sum p q / (sum p^2 + sum q^2)`` of each mask: 0 where p = q, 1 where they do not meet.

    The form with squares (1606.04797; SOLO's eq. 4).  Two empty masks give 1.

    Args:
        probabilities: p, (..., H, W) in [0, 1]; target: q, the same shape.

    Returns:
        (...): the sums are over the last two axes.
    """
    both = (probabilities * target).sum((-2, -1))
    total = (probabilities**2).sum((-2, -1)) + (target**2).sum((-2, -1))
    return 1 - 2 * both / total.clamp(min=1e-12)
