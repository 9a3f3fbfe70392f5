"""The settings of a reward."""

import pytest
from rewards import CLIP

from stepdistill.config import check
from stepdistill.errors import UserError
from stepdistill.judges.rewards import RewardSettings


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"reward": "aesthetic", "clip": CLIP}, "weights is missing: reward = aesthetic needs the predictor's file"),
        ({"reward": "aesthetic", "weights": "x"}, "clip is missing: reward = aesthetic needs the CLIP model"),
        ({"reward": "aesthetic", "weights": "x", "clip": CLIP, "config": "y"}, "config has no use with"),
        ({"reward": "image_reward", "config": "y"}, "weights is missing"),
        (
            {"reward": "image_reward", "weights": "x"},
            "config is missing: reward = image_reward needs the file med_config",
        ),
        ({"reward": "image_reward", "weights": "x", "config": "y", "clip": CLIP}, "clip has no use with"),
        ({"reward": "clip"}, "clip is missing"),
        ({"reward": "clip", "clip": CLIP, "weights": "x"}, "weights has no use with reward = clip; remove it"),
        ({"reward": "own:net", "weights": "x"}, "weights has no use with reward = own:net"),
        ({"reward": "hpsv3"}, "hpsv3: write aesthetic, image_reward, pick_score, hps, clip or module:attribute"),
        ({"reward": "pick_score"}, "weights is missing: reward = pick_score needs the folder of PickScore_v1"),
        ({"reward": "pick_score", "weights": "x", "clip": CLIP}, "clip has no use with reward = pick_score"),
        ({"reward": "hps"}, "weights is missing: reward = hps needs the file HPS_v2.1_compressed.pt"),
        ({"reward": "hps", "clip": {"model": "ViT-B-32"}}, "weights is missing: reward = hps"),
        ({"reward": "hps", "weights": "x", "config": "y"}, "config has no use with reward = hps"),
        ({"reward": "hps", "weights": "x", "clip": CLIP}, "clip.model = own_clip:make: reward = hps loads"),
        ({"reward": "hps", "weights": "x", "clip": {"hub": True}}, "without hub"),
        (
            {"reward": "hps", "weights": "x", "clip": {"pretrained": "y"}},
            "clip.pretrained has no use with reward = hps",
        ),
        ({"reward": "own:net", "weight": 0}, "weight = 0: should be greater than 0"),
    ],
)
def test_settings_say_what_a_kind_needs(raw, message):
    with pytest.raises(UserError) as error:
        check(RewardSettings, raw, "rewards")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_settings_that_fit():
    settings = check(RewardSettings, {"reward": "own:net"}, "rewards")
    assert (settings.weight, settings.hinge) == (1.0, None)
    both = check(
        RewardSettings, {"reward": "image_reward", "weights": "a.pt", "config": "b.json", "hinge": 2}, "rewards"
    )
    assert (both.hinge, both.config) == (2.0, "b.json")
