"""The two losses of an instance-segmentation network such as SOLO (1912.04488, eq. 1-4)."""

from torch import Tensor
from torch.nn.functional import logsigmoid


def focal_loss(logits: Tensor, target: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """``-a_t (1 - p_t)^gamma log p_t`` of each element: the sigmoid focal loss (1708.02002, eq. 5).

    ``p = sigmoid(logits)``; where ``target`` is 1, ``p_t = p`` and ``a_t = alpha``; where it is 0, ``p_t = 1 - p`` and
    ``a_t = 1 - alpha``.  Computed from the logits, so a saturated one gives neither infinity nor NaN.

    Args:
        logits: any shape; target: the same shape, 0 or 1.
    """
    signed = logits * (2 * target - 1)  # the logit of p_t
    weight = alpha * target + (1 - alpha) * (1 - target)
    return -weight * (-signed).sigmoid() ** gamma * logsigmoid(signed)


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
