"""The cosine of any CLIP as a reward."""

import sys

import pytest
import torch
from rewards import CLIP, some_pixels

from stepdistill.errors import UserError
from stepdistill.judges.rewards import RewardSettings, load_reward


def test_clip_is_the_cosine(tower):
    reward, pixels = load_reward(RewardSettings(reward="clip", clip={**CLIP})), some_pixels()
    scorer = sys.modules["own_clip"].make()
    rewards = reward(pixels, ["a", "k", "z"])
    assert torch.equal(rewards, scorer.cosine(pixels, ["a", "k", "z"]))
    embedded = torch.nn.functional.cosine_similarity(scorer.embed(pixels), tower.text[[0, 10, 25]])
    torch.testing.assert_close(rewards, embedded)
    rewards.sum().backward()
    assert (pixels.grad.abs().sum((1, 2, 3)) > 0).all()
    assert all(p.grad is None for p in tower.parameters())


@pytest.mark.parametrize("items", [[], [1, 2, 3], ["a", "b"]])
def test_what_is_no_prompt_for_each_picture_is_one_line(items, tower):
    reward = load_reward(RewardSettings(reward="clip", clip=CLIP))
    with pytest.raises(UserError, match="reward clip: needs a prompt for each picture"):
        reward(some_pixels(), items)
