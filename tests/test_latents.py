"""Real images as latents: each in its place, encoded once, and never those of other images, weights or sizes."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from stepdistill.latents import cached_latents


class Encoder:
    """A family whose latent of a picture is three times it, pooled to half its size; it counts its pictures."""

    device = torch.device("cpu")

    def __init__(self, weight=3.0, size=4):
        self.vae, self.image_shape, self.encoded = nn.Linear(1, 1, bias=False), (1, size, size), 0
        nn.init.constant_(self.vae.weight, weight)

    def encode_images(self, pixels):
        self.encoded += len(pixels)
        return nn.functional.avg_pool2d(self.vae.weight.item() * pixels, 2)


class Pictures:
    def __init__(self, count=7, fingerprint="one"):
        self.pixels, self.fingerprint = (
            torch.randn(count, 1, 4, 4, generator=torch.Generator().manual_seed(0)),
            fingerprint,
        )

    def __len__(self):
        return len(self.pixels)

    def batch(self, index):
        return self.pixels[index]


@pytest.mark.parametrize("batch", [1, 3, 7, 16])
def test_every_image_has_its_latent_in_its_place_whatever_the_batch(batch, tmp_path):
    family, images = Encoder(), Pictures()
    latents = cached_latents(family, images, tmp_path, batch)
    torch.testing.assert_close(latents, nn.functional.avg_pool2d(3 * images.pixels, 2))
    assert family.encoded == 7


def test_they_are_encoded_once(tmp_path):
    first = cached_latents(Encoder(), Pictures(), tmp_path)
    again = Encoder()
    assert torch.equal(cached_latents(again, Pictures(), tmp_path), first)
    assert again.encoded == 0
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("family", "images"),
    [
        (Encoder(weight=2.0), Pictures()),
        (Encoder(size=8), Pictures()),
        (Encoder(), Pictures(fingerprint="two")),
        (Encoder(), Pictures(count=8)),
    ],
    ids=["another VAE", "another size", "other images", "more images"],
)
def test_anything_else_has_a_file_of_its_own(family, images, tmp_path):
    cached_latents(Encoder(), Pictures(), tmp_path)
    latents = cached_latents(family, images, tmp_path)
    assert family.encoded == len(images) == len(latents)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_that_is_cut_short_is_made_again(tmp_path):
    whole = cached_latents(Encoder(), Pictures(), tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-4])
    family = Encoder()
    assert torch.equal(cached_latents(family, Pictures(), tmp_path), whole)
    assert family.encoded == 7


def test_a_teacher_of_pixels_has_none(tmp_path):
    assert cached_latents(SimpleNamespace(vae=None), Pictures(), tmp_path / "cache") is None
    assert cached_latents(SimpleNamespace(), Pictures(), tmp_path / "cache") is None
    assert not (tmp_path / "cache").exists()
