"""The shipped text-to-image teacher: a stock pipeline that draws what it is asked for, judged by the shipped judge."""

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from stepdistill import assets
from stepdistill.data.arrays import read_npz
from stepdistill.data.pixels import unit_to_bytes
from stepdistill.data.prompts import read_prompts
from stepdistill.eval.extractors.load import load_extractor
from stepdistill.eval.measure.reference_statistics import ReferenceStatistics
from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.judges.clip import ClipSettings
from stepdistill.judges.load import load_clip

PROMPTS = [
    "grinning face, noto style",
    "red heart, fluent style",
    "red apple, fluent style",
    "umbrella, fluent style",
    "cactus, noto style",
    "crescent moon, noto style",
]
JUDGE = "asset:emoji/matching.safetensors"


def test_it_draws_what_it_is_asked_for():
    stock = StockPipeline.load(assets.resolve("asset:emoji/teacher"), "cpu")
    assert (stock.default_steps, stock.default_guidance) == (25, 3.0)
    noise = torch.randn(len(PROMPTS), *stock.noise_shape, generator=torch.Generator().manual_seed(0))
    pixels = unit_to_bytes(stock.generate(PROMPTS, noise, 10, guidance_scale=3.0))
    score = load_clip(ClipSettings(model=JUDGE, prefix=""))
    scores = torch.stack([score(pixels, [prompt] * len(PROMPTS)) for prompt in PROMPTS])  # a row is a caption
    assert torch.equal(scores.argmax(0), torch.arange(len(PROMPTS)))


def test_it_is_a_stock_pipeline():
    pipe = DiffusionPipeline.from_pretrained(assets.resolve("asset:emoji/teacher"))
    assert type(pipe) is StableDiffusionPipeline
    pipe.set_progress_bar_config(disable=True)
    assert pipe("red heart, noto style", num_inference_steps=1, guidance_scale=3).images[0].size == (64, 64)


def test_its_files_belong_together():
    prompts = read_prompts("asset:emoji/prompts.txt")
    images = read_npz(assets.resolve("asset:emoji/images.npz"), (3, 64, 64))
    assert images.labels == prompts
    reference = ReferenceStatistics.load(assets.resolve("asset:emoji/reference.safetensors"))
    reference.check(load_extractor(JUDGE, "cpu"), (3, 64, 64))
    assert reference.n == len(prompts)
