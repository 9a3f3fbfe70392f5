"""Reward models as differentiable functions of pixels: human feedback learning's r_d (Hyper-SD, 2404.13686, eq. 13).

``aesthetic`` is LAION's predictor on a CLIP model's picture embeddings, ``image_reward`` is ImageReward through its
library, ``pick_score`` (Pick-a-Pic, 2305.01569) and ``hps`` (Human Preference Score v2, 2306.09341) are the cosine of
picture and prompt by a CLIP that people's choices tuned, ``clip`` is that of any other CLIP, and ``module:attribute``
is a user's.  All are frozen.  No pixel is clamped on the way, so values outside [-1, 1] keep their gradient; ReFL's
released code clamps and loses it.

Configs name this package's rewards for trials as ``stepdistill.judges.rewards:Brightness`` and
``stepdistill.judges.rewards:Sharpness``.
"""

from .load import check_models, load_reward, load_rewards
from .reward import Reward
from .settings import RewardSettings
from .trials import Brightness, Sharpness

__all__ = [
    "Brightness",
    "Reward",
    "RewardSettings",
    "Sharpness",
    "check_models",
    "load_reward",
    "load_rewards",
]
