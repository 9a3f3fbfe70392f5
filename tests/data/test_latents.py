"""Real images as latents: each in its place, encoded once, and never those of other images, weights or sizes."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from stepdistill.data.images import ImageSet
from stepdistill.data.latents import encode_latents_cached
from stepdistill.data.pictures import UnreadablePicture
from stepdistill.errors import UserError


class Encoder:
    """A family whose latent of a picture is three times it, pooled to half its size; it counts its pictures."""

    device = torch.device("cpu")

    def __init__(self, weight=3.0, size=4):
        self.vae, self.image_shape, self.encoded = nn.Linear(1, 1, bias=False), (1, size, size), 0
        nn.init.constant_(self.vae.weight, weight)

    def encode_images(self, pixels):
        self.encoded += len(pixels)
        return nn.functional.avg_pool2d(self.vae.weight.item() * pixels, 2)


def pictures(count=7, fingerprint="one", broken=(), **more):
    """Noise; the ``broken`` ones cannot be read."""
    values = np.random.default_rng(0).integers(0, 256, (count, 4, 4, 1), dtype=np.uint8)

    def read(index):
        if index in broken:
            raise UnreadablePicture(f"{index}.png: not a readable image (cut short); replace it")
        return values[index]

    return ImageSet("noise", read, count, None, fingerprint, **more)


@pytest.mark.parametrize("batch", [1, 3, 7, 16])
def test_every_image_has_its_latent_in_its_place_whatever_the_batch(batch, tmp_path):
    family, images = Encoder(), pictures()
    latents = encode_latents_cached(family, images, tmp_path, batch)
    torch.testing.assert_close(latents, nn.functional.avg_pool2d(3 * images.batch(list(range(7))), 2))
    assert family.encoded == 7


def test_they_are_encoded_once(tmp_path):
    first = encode_latents_cached(Encoder(), pictures(), tmp_path)
    again = Encoder()
    assert torch.equal(encode_latents_cached(again, pictures(), tmp_path), first)
    assert again.encoded == 0
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("family", "images"),
    [
        (Encoder(weight=2.0), pictures()),
        (Encoder(size=8), pictures()),
        (Encoder(), pictures(fingerprint="two")),
        (Encoder(), pictures(count=8)),
    ],
    ids=["another VAE", "another size", "other images", "more images"],
)
def test_anything_else_has_a_file_of_its_own(family, images, tmp_path):
    encode_latents_cached(Encoder(), pictures(), tmp_path)
    latents = encode_latents_cached(family, images, tmp_path)
    assert family.encoded == len(images) == len(latents)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_is_cut_short_is_made_again(tmp_path):
    whole = encode_latents_cached(Encoder(), pictures(), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    family = Encoder()
    assert torch.equal(encode_latents_cached(family, pictures(), tmp_path), whole)
    assert family.encoded == 7


def test_a_teacher_of_pixels_has_none(tmp_path):
    assert encode_latents_cached(SimpleNamespace(vae=None), pictures(), tmp_path / "cache") is None
    assert encode_latents_cached(SimpleNamespace(vae=None), pictures(), tmp_path / "cache") is None
    assert not (tmp_path / "cache").exists()


def test_pictures_that_cannot_be_read_have_no_latent_and_are_remembered(tmp_path):
    images = pictures(broken=(0, 5), max_unreadable=0.3)  # two of seven
    latents = encode_latents_cached(Encoder(), images, tmp_path, 2)
    good = [1, 2, 3, 4, 6]
    torch.testing.assert_close(latents[good], nn.functional.avg_pool2d(3 * images.batch(good), 2))
    assert not latents[[0, 5]].any()
    again, family = pictures(broken=(0, 5), max_unreadable=0.3), Encoder()
    assert torch.equal(encode_latents_cached(family, again, tmp_path), latents)
    assert family.encoded == 0
    assert again.unreadable == images.unreadable
    assert set(again.unreadable) == {0, 5}


@pytest.mark.parametrize("cached", [False, True])
def test_more_than_tolerated_end_it_with_nothing_written(tmp_path, cached):
    if cached:
        encode_latents_cached(Encoder(), pictures(broken=(0, 5), max_unreadable=0.3), tmp_path)
    before = list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"2 of 7 pictures cannot be used: 0\.png, 5\.png; the first: 0\.png: not a"):
        encode_latents_cached(Encoder(), pictures(broken=(0, 5), max_unreadable=0.2), tmp_path)
    assert list(tmp_path.iterdir()) == before
