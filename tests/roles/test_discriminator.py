"""The discriminator's head: narrow networks' logits say something of their inputs, wide networks' layout is DMD2's."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from stepdistill.families.features import capture_outputs
from stepdistill.roles.discriminator import DiscriminatorHead, MapHeads, norm_groups

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


# -- heads on every map ----------------------------------------------------------------------------------------


def test_every_head_gives_a_logit_for_each_place_of_its_map():
    torch.manual_seed(0)
    heads = MapHeads([8, 16, 256], heads=3)
    maps = [torch.randn(2, 8, 8, 8), torch.randn(2, 16, 4, 4), torch.randn(2, 256, 1, 1)]
    logits = heads(maps)
    assert [tuple(one.shape) for one in logits] == [(2, 1, 8, 8)] * 3 + [(2, 1, 4, 4)] * 3 + [(2, 1, 1, 1)] * 3
    assert all(not torch.equal(a, b) for a, b in pairwise(logits[:3]))
    groups = [[m.num_groups for m in one.modules() if isinstance(m, nn.GroupNorm)] for one in heads.maps]
    assert groups == [[1] * 6, [2] * 6, [32] * 6]
    with pytest.raises(ValueError, match="zip"):
        heads(maps[:2])


def test_a_map_head_by_hand():
    torch.manual_seed(0)
    (head,) = MapHeads([16], heads=1).maps[0]
    convolutions = [m for m in head.modules() if isinstance(m, nn.Conv2d)]
    assert [c.weight.shape for c in convolutions] == [(16, 16, 3, 3), (16, 16, 3, 3), (1, 16, 1, 1)]
    x = torch.randn(2, 16, 4, 4)

    def block(x, convolution):
        x = nn.functional.conv2d(x, convolution.weight, convolution.bias, padding=1)
        return nn.functional.leaky_relu(nn.functional.group_norm(x, 2), 0.01)

    hidden = block(x, convolutions[0])
    hidden = hidden + block(hidden, convolutions[1])
    torch.testing.assert_close(head(x), nn.functional.conv2d(hidden, convolutions[2].weight, convolutions[2].bias))


@pytest.mark.parametrize("size", [1, 4])
@pytest.mark.parametrize("channels", NARROW)
def test_map_logits_differ_between_inputs(channels, size):
    torch.manual_seed(0)
    (logits,) = MapHeads([channels], heads=1)([torch.randn(64, channels, size, size)])
    assert logits.mean((1, 2, 3)).std() > 0.1 / size


def test_features_are_the_outputs_of_the_blocks_and_nothing_after_the_last_runs():
    torch.manual_seed(0)
    layers = nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)])
    ran = []
    layers[3].register_forward_hook(lambda *_: ran.append(3))
    x = torch.randn(2, 4)
    maps = capture_outputs([layers[0], layers[2]], lambda: layers(x))
    assert torch.equal(maps[0], layers[0](x))
    assert torch.equal(maps[1], layers[:3](x))
    assert ran == []
    layers(x)
    assert ran == [3]  # the hooks are gone
