"""What a call costs: parts, passes and speed-ups, on tiny pipelines."""

from __future__ import annotations

import json

import pytest
import torch
from console import stepdistill

from stepdistill.errors import UserError
from stepdistill.eval.speed.inference import (
    ALL,
    Inference,
    Row,
    load_inference,
    make_random_inference,
)
from stepdistill.eval.speed.latency import Latency, measure_latency
from stepdistill.eval.speed.speed_up import describe, speed_up
from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.families import random_sizes


def row(seconds, text, denoiser, decoder, passes, name="student"):
    shares = {"text_encoder": text, "denoiser": denoiser, "decoder": decoder, "rest": 1 - text - denoiser - decoder}
    latency = Latency(seconds, 1 / seconds, shares, passes, 1, 1, "cpu")
    return Row(name, 1, "stock", latency, None)


def test_speed_ups_by_hand():
    """Teacher: 0.1 text, 50 passes of 0.2, 0.4 decoder, 0.5 rest; student: the same parts, one pass, 0.05 rest."""
    teacher = row(11.0, 0.1 / 11, 10 / 11, 0.4 / 11, 50)
    student = row(0.75, 0.1 / 0.75, 0.2 / 0.75, 0.4 / 0.75, 1)
    ratios = speed_up(teacher, student)
    assert ratios["speed_up"] == pytest.approx(11 / 0.75)
    assert ratios["passes"] == 50
    assert ratios["denoiser"] == pytest.approx(50)
    assert ratios["allowed"] == pytest.approx((0.1 + 0.4 + 10) / (0.1 + 0.4 + 0.2))


@pytest.mark.parametrize(("steps", "guidance", "passes"), [(1, 0.0, 1), (3, 0.0, 3), (2, 5.0, 4)])
def test_passes_are_counted_a_picture(stable_diffusion_folder, steps, guidance, passes):
    stock = StockPipeline.load(stable_diffusion_folder)
    for batch in (1, 2):
        latency = measure_latency(stock, steps, batch, guidance, repeats=2)
        assert latency.passes == passes
        assert latency.batch_size == batch
        assert sum(latency.shares.values()) == pytest.approx(1)
        assert all(latency.shares[part] > 0 for part in ("text_encoder", "denoiser", "decoder"))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in stock.denoiser.modules())


def test_rows_and_table(stable_diffusion_folder):
    stock = StockPipeline.load(stable_diffusion_folder)
    before = {name: type(p) for name, p in stock.denoiser.attn_processors.items()}
    case = Inference(stock, stock, 1, 2, 5.0, 0.0, attention=("_native_math",), repeats=1)
    rows = case.run()
    assert [(r.name, r.setup) for r in rows] == [
        ("teacher", "stock"),
        ("student", "stock"),
        ("student", "accelerated"),
        ("student", "_native_math"),
    ]
    assert [r.latency.passes for r in rows] == [4, 1, 1, 1]
    assert {name: type(p) for name, p in stock.denoiser.attn_processors.items()} == before
    text = describe(case, rows)
    assert "4 x fewer passes" in text
    assert all(f"student, {setup}" in text for setup in ("stock", "accelerated", "_native_math"))
    everything = Inference(stock, stock, 1, 1, attention=(ALL,))._list_backends()
    assert {"native", "_native_math"} <= set(everything)
    assert "flash" not in everything


def test_a_student_names_its_teacher(student_folder, label_folder):
    with pytest.raises(UserError, match="does not say what it was distilled from"):
        load_inference(str(student_folder), None, "cpu", torch.float32)
    case = load_inference(str(student_folder), str(label_folder), "cpu", torch.float32, teacher_steps=2)
    assert (case.steps, case.teacher_steps) == (1, 2)
    with pytest.raises(UserError, match="no such folder"):
        load_inference(str(student_folder), "nowhere", "cpu", torch.float32)


def test_random_pipelines_are_whole(monkeypatch):
    """At tiny sizes of the same classes: SD and SDXL draw, with one and two text encoders."""
    blocks = {"block_out_channels": (32, 32), "sample_size": 8, "layers_per_block": 1, "cross_attention_dim": 32}
    kinds = {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    }
    added = {"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 8 * 6 + 16, "attention_head_dim": 4}
    xl = random_sizes.SDXL | blocks | kinds | added | {"transformer_layers_per_block": (1, 1)}
    monkeypatch.setattr(random_sizes, "PIPELINE_SIZES", {"sd15": blocks | kinds, "sdxl": xl})
    monkeypatch.setattr(random_sizes, "TEXT_ENCODERS", {"sd15": [(32, 1, 2)], "sdxl": [(16, 1, 2), (16, 1, 2)]})
    monkeypatch.setattr(random_sizes, "VAE_CHANNELS", dict.fromkeys(("sd15", "sdxl"), (32, 32, 32, 32)))
    for size in ("sd15", "sdxl"):
        stock = StockPipeline(random_sizes.random_pipeline(size), size)
        latency = measure_latency(stock, 1, guidance_scale=0.0, repeats=1)
        assert latency.passes == 1
        assert latency.shares["text_encoder"] > 0
    with pytest.raises(UserError, match="--random-size sd9: sizes are sd-small, sd15, sdxl"):
        make_random_inference("sd9", "cpu", torch.float32)


def test_the_command(student_folder, label_folder, tmp_path):
    output = tmp_path / "inference.json"
    arguments = ["benchmark", "inference", student_folder, "--teacher", label_folder, "--teacher-steps", 2]
    result = stepdistill(*arguments, "--repeats", 1, "--output", output)
    assert result.code == 0, result.err
    assert "2 x fewer passes" in result.out
    rows = json.loads(output.read_text())
    assert [r["setup"] for r in rows] == ["stock", "stock", "accelerated"]
    for wrong, message in (
        (["benchmark", "inference"], "name a student's folder, or a --random-size"),
        ([*arguments, "--attention", "flash"], "--attention flash: it does not run on this cpu"),
        ([*arguments, "--attention", "fast"], "--attention fast: use all, or one of"),
        ([*arguments, "--dtype", "float64"], "--dtype float64"),
    ):
        result = stepdistill(*wrong)
        assert result.code == 2
        assert message in result.error
