"""Real images as latents: the posterior's mean, or a new sample of it at every use."""

import copy

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

from stepdistill.data.arrays import read_npz
from stepdistill.data.images import ImageSet
from stepdistill.data.latents import load_latents
from stepdistill.data.streams import RealSource
from stepdistill.errors import UserError
from stepdistill.families import load_family
from stepdistill.noise import Noise
from stepdistill.trainers.plans.build import build_trainer
from stepdistill.trainers.plans.job import make_job


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return tiny.save_stable_diffusion(tmp_path_factory.mktemp("teacher") / "sd")


@pytest.fixture(scope="module")
def family(teacher):
    return load_family(str(teacher))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Ten pictures with captions, as an npz."""
    path = tmp_path_factory.mktemp("images") / "pictures.npz"
    pictures = np.random.default_rng(0).integers(0, 256, (10, 16, 16, 3), dtype=np.uint8)
    np.savez(path, images=pictures, labels=[f"picture {i}" for i in range(10)])
    return path


def posterior_of(family, pictures: ImageSet):
    """The VAE's own, scaled."""
    with torch.no_grad():
        posterior = family.vae.encode(pictures.batch(list(range(len(pictures))))).latent_dist
    return (part * family.vae.config.scaling_factor for part in (posterior.mean, posterior.std))


def pictures_of(family, images) -> ImageSet:
    return read_npz(str(images), family.image_shape)


def test_the_mean_alone_or_with_its_deviation(family, images, tmp_path):
    pictures = pictures_of(family, images)
    mean, std = posterior_of(family, pictures)
    assert std.min() > 1e-3
    latents, deviation = load_latents(family, pictures, tmp_path, "mean")
    torch.testing.assert_close(latents, mean)
    assert deviation is None
    for _ in range(2):  # made, then read
        latents, deviation = load_latents(family, pictures, tmp_path, "sample")
        torch.testing.assert_close(latents, mean)
        torch.testing.assert_close(deviation, std)
    assert len(list(tmp_path.iterdir())) == 2  # neither is taken for the other


def test_every_use_draws_anew_from_the_noise_it_is_told(family, images, tmp_path):
    pictures = pictures_of(family, images)
    latents, std = load_latents(family, pictures, tmp_path, "sample")
    source = RealSource(family, pictures, latents, 0, std=std)
    index = [3, 1, 3]
    first, again, other = (source.samples(index, Noise(seed).randn_like) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first[0], first[2])
    expected = latents[index] + std[index] * Noise(1).randn_like(latents[index])
    torch.testing.assert_close(first, expected)
    noise = Noise(0)
    many = torch.stack([source.samples([5], noise.randn_like)[0] for _ in range(4000)])
    torch.testing.assert_close(many.mean(0), latents[5], rtol=0, atol=5 * std[5].max().item() / 4000**0.5)
    torch.testing.assert_close(many.std(0), std[5], rtol=0.1, atol=0)


def test_the_mean_draws_nothing(family, images, tmp_path):
    pictures = pictures_of(family, images)
    source = RealSource(family, pictures, load_latents(family, pictures, tmp_path, "mean")[0], 0)
    assert torch.equal(source.samples([2, 0]), source.latents[[2, 0]])


def config(teacher, output, **data) -> dict:
    return {
        "method": "tsm",
        "output": str(output),
        "teacher": {"path": str(teacher)},
        "data": data,
        "train": {"updates": 2, "batch_size": 4, "trackers": []},
        "evaluation": {"enabled": False},
    }


def test_a_run_draws_from_its_own_noise_and_goes_on_where_it_was(teacher, images, tmp_path):
    def trainer_of(posterior):
        (tmp_path / "prompts.txt").write_text("a cat\n")
        data = {"images": {"npz": str(images), "posterior": posterior}, "prompts": str(tmp_path / "prompts.txt")}
        return build_trainer(make_job(config(teacher, tmp_path / "run", **data)), None)

    mean, sample = trainer_of("mean"), trainer_of("sample")
    state = sample.noise.get_state()
    real = sample.method.next_batch().real
    reference = mean.method.next_batch()
    assert not torch.equal(real, reference.real)
    draws = Noise(0)
    draws.set_state(state)
    index = list(reference.indices)
    torch.testing.assert_close(
        real, sample.parts.real.latents[index] + sample.parts.real.std[index] * draws.randn_like(real)
    )
    tensors, meta = copy.deepcopy(sample.state())
    following = sample.method.next_batch().real
    sample.restore(tensors, meta, "there")
    assert torch.equal(sample.method.next_batch().real, following)


def test_pairs_are_drawn_too_one_draw_a_side(teacher, tmp_path):
    for side in ("winner", "loser"):
        (tmp_path / "pairs" / side).mkdir(parents=True)
        for i in range(3):
            array = np.random.default_rng(i + 10 * (side == "loser")).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(array).save(tmp_path / "pairs" / side / f"{i}.png")
            (tmp_path / "pairs" / side / f"{i}.txt").write_text(f"picture {i}")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    batches = {}
    for posterior in ("mean", "sample"):
        raw = {
            **config(teacher, tmp_path / posterior, prompts=str(tmp_path / "prompts.txt")),
            "method": "pso",
            "pso": {"mode": "pairs", "pairs": {"folder": str(tmp_path / "pairs"), "posterior": posterior}},
            "roles": {"lora": {"rank": 2}},
        }
        trainer = build_trainer(make_job(raw), None)
        state = trainer.noise.get_state()
        batches[posterior] = trainer, trainer.method.next_batch(), state
    (_, plain, _), (trainer, drawn, state) = batches["mean"], batches["sample"]
    draws = Noise(0)
    draws.set_state(state)
    for side, samples, means in ((0, drawn.real, plain.real), (1, drawn.loser, plain.loser)):
        pairs = trainer.parts.preferences
        pictures = [pairs.pairs.order[k][side] for k in drawn.indices]
        std = torch.stack([pairs.sources[part].std[index] for part, index in pictures])
        torch.testing.assert_close(samples, means + std * draws.randn_like(means))


def test_pictures_of_a_teacher_without_a_vae_have_no_posterior(images, tmp_path):
    teacher = tiny.save_pixels(tmp_path / "pixels", channels=3, size=16)
    raw = config(teacher, tmp_path / "run", images={"npz": str(images), "posterior": "sample"})
    with pytest.raises(UserError, match=r"data\.images\.posterior = sample: this teacher has no VAE"):
        build_trainer(make_job(raw), None)
