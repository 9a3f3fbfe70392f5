from pathlib import Path

import pytest
import torch
from diffusers import ConsistencyModelPipeline, DDIMPipeline, DiffusionPipeline
from tiny import save_pixels, scheduler, unet

from stepdistill.errors import UserError
from stepdistill.eval.stock_pipeline import StockPipeline, hub_folder, pipeline_folder


def noise(count, shape, seed=0):
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed))


def test_label_pipeline_says_what_it_is(label_folder, student_folder):
    teacher, student = StockPipeline.load(label_folder), StockPipeline.load(student_folder)
    assert (teacher.condition_kind, teacher.num_labels, teacher.noise_shape) == ("label", 3, (1, 16, 16))
    assert (teacher.provenance, teacher.default_steps, teacher.default_guidance) == ({}, None, None)
    assert (student.num_labels, student.default_steps, student.provenance["method"]) == (3, 1, "dmd2")


@pytest.mark.parametrize("steps", [1, 3])
def test_label_pipeline_runs_the_stock_loop(label_folder, steps):
    """The pictures are those of the scheduler's own steps on the same network, noise and labels."""
    stock = StockPipeline.load(label_folder)
    x = noise(3, stock.noise_shape)
    pixels = stock.generate([0, 1, 2], x, steps, torch.Generator().manual_seed(0))
    plain = DiffusionPipeline.from_pretrained(label_folder)
    plain.scheduler.set_timesteps(steps)
    with torch.no_grad():
        for t in plain.scheduler.timesteps:
            x = plain.scheduler.step(plain.unet(x, t, torch.tensor([0, 1, 2])).sample, t, x).prev_sample
    assert torch.equal(pixels, (x / 2 + 0.5).clamp(0, 1))
    assert pixels.dtype == torch.float32
    assert pixels.min() >= 0
    assert pixels.max() <= 1
    assert pixels.std() > 0.05


def test_half_precision_still_gives_float_pixels(label_folder):
    stock = StockPipeline.load(label_folder, dtype=torch.bfloat16)
    assert stock.denoiser.dtype == torch.bfloat16
    x = noise(3, stock.noise_shape)
    pixels, full = stock.generate([0, 1, 2], x, 2), StockPipeline.load(label_folder).generate([0, 1, 2], x, 2)
    assert pixels.dtype == torch.float32
    assert 0 < (pixels - full).abs().max() < 0.1


def test_labels_and_noise_matter(label_folder):
    stock = StockPipeline.load(label_folder)
    x = noise(2, stock.noise_shape)
    first = stock.generate([0, 1], x, 1)
    assert not torch.equal(first, stock.generate([1, 1], x, 1))
    assert torch.equal(first, stock.generate([0, 1], x, 1))
    assert not torch.equal(first, stock.generate([0, 1], noise(2, stock.noise_shape, 1), 1))


def test_unconditional_pipelines_of_any_class_draw_the_same(tmp_path):
    """DDIM's own pipeline takes no noise; ours does, and gives what DDIM's gives for the noise that it drew."""
    network = unet(channels=3, size=16)
    DDIMPipeline(network, scheduler("v")).save_pretrained(tmp_path / "ddim")
    stock = StockPipeline.load(tmp_path / "ddim")
    assert (stock.condition_kind, stock.num_labels) == ("none", 0)
    plain = DDIMPipeline.from_pretrained(tmp_path / "ddim")
    plain.set_progress_bar_config(disable=True)
    expected = plain(2, torch.Generator().manual_seed(5), num_inference_steps=2, output_type="pt").images
    pixels = stock.generate(None, noise(2, (3, 16, 16), seed=5), 2)
    assert pixels.shape == (2, 3, 16, 16)
    torch.testing.assert_close(pixels, expected, atol=1e-6, rtol=0)


def test_stable_diffusion(stable_diffusion_folder):
    stock = StockPipeline.load(stable_diffusion_folder)
    assert (stock.condition_kind, stock.noise_shape) == ("prompt", (4, 8, 8))
    x = noise(2, stock.noise_shape)
    plain = stock.generate(["a cat", "a dog"], x, 2, torch.Generator().manual_seed(0), guidance_scale=0.0)
    guided = stock.generate(["a cat", "a dog"], x, 2, torch.Generator().manual_seed(0), guidance_scale=5.0)
    assert plain.shape == (2, 3, 16, 16)
    assert 0 <= plain.min() <= plain.max() <= 1
    assert not torch.equal(plain, guided)


def test_the_scheduler_scales_the_noise(tmp_path):
    """Unit noise goes in; a scheduler that starts at sigma 7 multiplies it itself."""
    from diffusers import CMStochasticIterativeScheduler

    scheduler = CMStochasticIterativeScheduler(num_train_timesteps=40, sigma_max=7.0, clip_denoised=False)
    ConsistencyModelPipeline(unet(size=16), scheduler).save_pretrained(tmp_path / "cm")
    stock = StockPipeline.load(tmp_path / "cm")
    seen = []
    stock.pipeline.scheduler.scale_model_input = lambda sample, t: seen.append(sample) or sample
    stock.pipeline.scheduler.is_scale_input_called = True
    x = noise(1, (1, 16, 16))
    stock.generate(None, x, 1)
    torch.testing.assert_close(seen[0], 7 * x)


@pytest.mark.parametrize(
    ("conditions", "shape", "guidance", "message"),
    [
        ([0, 3], (1, 16, 16), None, "label 3 is outside 0..2"),
        ([0], (1, 16, 16), None, "one label for each of 2"),
        (None, (1, 16, 16), None, "got none"),
        ([0, 1], (3, 16, 16), None, "needs noise of shape (B, 1, 16, 16)"),
        ([0, 1], (1, 16, 16), 3.0, "has no guidance"),
    ],
)
def test_wrong_calls_are_refused(label_folder, conditions, shape, guidance, message):
    with pytest.raises(UserError) as error:
        StockPipeline.load(label_folder).generate(conditions, noise(2, shape), 1, guidance_scale=guidance)
    assert message in str(error.value)


def test_a_hub_id_is_its_folder_in_the_cache(tmp_path, monkeypatch):
    """As a run from the hub leaves its teacher."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached, commit = tmp_path / "models--someone--tiny", "0" * 40
    folder = save_pixels(cached / "snapshots" / commit, size=16)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    assert StockPipeline.load("someone/tiny").path == "someone/tiny"
    assert pipeline_folder("someone/tiny") == Path(hub_folder("someone/tiny")) == folder
    assert Path(hub_folder("someone/tiny", commit)) == folder
    for path, revision in (("someone/other", None), ("someone/tiny", "v2"), ("a name/with spaces", None)):
        assert hub_folder(path, revision) == path
    with pytest.raises(UserError, match="someone/other: no such folder, nor a hub id that is in this machine's cache"):
        StockPipeline.load("someone/other")


def test_wrong_folders_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    broken = save_pixels(tmp_path / "broken", size=16)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    for path, message in (("nowhere", "no such folder"), ("empty", "model_index.json"), ("broken", "cannot be loaded")):
        with pytest.raises(UserError, match=message) as error:
            StockPipeline.load(tmp_path / path)
        assert "\n" not in str(error.value)
        assert path in str(error.value)
