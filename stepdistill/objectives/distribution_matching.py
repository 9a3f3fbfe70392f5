"""The distribution-matching gradient of DMD (2311.18828) and DMD2 (2405.14867)."""

from torch import Tensor

from stepdistill.schedule import per_sample


def distribution_matching_gradient(x0: Tensor, teacher_x0: Tensor, fake_score_x0: Tensor) -> Tensor:
    """``g = (m_fake - m_teacher) / mean_CHW |x0 - m_teacher|``, each argument and the result (B, ...).

    2311.18828 eq. 7-8 and algorithm 2: the gradient of KL(student || teacher) at one noise level with weight
    ``sigma^2 / alpha`` over the per-sample mean distance to the (guided) teacher.  As in the algorithm and the
    authors' code, and unlike eq. 7, there is no factor alpha_t.  Departure: where the distance is exactly 0, g is 0;
    every other NaN, that of a broken teacher, stays one (the authors' code replaces all of them by 0 afterwards).
    """
    distance = per_sample((x0 - teacher_x0).abs().flatten(1).mean(1), x0)
    difference = fake_score_x0 - teacher_x0
    reached = distance == 0  # False for a NaN
    return (difference / distance.masked_fill(reached, 1.0)).masked_fill(reached, 0.0)
