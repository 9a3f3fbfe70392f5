"""Values outside of the range keep their gradient."""

import pytest
import torch
from rewards import CLIP, save_pick_score, some_pixels

from stepdistill.judges.rewards import RewardSettings, load_reward


@pytest.mark.parametrize("kind", ["aesthetic", "clip", "image_reward", "pick_score", "hps"])
def test_values_outside_the_range_keep_their_gradient(kind, tower, aesthetic, library, image_reward, hps, tmp_path):
    """The slope at a picture that is wholly out of range is the slope of a smooth function: by finite differences."""
    settings = {"aesthetic": aesthetic, "clip": RewardSettings(reward="clip", clip=CLIP), "image_reward": image_reward}
    settings["pick_score"] = RewardSettings(reward="pick_score", weights=str(save_pick_score(tmp_path / "pick")))
    reward = load_reward({**settings, "hps": hps}[kind])
    pixels = (1.5 + some_pixels(spread=0.1).detach().abs()).requires_grad_()
    (slope,) = torch.autograd.grad(reward(pixels, ["a", "k", "z"]).sum(), pixels)
    assert (slope.abs().sum((1, 2, 3)) > 0).all()
    direction = slope / slope.norm()
    with torch.no_grad():
        ahead, behind = (reward(pixels + step * direction, ["a", "k", "z"]).sum() for step in (0.05, -0.05))
    assert ((ahead - behind) / 0.1).item() == pytest.approx(slope.norm().item(), rel=0.05)
