"""The instance loss in closed form, and the small SOLO on the shipped pictures."""

import math
import sys

import pytest
import torch
from solo import GridInstanceNet, OneInstance

from stepdistill import assets
from stepdistill.data.arrays import read_npz
from stepdistill.errors import UserError
from stepdistill.judges.instances import Instances, find_cells, instance_loss
from stepdistill.judges.perception import load_perceptual

F64 = torch.float64
ON, OFF = math.log(2) / 16, 3 * math.log(2) / 16  # the focal loss at logit 0, of a positive and of a negative


def mask(rows, columns, size=4):
    whole = torch.zeros(size, size, dtype=torch.bool)
    whole[rows, columns] = True
    return whole


def things(labels, masks):
    stacked = torch.stack(masks) if masks else torch.zeros(0, 4, 4, dtype=torch.bool)
    return Instances(torch.tensor(labels, dtype=torch.long), stacked)


def predictions(masks=(), count=1):
    """Category logits 0 of 2 classes on a 2 x 2 grid; mask logits far on or off: cell i shows ``masks[i]``."""
    logits = torch.full((count, 4, 4, 4), -200.0, dtype=F64)
    for cell, shown in dict(masks).items():
        logits[:, cell][:, shown] = 200.0
    return torch.zeros(count, 2, 2, 2, dtype=F64, requires_grad=True), logits.requires_grad_()


TOP_LEFT, TOP_RIGHT, BOTTOM = mask([0, 0, 1], [0, 1, 0]), mask([0, 1], [3, 3]), mask([3, 3, 3], [0, 1, 2])


# -- assignment --------------------------------------------------------------------------------------------------


def test_a_cell_is_where_the_centre_of_mass_is():
    masks = torch.stack([TOP_LEFT, TOP_RIGHT, BOTTOM, mask([0, 3], [3, 3]), mask([0, 0], [0, 3])])
    # BOTTOM's centre is x = 1.5 of 4: the left; the last two's are y = 2 and x = 2: the second row's and column's edge
    assert find_cells(masks, 2).tolist() == [0, 1, 2, 3, 1]
    assert find_cells(masks, 1).tolist() == [0, 0, 0, 0, 0]
    assert find_cells(masks, 4).tolist() == [0, 7, 13, 11, 2]
    wide = torch.zeros(1, 2, 6, dtype=torch.bool)
    wide[0, 1, 5] = True
    assert find_cells(wide, 2).tolist() == [3]


def test_one_instance_is_the_label_and_the_bright_pixels():
    real = torch.full((2, 3, 2, 2), -1.0)
    real[0, 1, 0, 1] = -0.5
    real[1, :, 1, 0] = -0.8
    instances = OneInstance([7, 8, 9], threshold=-0.8)(real, [2, 0])
    assert [t.labels.tolist() for t in instances] == [[9], [7]]
    assert instances[0].masks.tolist() == [[[False, True], [False, False]]]
    assert instances[1].masks.sum() == 0  # at the threshold is not above it


# -- the loss ----------------------------------------------------------------------------------------------------


def test_loss_by_hand():
    """(positives + negatives of the focal loss) / (n + 1) + 3 mean dice, for each picture by itself."""
    categories, masks = predictions({0: TOP_LEFT, 1: mask([0], [3])}, count=3)
    truth = [things([1], [TOP_LEFT]), things([], []), things([0, 1], [TOP_LEFT, TOP_RIGHT])]
    loss = instance_loss(categories, masks, truth)
    half_found = 3 * (0 + 1 - 2 / 3) / 2  # of TOP_RIGHT's 2 pixels 1 is shown: dice 1 - 2 1 / (1 + 2)
    expected = [(7 * OFF + ON) / 2, 8 * OFF, (6 * OFF + 2 * ON) / 3 + half_found]
    assert loss.tolist() == pytest.approx(expected, rel=1e-12)
    unweighted = instance_loss(categories, masks, truth, mask_weight=0.0)
    assert (loss - unweighted).tolist() == pytest.approx([0, 0, half_found], abs=1e-12)


def test_only_the_assigned_cells_learn_and_in_their_direction():
    categories, _ = predictions()
    masks = torch.zeros(1, 4, 4, 4, dtype=F64, requires_grad=True)
    loss = instance_loss(categories, masks, [things([1], [TOP_RIGHT])]).sum()
    category_slope, mask_slope = torch.autograd.grad(loss, (categories, masks))
    positive = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    positive[0, 1, 0, 1] = True
    assert torch.equal(category_slope < 0, positive)
    assert torch.equal(mask_slope[0, 1] < 0, TOP_RIGHT)
    assert (mask_slope[0, 1] != 0).all()
    assert (mask_slope[0, [0, 2, 3]] == 0).all()


def test_the_last_keeps_a_cell_and_an_empty_mask_is_left_out():
    categories, masks = predictions({0: TOP_LEFT})
    alone = instance_loss(categories, masks, [things([1], [TOP_LEFT])])
    crowd = things([0, 0, 1], [mask([0, 1], [0, 1]), torch.zeros(4, 4, dtype=torch.bool), TOP_LEFT])
    torch.testing.assert_close(instance_loss(categories, masks, [crowd]), alone)


@pytest.mark.parametrize(
    ("truth", "message"),
    [
        ([things([2], [TOP_LEFT])], "labels [2] are not all in 0..1"),
        ([things([-1], [TOP_LEFT])], "labels [-1] are not all in 0..1"),
        ([things([0], [mask([0], [0], size=5)])], "masks of shape (1, 5, 5), for (1, 4, 4)"),
        ([things([0, 1], [TOP_LEFT])], "masks of shape (1, 4, 4), for (2, 4, 4)"),
        ([things([0], [TOP_LEFT])] * 2, "of 2 pictures, for 1"),
    ],
)
def test_wrong_annotations_are_one_line(truth, message):
    with pytest.raises(UserError) as error:
        instance_loss(*predictions(), truth)
    assert message in str(error.value)


# -- the network -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    return read_npz(assets.resolve("asset:fashion_mnist/images.npz"), (1, 16, 16))


@pytest.fixture(scope="module")
def trained():
    return load_perceptual("solo:fashion_mnist")


@pytest.fixture
def pictures(shipped):
    """Indices and pixels of 40 pictures, and as many others none of which has the first one's label."""
    first = list(range(0, 6000, 150))
    second = [next(j for j in range(i + 70, 6000 + i) if shipped.labels[j % 6000] != shipped.labels[i]) for i in first]
    return first, shipped.batch(first), shipped.batch([j % 6000 for j in second])


def test_shapes_on_any_size_and_channels():
    network = GridInstanceNet(3, 5, OneInstance([0]), grid=3, width=8)
    categories, masks = network(torch.zeros(2, 3, 20, 13))
    assert categories.shape == (2, 5, 3, 3)
    assert masks.shape == (2, 9, 20, 13)


def test_a_real_picture_fits_its_instances_better_than_any_other_picture(trained, pictures):
    indices, real, others = pictures
    with torch.no_grad():
        loss, of_others = trained.loss(real, real, indices), trained.loss(others, real, indices)
        blank = trained.loss(torch.full_like(real, -1.0), real, indices)
    assert loss.shape == (40,)
    assert (loss < of_others).all()
    assert (loss < blank).all()
    assert loss.mean() < 0.3 * of_others.mean()


def test_training_is_what_made_it_so(trained, pictures):
    indices, real, _ = pictures
    torch.manual_seed(0)
    untrained = GridInstanceNet(1, 10, trained.instances)
    with torch.no_grad():
        assert trained.loss(real, real, indices).mean() < 0.3 * untrained.loss(real, real, indices).mean()


def test_a_gradient_step_in_pixel_space_lowers_it(trained, pictures):
    """On noisy pictures, each by about step |gradient|, which is what the slope promises."""
    indices, real, _ = pictures
    noisy = (real + 0.4 * torch.randn(real.shape, generator=torch.Generator().manual_seed(0))).requires_grad_()
    before = trained.loss(noisy, real, indices)
    (slope,) = torch.autograd.grad(before.sum(), noisy)
    length = slope.flatten(1).norm(dim=1)
    step = 1e-2
    with torch.no_grad():
        after = trained.loss(noisy - step * slope / length[:, None, None, None], real, indices)
    assert (after < before).all()
    torch.testing.assert_close((before - after).detach(), step * length, rtol=0.3, atol=1e-4)


def test_each_pictures_loss_is_its_own_and_no_weight_learns(trained, pictures):
    indices, real, _ = pictures
    pixels = real[:3].clone().requires_grad_()
    loss = trained.loss(pixels, real[:3], indices[:3])
    loss[1].backward()
    assert (pixels.grad[[0, 2]] == 0).all()
    assert (pixels.grad[1] != 0).any()
    assert not trained.training
    assert all(p.grad is None and not p.requires_grad for p in trained.parameters())
    torch.testing.assert_close(trained.loss(pixels[1:2], real[1:2], indices[1:2]), loss[1:2])


def test_fit_takes_its_seed_and_nothing_else(shipped):
    def fitted(seed):
        torch.manual_seed(0)
        network = GridInstanceNet(1, 10, OneInstance(shipped.labels), width=8)
        return network.fit(shipped.batch(list(range(40))), steps=3, batch_size=8, seed=seed).mask_out.weight

    first = fitted(0)
    torch.rand(5)
    assert torch.equal(fitted(0), first)
    assert not torch.equal(fitted(1), first)


# -- a model of one's own ----------------------------------------------------------------------------------------


class Mine(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Dropout(0.5)
        self.scale = torch.nn.Parameter(torch.ones(()))

    def loss(self, pixels, real, indices):
        return self.scale * self.layer(pixels - real).square().mean((1, 2, 3))


class Plain:
    def loss(self, pixels, real, indices):
        return (pixels - real).abs().mean((1, 2, 3))


@pytest.fixture
def user_module(monkeypatch):
    module = type(sys)("own_perceptual")
    module.instance, module.Mine, module.make, module.plain = Mine(), Mine, lambda: Mine(), Plain()
    module.number, module.makes_a_number, module.wants_more = 3, lambda: 3, lambda path: Mine()
    monkeypatch.setitem(sys.modules, "own_perceptual", module)
    return module


@pytest.mark.parametrize("attribute", ["instance", "Mine", "make"])
def test_a_module_or_what_makes_one_is_frozen(user_module, attribute):
    model = load_perceptual(f"own_perceptual:{attribute}")
    assert isinstance(model, Mine)
    assert not model.training
    pixels = torch.ones(2, 1, 2, 2, requires_grad=True)
    model.loss(pixels, torch.zeros(2, 1, 2, 2), [0, 1]).sum().backward()
    assert model.scale.grad is None
    torch.testing.assert_close(pixels.grad, torch.full_like(pixels, 0.5))


def test_an_object_is_taken_as_it_is(user_module):
    assert load_perceptual("own_perceptual:plain") is user_module.plain


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("own_perceptual:number", "has no method loss(pixels, real, indices)"),
        ("own_perceptual:makes_a_number", "has no method loss(pixels, real, indices)"),
        ("own_perceptual:wants_more", "missing 1 required positional argument: 'path'"),
        ("own_perceptual:gone", "has no 'gone'"),
        ("no_such_module_here:make", "cannot be imported"),
    ],
)
def test_what_is_no_model_is_one_line(user_module, spec, message):
    with pytest.raises(UserError) as error:
        load_perceptual(spec)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
