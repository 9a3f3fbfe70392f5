"""A user's reward, named as module:attribute."""

import sys

import pytest
import torch
from rewards import some_pixels
from torch import nn

from stepdistill.errors import UserError
from stepdistill.judges.rewards import RewardSettings, load_reward


class Brightness(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.full((), 2.0)), nn.Dropout(0.5)

    def forward(self, pixels, items):
        return self.scale * self.layer(pixels).mean((1, 2, 3))


class Counted:
    def __call__(self, pixels, items):
        return pixels.mean((1, 2, 3)) * 0 + torch.tensor([float(len(i)) for i in items])


class NeedsAPath(nn.Module):
    def __init__(self, path):
        super().__init__()


@pytest.fixture
def user_module(monkeypatch):
    module = type(sys)("own_reward")
    module.module, module.Brightness, module.make = Brightness(), Brightness, lambda: Brightness()
    module.function, module.counted = lambda pixels, items: 2 * pixels.mean((1, 2, 3)), Counted()
    module.NeedsAPath, module.number, module.makes_a_number = NeedsAPath, 3, lambda: 3
    module.makes_a_class = lambda: Brightness
    monkeypatch.setitem(sys.modules, "own_reward", module)
    return module


@pytest.mark.parametrize("attribute", ["module", "Brightness", "make", "function"])
def test_a_reward_of_ones_own(user_module, attribute):
    reward, pixels = load_reward(RewardSettings(reward=f"own_reward:{attribute}", weight=3.0)), some_pixels(channels=1)
    assert reward.name == f"own_reward:{attribute}"
    reward.loss(pixels, []).backward()
    torch.testing.assert_close(pixels.grad, torch.full_like(pixels, -3 * 2 / pixels.numel()))
    if attribute != "function":
        assert isinstance(reward.score, Brightness)
        assert not reward.score.training
        assert reward.score.scale.grad is None


def test_a_callable_object_gets_the_items(user_module):
    assert load_reward(RewardSettings(reward="own_reward:counted"))(some_pixels(), ["a", "bb", ""]).tolist() == [
        1,
        2,
        0,
    ]


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("number", "not an nn.Module or another callable"),
        ("makes_a_number", "not an nn.Module or another callable"),
        ("makes_a_class", "not an nn.Module or another callable"),
        ("NeedsAPath", "a class that needs arguments"),
        ("gone", "has no 'gone'"),
    ],
)
def test_what_is_no_reward_is_one_line(user_module, attribute, message):
    with pytest.raises(UserError, match="reward 'own_reward:") as error:
        load_reward(RewardSettings(reward=f"own_reward:{attribute}"))
    assert message in str(error.value)
