"""An evaluation that is stopped and gone on with, and one that two processes share, give one process's numbers."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from measuring import draw_all
from PIL import Image
from ranks import two_ranks

from stepdistill.data.pixels import unit_to_bytes
from stepdistill.errors import UserError
from stepdistill.eval.measure.evaluate import evaluate
from stepdistill.eval.measure.processes import LAUNCHED, Processes, environment_without_launcher
from stepdistill.eval.measure.settings import Protocol
from stepdistill.eval.measure.targets import Target
from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.judges.rewards import RewardSettings
from stepdistill.run import RunFolder

TIMES = {"seconds", "images_per_second"}


def settings_with(network_file, **changes) -> Protocol:
    rewards = [RewardSettings(reward="stepdistill.judges.rewards:Sharpness")]
    sizes = {"samples": 21, "batch_size": 4, "extractor": str(network_file), "kid_subsets": 2, "kid_subset_size": 15}
    measured = {"precision_recall": True, "diversity": True, "seeds": 2, "rewards": rewards}
    return Protocol(**sizes | measured | changes)


@pytest.fixture
def settings(network_file, reference_file):
    return settings_with(network_file)


@pytest.fixture
def generated(monkeypatch):
    """What was drawn, as (path, first noise value); ``stop`` interrupts before the call of that number."""
    calls = types = type("Calls", (list,), {"stop": None})()
    stock_generate = StockPipeline.generate

    def generate(self, conditions, noise, steps, generator=None, guidance_scale=None):
        if calls.stop is not None and len(calls) == calls.stop:
            raise KeyboardInterrupt
        calls.append((str(self.path), float(noise.flatten()[0])))
        return stock_generate(self, conditions, noise, steps, generator, guidance_scale)

    monkeypatch.setattr(StockPipeline, "generate", generate)
    return types


def without_times(rows):
    return [{key: value for key, value in row.items() if key not in TIMES} for row in rows]


def test_what_was_drawn_before_a_stop_is_not_drawn_again(tmp_path, label_folder, student_folder, settings, generated):
    """Six batches a seed, two seeds, two targets: stopped in the second seed of the second target."""
    targets = [Target("teacher", label_folder, 2), Target("student", student_folder)]
    whole = evaluate(targets, settings, tmp_path / "whole.json")
    draws = list(generated)
    assert len(draws) == 24
    assert len(set(draws[:12])) == 12  # a seed's noise is its own
    generated.clear()
    generated.stop = 20
    with pytest.raises(KeyboardInterrupt):
        evaluate(targets, settings, tmp_path / "x.json")
    assert [row["name"] for row in json.loads((tmp_path / "x.json").read_text())["rows"]] == ["teacher"]
    work = tmp_path / "x.work"
    assert len(list(work.rglob("*.safetensors"))) == 8
    left = next(work.rglob("seed-1")) / "000001.safetensors"
    left.rename(left.with_suffix(".safetensors.tmp"))  # as a kill in the middle of writing leaves it
    generated.stop = None
    before = len(generated)
    rows = evaluate(targets, settings, tmp_path / "x.json")
    assert generated[before:] == [draws[19], *draws[20:]]
    assert without_times(rows) == without_times(whole)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole.json", "x.json"]


def test_work_of_other_weights_or_settings_is_not_taken(tmp_path, label_folder, settings, generated):
    target = Target("teacher", label_folder, 1)
    generated.stop = 3
    with pytest.raises(KeyboardInterrupt):
        evaluate([target], settings, tmp_path)
    generated.stop = None
    generated.clear()
    other = settings.model_copy(update={"quantise": "floor"})
    evaluate([target], other, tmp_path)
    assert len(generated) == 12
    assert [p.name for p in tmp_path.iterdir()] == ["evaluation.json"]


def test_pictures_are_kept_where_asked(tmp_path, label_folder, settings, generated):
    target = Target("a teacher/1", label_folder, 1)
    settings = settings.model_copy(update={"seeds": 1})
    generated.stop = 3
    with pytest.raises(KeyboardInterrupt):
        evaluate([target], settings, tmp_path / "x.json")
    generated.stop = None
    generated.clear()
    rows = evaluate([target], settings, tmp_path / "x.json", keep_samples=tmp_path / "kept")
    assert len(generated) == 6  # the stopped one's batches have no pictures
    (folder,) = (tmp_path / "kept").iterdir()
    assert folder.name == "a_teacher_1-1"
    pixels = torch.cat([batch for batch, _ in draw_all(StockPipeline.load(label_folder), 1, None, settings)])
    pictures = [np.array(Image.open(path)) for path in sorted(folder.iterdir())]
    assert np.array_equal(np.stack(pictures), unit_to_bytes(pixels)[:, 0].numpy())
    generated.clear()
    assert evaluate([target], settings, tmp_path / "x.json", keep_samples=tmp_path / "kept") == rows
    assert generated == []
    sorted(folder.iterdir())[5].unlink()
    again = evaluate([target], settings, tmp_path / "x.json", keep_samples=tmp_path / "kept")
    assert without_times(again) == without_times(rows)
    assert len(list(folder.iterdir())) == 21
    with pytest.raises(UserError, match="two pipelines are called a teacher/1; name them apart"):
        evaluate([target, target], settings, tmp_path / "x.json", keep_samples=tmp_path / "kept")


# -- two processes -------------------------------------------------------------------------------------------


def child(root: Path) -> None:
    """One of two processes: an evaluation, and one whose second process draws what is no number."""
    torch.set_num_threads(1)
    processes = Processes.join()
    stock_generate, calls = StockPipeline.generate, []

    def generate(self, conditions, noise, *arguments):
        calls.append(len(noise))
        broken = (root / "broken").exists() and processes.rank == 1
        return stock_generate(self, conditions, noise * float("nan") if broken else noise, *arguments)

    StockPipeline.generate = generate
    arguments = json.loads((root / "arguments.json").read_text())
    settings = settings_with(**arguments["settings"])
    targets = [Target("teacher", arguments["teacher"], 2), Target("student", arguments["student"])]
    rows = evaluate(targets, settings, root / "two.json", processes.device, processes, root / "kept")
    report = {"calls": calls[:], "rows": rows, "world": processes.world, "left": (root / "two.work").exists()}
    processes.agree()
    (root / "broken").touch()
    processes.agree()
    try:
        evaluate(targets, settings.model_copy(update={"seed": 9}), root / "bad.json", "cpu", processes)
    except UserError as error:
        report["error"] = str(error)
    (root / f"report-{processes.rank}.json").write_text(json.dumps(report))
    processes.leave()


@pytest.fixture(scope="module")
def shared(tmp_path_factory, label_folder, student_folder, network_file, reference_file):
    """What two processes said, and what one process measures."""
    root = tmp_path_factory.mktemp("shared")
    arguments = {
        "settings": {"network_file": str(network_file)},
        "teacher": str(label_folder),
        "student": str(student_folder),
    }
    (root / "arguments.json").write_text(json.dumps(arguments))
    targets = [Target("teacher", label_folder, 2), Target("student", student_folder)]
    with two_ranks(__file__, root, timeout=120):
        one = evaluate(targets, settings_with(network_file), root / "one.json", keep_samples=root / "kept-by-one")
    return root, one, [json.loads((root / f"report-{rank}.json").read_text()) for rank in range(2)]


def test_two_processes_measure_what_one_does(shared):
    root, one, (first, second) = shared
    assert (first["world"], second["world"]) == (2, 2)
    for expected, measured in zip(one, first["rows"], strict=True):
        for key in ("frechet", "kid_mean", "kid_std", "precision", "recall", "diversity", "passes_per_image"):
            assert measured[key] == pytest.approx(expected[key], rel=1e-6), key
        assert measured["rewards"] == pytest.approx(expected["rewards"], rel=1e-6)
        assert measured["std"]["frechet"] == pytest.approx(expected["std"]["frechet"], rel=1e-4)
    assert [set(row) for row in second["rows"]] == [{"fingerprint"}] * 2
    stored = json.loads((root / "two.json").read_text())
    assert stored["rows"] == first["rows"]
    assert not (root / "two.work").exists()


def test_they_share_the_batches(shared):
    root, _, (first, second) = shared
    # of six batches of 4 (the last of 1) the first process has 0, 2, 4 and the second 1, 3, 5; two seeds, two targets
    assert first["calls"] == [4, 4, 4] * 4
    assert second["calls"] == [4, 4, 1] * 4
    one, two = (sorted(p.relative_to(f) for p in f.rglob("*.png")) for f in (root / "kept-by-one", root / "kept"))
    assert one == two
    assert len(two) == 2 * 2 * 21


def test_an_error_of_one_ends_both_with_its_words(shared):
    root, _, report = shared
    assert report[0]["error"] == report[1]["error"]
    assert "drew pixels that are not numbers" in report[0]["error"]
    assert not (root / "bad.json").exists()


def test_a_child_that_is_to_be_alone_is(monkeypatch):
    """A run's own evaluation, started by its first process, must not wait for the others."""
    for name in LAUNCHED:
        monkeypatch.setenv(name, "7")
    monkeypatch.setenv("KEPT", "1")
    left = environment_without_launcher()
    assert not set(LAUNCHED) & set(left)
    assert left["KEPT"] == "1"
    from stepdistill.trainers.plans import finish  # slow, and the two processes above have no use for it

    environment = {}
    done = subprocess.CompletedProcess([], 0)
    monkeypatch.setattr(finish.subprocess, "run", lambda _command, env, **_: environment.update(env) or done)
    monkeypatch.setattr(finish, "write_report", lambda _path: None)
    monkeypatch.setattr(finish, "print_last_screen", lambda *_: None)
    config = SimpleNamespace(evaluation=SimpleNamespace(enabled=True))
    finish.evaluate_and_report(config, RunFolder("run"))
    assert environment == left


if __name__ == "__main__":
    child(Path(sys.argv[1]))
