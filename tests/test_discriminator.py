"""The discriminator's head: narrow networks' logits say something of their inputs, wide networks' layout is DMD2's."""

import pytest
import torch
from torch import nn

from stepdistill.discriminator import DiscriminatorHead, norm_groups

NARROW = [8, 16, 32, 64]


def head_and_features(channels: int, size: int = 4) -> tuple[DiscriminatorHead, torch.Tensor]:
    """A seeded head and features (64, channels, size, size)."""
    torch.manual_seed(0)
    return DiscriminatorHead(channels, size, size), torch.randn(64, channels, size, size)


@pytest.mark.parametrize("size", [1, 2, 4, 7, 8])
@pytest.mark.parametrize("channels", NARROW)
def test_logits_differ_between_inputs(channels, size):
    head, features = head_and_features(channels, size)
    logits = head(features).detach()
    assert logits.shape == (64, 1)
    assert logits.std() > 0.1
    assert len(logits.round(decimals=3).unique()) > 50  # a group of two channels says little more than a sign


@pytest.mark.parametrize("size", [1, 4, 8])
@pytest.mark.parametrize("channels", NARROW)
def test_the_gradient_is_spread_over_inputs(channels, size):
    """By element and by sample its median is within ten times of its mean, and it is there at all."""
    head, features = head_and_features(channels, size)
    features.requires_grad_()
    (gradient,) = torch.autograd.grad(head(features).sum(), features)
    for magnitude in (gradient.abs().flatten(), gradient.flatten(1).norm(dim=1)):
        assert magnitude.mean() / 10 < magnitude.median() < 10 * magnitude.mean()
    assert gradient.flatten(1).norm(dim=1).median() > 0.05


def test_a_head_of_one_channel_a_group_would_say_nothing():
    """What the rule avoids: a norm over one value is 0 whatever comes in."""
    head, features = head_and_features(32)
    for index, layer in enumerate(head.layers):
        if isinstance(layer, nn.GroupNorm):
            head.layers[index] = nn.GroupNorm(32, 32)
    assert head(features).std() < 1e-4


def test_a_wide_networks_head_is_laid_out_as_dmd2s():
    """Stable Diffusion's 1280 channels at 8x8: one halving, 4x4 to 1x1, groups of 40 channels."""
    with torch.device("meta"):
        head = DiscriminatorHead(1280, 8, 8)
        official = nn.Sequential(
            nn.Conv2d(1280, 1280, 4, 2, 1),
            nn.GroupNorm(32, 1280),
            nn.SiLU(),
            nn.Conv2d(1280, 1280, 4, 4, 0),
            nn.GroupNorm(32, 1280),
            nn.SiLU(),
            nn.Conv2d(1280, 1, 1, 1, 0),
        )
    assert [type(layer) for layer in head.layers] == [type(layer) for layer in official]
    for layer, expected in zip(head.layers, official, strict=True):
        assert [p.shape for p in layer.parameters()] == [p.shape for p in expected.parameters()]
        if isinstance(layer, nn.GroupNorm):
            assert (layer.num_groups, layer.eps) == (expected.num_groups, expected.eps)


HALVINGS = {1: 0, 4: 0, 7: 0, 8: 1, 15: 1, 16: 2, 24: 2, 32: 3, 64: 4}


@pytest.mark.parametrize(("size", "halvings"), HALVINGS.items())
def test_maps_are_halved_until_they_are_four_to_seven_wide(size, halvings):
    head = DiscriminatorHead(8, size, size)
    strides = [layer.stride[0] for layer in head.layers if isinstance(layer, nn.Conv2d)]
    assert strides == [2] * halvings + [1, 1]
    assert head(torch.zeros(2, 8, size, size)).shape == (2, 1)


def test_a_map_that_is_not_square_is_halved_by_its_shorter_side():
    head = DiscriminatorHead(8, 8, 32)
    assert head(torch.zeros(2, 8, 8, 32)).shape == (2, 1)
    assert sum(isinstance(layer, nn.Conv2d) and layer.stride == (2, 2) for layer in head.layers) == 1


GROUPS = {
    **dict.fromkeys((1, 7, 8, 12, 255), 1),
    **{16: 2, 24: 2, 32: 4, 48: 4, 64: 8, 96: 8, 128: 16},
    **dict.fromkeys((256, 320, 640, 768, 1280, 2560), 32),
}


@pytest.mark.parametrize(("channels", "groups"), GROUPS.items())
def test_groups_have_eight_channels_or_more(channels, groups):
    assert norm_groups(channels) == groups
    assert channels % groups == 0
    assert groups == 1 or channels // groups >= 8
