import json
import re
import shutil
import time

import numpy as np
import pytest
import torch
from console import stepdistill
from measuring import draw_all
from PIL import Image
from safetensors.torch import load_file, save_file

from stepdistill.config import check
from stepdistill.data.pixels import unit_to_bytes
from stepdistill.errors import UserError
from stepdistill.eval.extractors.load import load_extractor
from stepdistill.eval.measure import evaluate as module
from stepdistill.eval.measure.draws import select_conditions, unit_noise
from stepdistill.eval.measure.evaluate import evaluate
from stepdistill.eval.measure.reference_statistics import ReferenceStatistics
from stepdistill.eval.measure.settings import Protocol
from stepdistill.eval.measure.targets import Target
from stepdistill.eval.show.grid import draw_grid
from stepdistill.eval.show.tables import results_table, text_table
from stepdistill.eval.speed.latency import PARTS, measure_latency
from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.judges.rewards import RewardSettings


@pytest.fixture
def settings(network_file, reference_file):
    return Protocol(samples=20, batch_size=8, extractor=str(network_file), kid_subsets=3, kid_subset_size=15)


@pytest.fixture
def draws(monkeypatch):
    """What every call of generate was given."""
    calls = []
    stock_generate = StockPipeline.generate

    def generate(self, conditions, noise, steps, generator=None, guidance_scale=None):
        calls.append((str(self.path), conditions, noise.clone(), steps, generator.initial_seed()))
        return stock_generate(self, conditions, noise, steps, generator, guidance_scale)

    monkeypatch.setattr(StockPipeline, "generate", generate)
    return calls


def test_every_target_gets_the_same_noise_labels_and_seeds(tmp_path, label_folder, student_folder, settings, draws):
    targets = [
        Target("teacher", label_folder, 3),
        Target("teacher", label_folder, 1),
        Target("student", student_folder),
    ]
    rows = evaluate(targets, settings, tmp_path)
    assert [row["steps"] for row in rows] == [3, 1, 1]
    assert [row["passes_per_image"] for row in rows] == [3, 1, 1]
    batches = [draws[i::3] for i in range(3)]
    assert len(draws) == 9
    for of_batch in batches:
        for _, conditions, noise, _, seed in of_batch[1:]:
            assert conditions == of_batch[0][1]
            assert torch.equal(noise, of_batch[0][2])
            assert seed == of_batch[0][4]
    assert [len(noise) for _, _, noise, _, _ in draws[:3]] == [8, 8, 4]
    assert not torch.equal(draws[0][2], draws[1][2])
    assert [label for _, conditions, *_ in draws[:3] for label in conditions] == [i % 3 for i in range(20)]


def test_noise_is_a_function_of_seed_and_batch():
    one = unit_noise(0, 0, 4000, (1, 2, 2))
    assert torch.equal(one, unit_noise(0, 0, 4000, (1, 2, 2)))
    assert torch.equal(one[:10], unit_noise(0, 0, 4000, (1, 2, 2))[:10])
    for other in (unit_noise(0, 1, 4000, (1, 2, 2)), unit_noise(1, 0, 4000, (1, 2, 2))):
        assert abs((one * other).mean()) < 0.05
    assert one.mean().abs() < 0.05
    assert one.std() == pytest.approx(1, abs=0.05)


def test_the_row_is_the_distance_of_the_samples(tmp_path, label_folder, settings, network_file, reference_file):
    (row,) = evaluate([Target("teacher", label_folder, 2)], settings, tmp_path / "numbers.json")
    stock = StockPipeline.load(label_folder)
    extractor = load_extractor(str(network_file))
    # in the same batches: a convolution's last digits depend on how many pictures it is given
    features = torch.cat([extractor(unit_to_bytes(x)) for x, _ in draw_all(stock, 2, None, settings)])
    reference = ReferenceStatistics.load(reference_file)
    assert row["frechet"] == pytest.approx(reference.frechet(features), rel=1e-9)
    assert (row["kid_mean"], row["kid_std"]) == pytest.approx(reference.kernel(features, 3, 15, 0))
    content = json.loads((tmp_path / "numbers.json").read_text())
    assert content["rows"] == [row]
    protocol = content["protocol"]
    assert protocol["metric"] == "frechet[tiny]"
    assert protocol["extractor_fingerprint"] == reference.extractor_fingerprint
    assert protocol["reference"]["n"] == 200
    assert protocol["settings"]["samples"] == 20
    assert [p.name for p in tmp_path.iterdir()] == ["numbers.json"]


def test_unchanged_rows_are_reused_and_changed_weights_are_not(
    tmp_path, label_folder, student_folder, settings, draws, capsys
):
    student = tmp_path / "student"
    shutil.copytree(student_folder, student)
    targets = [Target("teacher", label_folder, 2), Target("student", student)]
    first = evaluate(targets, settings, tmp_path)
    capsys.readouterr()
    draws.clear()
    (student / "README.md").write_text("a model card changes nothing")
    assert evaluate(targets, settings, tmp_path) == first
    assert draws == []
    assert capsys.readouterr().out.count("unchanged, its numbers") == 2

    weights = student / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_out.bias"] += 0.5
    save_file(tensors, weights, {"format": "pt"})
    again = evaluate(targets, settings, tmp_path)
    assert {call[0] for call in draws} == {str(student)}
    assert again[0] == first[0]
    assert again[1]["frechet"] != first[1]["frechet"]

    draws.clear()
    evaluate([Target("teacher", label_folder, 3), targets[1]], settings, tmp_path)
    assert {call[0] for call in draws} == {str(label_folder)}
    draws.clear()
    evaluate(targets[1:], settings.model_copy(update={"seed": 1}), tmp_path)
    assert len(draws) == 3


def test_what_was_measured_before_a_stop_is_kept(tmp_path, label_folder, student_folder, settings, monkeypatch):
    """A stop at the second target leaves the first one's row; a damaged file is measured over."""
    (tmp_path / "evaluation.json").write_text("{damaged")
    real = module._measure

    def stops(target, tools):
        if target.name == "student":
            raise KeyboardInterrupt
        return real(target, tools)

    monkeypatch.setattr(module, "_measure", stops)
    targets = [Target("teacher", label_folder, 1), Target("student", student_folder)]
    with pytest.raises(KeyboardInterrupt):
        evaluate(targets, settings, tmp_path)
    assert [row["name"] for row in json.loads((tmp_path / "evaluation.json").read_text())["rows"]] == ["teacher"]


def test_only_the_named_labels_are_drawn(label_folder):
    stock = StockPipeline.load(label_folder)
    assert select_conditions(stock, range(2, 7), labels=[2, 0]) == [2, 0, 2, 0, 2]
    with pytest.raises(UserError, match="names no label"):
        check(Protocol, {"labels": []}, "evaluation")


def test_prompts_in_turn_with_guidance(tmp_path, stable_diffusion_folder, network_file, draws):
    """A guided call takes two passes an image; pictures of another shape than the reference's are refused."""
    (tmp_path / "prompts.txt").write_text("a cat\na dog\nan owl\n")
    stock = StockPipeline.load(stable_diffusion_folder)
    settings = Protocol(samples=4, batch_size=2, extractor=str(network_file), prompts=str(tmp_path / "prompts.txt"))
    target = Target("sd", stable_diffusion_folder, 2, guidance_scale=3.0)
    with pytest.raises(UserError, match=r"its pictures are \(1, 16, 16\).*these are \(3, 16, 16\)"):
        evaluate([target], settings, tmp_path)
    assert not (tmp_path / "evaluation.json").exists()
    draws.clear()
    prompts = ["a cat", "a dog", "an owl"]
    list(draw_all(stock, 2, 3.0, settings, prompts))
    assert [call[1] for call in draws] == [["a cat", "a dog"], ["an owl", "a cat"]]
    with pytest.raises(UserError, match="set prompts"):
        select_conditions(stock, range(2), None)


def test_passes_count_the_guided_half(stable_diffusion_folder, tmp_path):
    from stepdistill.data.arrays import read_array_images
    from stepdistill.eval.extractors.load import as_extractor
    from stepdistill.eval.extractors.small import FeatureNetwork
    from stepdistill.eval.measure.reference_statistics import make_reference

    file = FeatureNetwork(3, num_features=4, width=8, name="rgb").save(tmp_path / "features.safetensors")
    pixels = torch.randint(0, 256, (40, 16, 16, 3), generator=torch.Generator().manual_seed(0)).byte().numpy()
    images = read_array_images(pixels, None, (3, 16, 16), False, "noise")
    make_reference(images, as_extractor(FeatureNetwork.load(file))).save(tmp_path / "reference.safetensors")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    settings = Protocol(
        samples=4, batch_size=3, extractor=str(file), prompts=str(tmp_path / "prompts.txt"), kid=False, latency=True
    )
    guided, plain = evaluate(
        [
            Target("guided", stable_diffusion_folder, 2, guidance_scale=3.0),
            Target("plain", stable_diffusion_folder, 2, guidance_scale=0.0),
        ],
        settings,
        tmp_path,
    )
    assert (guided["passes_per_image"], plain["passes_per_image"]) == (4, 2)
    assert guided["kid_mean"] is None
    shares = guided["latency"]["shares"]
    assert set(shares) == set(PARTS)
    assert sum(shares.values()) == pytest.approx(1)
    assert all(shares[part] > 0 for part in PARTS)
    printed = text_table(results_table([guided, plain], "frechet[rgb]"))
    assert "frechet[rgb]" in printed
    assert "KID" not in printed
    assert "ms/call" in printed


def test_latency_without_text_or_decoder(label_folder):
    stock = StockPipeline.load(label_folder)
    latency = measure_latency(stock, steps=2, batch_size=3, repeats=2)
    assert latency.shares["text_encoder"] == latency.shares["decoder"] == 0
    assert latency.shares["denoiser"] > 0
    assert latency.images_per_second == pytest.approx(3 / latency.seconds)
    assert not stock.denoiser._forward_hooks
    assert not stock.denoiser._forward_pre_hooks


def test_latency_puts_the_time_where_it_is_spent(label_folder, monkeypatch):
    """A long sleep inside the network is the denoiser's, one in the scheduler is the rest's."""
    stock = StockPipeline.load(label_folder)
    handle = stock.denoiser.conv_in.register_forward_pre_hook(lambda *_: time.sleep(0.2))
    inside = measure_latency(stock, steps=1, repeats=1, warmup=0)
    handle.remove()
    assert inside.seconds > 0.2
    assert inside.shares["denoiser"] > 0.5
    step = stock.pipeline.scheduler.step
    monkeypatch.setattr(stock.pipeline.scheduler, "step", lambda *a, **k: time.sleep(0.2) or step(*a, **k))
    assert measure_latency(stock, steps=1, repeats=1, warmup=0).shares["rest"] > 0.5


def test_wrong_evaluations_are_refused(tmp_path, label_folder, settings, network_file):
    alone = tmp_path / "alone.safetensors"
    shutil.copy(network_file, alone)
    target = Target("teacher", label_folder, 1)
    for targets, changed, message in (
        ([Target("teacher", label_folder)], {}, "says nothing of its steps"),
        ([target, Target("student", tmp_path / "none", 1)], {}, "no such folder"),
        ([target], {"extractor": str(alone)}, "reference is not set"),
        ([target], {"extractor": "fashion_mnist", "reference": settings.extractor}, "not a file of reference"),
        ([target], {"prompts": str(tmp_path / "none.txt")}, "no such file"),
    ):
        with pytest.raises(UserError, match=message):
            evaluate(targets, settings.model_copy(update=changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_broken_weights_are_named(tmp_path, student_folder, settings):
    broken = tmp_path / "broken"
    shutil.copytree(student_folder, broken)
    weights = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    tensors["conv_in.bias"].fill_(3e38)  # finite, and too large to compute with
    save_file(tensors, weights, {"format": "pt"})
    with pytest.raises(UserError, match="drew pixels that are not numbers"):
        evaluate([Target("student", broken)], settings, tmp_path)


def test_table_compares_with_the_first_row():
    row = {"name": "teacher", "steps": 25, "passes_per_image": 25.0, "frechet": 2.0, "images_per_second": 10.0}
    other = {**row, "name": "student", "steps": 1, "passes_per_image": 1.0, "frechet": 3.0, "images_per_second": 250}
    lines = text_table(results_table([row, {**other, "kid_mean": 0.004, "kid_std": 0.001}], "FID")).splitlines()
    assert lines[0].split() == ["name", "steps", "passes", "FID", "ratio", "KID", "x1000", "images/s", "speed"]
    assert lines[2].split() == ["teacher", "25", "25", "2.000", "1.00", "-", "10.0", "1.0x"]
    assert lines[3].split() == ["student", "1", "1", "3.000", "1.50", "4.00", "±", "1.00", "250.0", "25.0x"]


def test_grid_has_a_block_for_each_target_on_the_same_noise(tmp_path, label_folder, student_folder, draws):
    targets = [Target("teacher", label_folder, 2), Target("student", student_folder)]
    path = draw_grid(targets, tmp_path / "grid.png", rows=2, columns=3, label_names=["one", "two", "three"])
    assert [call[1] for call in draws] == [[0, 1, 2]] * 4
    assert torch.equal(draws[0][2], draws[2][2])
    assert torch.equal(draws[1][2], draws[3][2])
    with Image.open(path) as image:
        assert image.format == "PNG"
        # 64-pixel cells with a gap of 4, a title of 30 above each block, column names of 22 above all
        assert image.size == (3 * 68 + 4, 22 + 2 * (30 + 2 * 68))
        first = StockPipeline.load(label_folder).generate([0, 1, 2], draws[0][2], 2, torch.Generator())[1, 0]
        cell = image.crop((68 + 4, 52, 68 + 68, 52 + 64)).resize((16, 16), Image.Resampling.NEAREST)
        assert torch.equal(torch.from_numpy(np.array(cell)[..., 0]), unit_to_bytes(first))


def test_rewards_are_means_over_the_pictures_in_minus_one_to_one(tmp_path, student_folder, settings, network_file):
    named = ["stepdistill.judges.rewards:Brightness", "stepdistill.judges.rewards:Sharpness"]
    settings = settings.model_copy(update={"rewards": [RewardSettings(reward=name) for name in named]})
    (row,) = evaluate([Target("student", student_folder)], settings, tmp_path)
    stock = StockPipeline.load(student_folder)
    pixels = 2 * torch.cat([pixels for pixels, _ in draw_all(stock, 1, None, settings)]) - 1
    across, down = pixels.diff(dim=-1).abs().mean(), pixels.diff(dim=-2).abs().mean()
    expected = dict(zip(named, (pixels.mean().item(), (across + down).item() / 2), strict=True))
    assert row["rewards"] == pytest.approx(expected, abs=1e-6)
    header, _, line = text_table(results_table([row])).splitlines()
    assert f"{expected[named[1]]:.3f}" in line
    assert "Brightness" in header


def test_the_command_names_targets_times_them_and_draws_them(tmp_path, label_folder, student_folder, network_file):
    targets = [f"before=1={label_folder}@2", f"after={student_folder}"]
    options = [
        "--samples",
        20,
        "--extractor",
        network_file,
        "--latency",
        "--reward",
        "stepdistill.judges.rewards:Sharpness",
    ]
    places = ["--output", tmp_path / "e.json", "--picture", tmp_path / "e.png"]
    result = stepdistill("evaluate", *targets, *options, *places)
    assert result.code == 0, result.error
    rows = json.loads((tmp_path / "e.json").read_text())["rows"]
    assert [(row["name"], row["steps"]) for row in rows] == [("before=1", 2), ("after", 1)]
    assert all(row["latency"]["seconds"] > 0 and len(row["parameters"]) == 1 for row in rows)
    assert all(word in result.out for word in ("Sharpness", "ms/call", "params", "e.png"))
    with Image.open(tmp_path / "e.png") as picture:
        assert picture.height > 4 * 64  # two blocks of two rows


def test_steps_that_the_scheduler_refuses_are_one_line(tmp_path):
    teacher = "asset:fashion_mnist/teacher"
    message = "cannot be sampled in 2000 steps (`num_inference_steps`: 2000 cannot be larger than"
    measured = stepdistill("evaluate", f"{teacher}@2000", "--samples", "4", "--output", tmp_path / "e.json")
    assert (measured.code, message in measured.error) == (2, True), measured.error
    sampled = stepdistill("sample", teacher, "--steps", "2000", "--output", tmp_path / "s.png")
    assert (sampled.code, message in sampled.error) == (2, True), sampled.error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("runs/a", Target("a", "runs/a")),
        ("A=runs/a@4", Target("A", "runs/a", 4)),
        ("A=runs/a@25@3", Target("A", "runs/a", 25, 3.0)),
        ("runs/a@25@7.5", Target("a", "runs/a", 25, 7.5)),
        ("runs/a@home@2", Target("a@home", "runs/a@home", 2)),
        ("runs/a@home@2@1.5", Target("a@home", "runs/a@home", 2, 1.5)),
    ],
)
def test_a_target_says_its_steps_and_guidance(text, target):
    assert Target.parse(text) == target


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a@b", "a@b: what follows @ is a number of steps"),
        ("a@0", "a@0: what follows @ is a number of steps, at least 1"),
        ("a@²", "a@²: what follows @ is a number of steps"),
        ("a@", "a@: what follows @ is a number of steps"),
        ("a@2@", "a@2@: what follows the second @ is a guidance scale"),
        ("a@2@-1", "a@2@-1: what follows the second @ is a guidance scale"),
    ],
)
def test_a_call_that_is_no_number_is_one_line(text, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Target.parse(text)
