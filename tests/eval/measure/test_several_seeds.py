"""Repeats with seeds: their means and deviations, and diversity over the pictures of one condition."""

import json
import statistics

import pytest
import torch
from console import stepdistill

from stepdistill.errors import UserError
from stepdistill.eval.extractors.load import load_extractor
from stepdistill.eval.measure.evaluate import evaluate
from stepdistill.eval.measure.precision_recall import diversity, precision_recall
from stepdistill.eval.measure.preprocessing import Preprocessing
from stepdistill.eval.measure.reference_statistics import ReferenceStatistics
from stepdistill.eval.measure.settings import Protocol
from stepdistill.eval.measure.targets import Target
from stepdistill.eval.show.tables import results_table, text_table
from stepdistill.eval.stock_pipeline import StockPipeline
from stepdistill.judges.rewards import RewardSettings

SHARPNESS = "stepdistill.judges.rewards:Sharpness"


@pytest.fixture
def settings(network_file, reference_file):
    return Protocol(
        samples=16,
        batch_size=8,
        seed=5,
        extractor=str(network_file),
        kid_subsets=2,
        kid_subset_size=12,
        precision_recall=True,
        rewards=[RewardSettings(reward=SHARPNESS)],
    )


def test_a_row_of_three_seeds_is_three_rows_mean_and_deviation(tmp_path, label_folder, settings):
    target = Target("teacher", label_folder, 1)
    (row,) = evaluate([target], settings.model_copy(update={"seeds": 3}), tmp_path / "three.json")
    alone = []
    for seed in (5, 6, 7):
        alone += evaluate([target], settings.model_copy(update={"seed": seed}), tmp_path / f"{seed}.json")
    for key in ("frechet", "kid_mean", "precision", "recall"):
        values = [row_of_seed[key] for row_of_seed in alone]
        assert [row_of_seed[key] for row_of_seed in row["per_seed"]] == values
        assert row[key] == pytest.approx(statistics.mean(values))
        assert row["std"][key] == pytest.approx(statistics.stdev(values))
    assert len({row_of_seed["frechet"] for row_of_seed in alone}) == 3
    sharp = [row_of_seed["rewards"][SHARPNESS] for row_of_seed in alone]
    assert row["rewards"][SHARPNESS] == pytest.approx(statistics.mean(sharp))
    assert row["std"]["rewards"][SHARPNESS] == pytest.approx(statistics.stdev(sharp))
    assert row["kid_std"] == row["std"]["kid_mean"]
    assert all("std" not in row_of_seed for row_of_seed in alone)
    protocol = json.loads((tmp_path / "three.json").read_text())["protocol"]
    assert protocol["seeds"] == [5, 6, 7]
    assert "n 16 a seed, 8 at a time" in protocol["line"]
    assert protocol["line"].endswith("seeds 5, 6, 7")


def test_pipelines_share_seeds_labels_and_noise(tmp_path, label_folder, student_folder, settings, monkeypatch):
    draws = {}
    stock_generate = StockPipeline.generate

    def generate(self, conditions, noise, steps, generator=None, guidance_scale=None):
        seen = (tuple(conditions), noise.sum().item(), generator.initial_seed())
        draws.setdefault(str(self.path), []).append(seen)
        return stock_generate(self, conditions, noise, steps, generator, guidance_scale)

    monkeypatch.setattr(StockPipeline, "generate", generate)
    targets = [Target("teacher", label_folder, 1), Target("student", student_folder)]
    evaluate(targets, settings.model_copy(update={"seeds": 2}), tmp_path)
    first, second = draws.values()
    assert first == second
    assert len({noise for _, noise, _ in first}) == len(first) == 4
    assert first[0][0] == first[2][0]  # the same labels with either seed


def test_precision_recall_and_diversity_are_those_of_the_features(
    tmp_path, label_folder, settings, network_file, reference_file
):
    settings = settings.model_copy(update={"diversity": True, "neighbours": 2})
    (row,) = evaluate([Target("teacher", label_folder, 1)], settings, tmp_path)
    from measuring import draw_all

    extractor = load_extractor(str(network_file))
    batches = list(draw_all(StockPipeline.load(label_folder), 1, None, settings))
    features = torch.cat([extractor(Preprocessing().to_bytes(pixels)) for pixels, _ in batches])
    labels = [label for _, conditions in batches for label in conditions]
    assert row["diversity"] == pytest.approx(diversity(features, labels), rel=1e-9)
    features_stored = ReferenceStatistics.load(reference_file).features
    assert (row["precision"], row["recall"]) == precision_recall(features_stored, features, 2)
    line = json.loads((tmp_path / "evaluation.json").read_text())["protocol"]["line"]
    assert "precision and recall of 16 and 16 features, k 2" in line


def test_diversity_wants_pictures_of_one_condition(tmp_path, label_folder, settings):
    """Three labels: three pictures have one each, in one seed."""
    once = settings.model_copy(update={"samples": 3, "diversity": True, "precision_recall": False, "kid": False})
    target = Target("teacher", label_folder, 1)
    with pytest.raises(UserError, match="each of the 3 is drawn once; draw more samples than conditions"):
        evaluate([target], once, tmp_path)
    (row,) = evaluate([target], once.model_copy(update={"seeds": 2}), tmp_path)
    assert row["diversity"] > 0


def test_the_table_shows_deviations():
    row = {"name": "a", "steps": 1, "passes_per_image": 1.0, "frechet": 2.0, "images_per_second": 10.0}
    several = {"precision": 0.5, "recall": 0.25, "diversity": 7.0, "clip_score": 0.3, "rewards": {"m:R": 1.5}}
    std = {"frechet": 0.125, "precision": 0.01, "recall": 0.02, "clip_score": 0.004, "rewards": {"m:R": 0.5}}
    header, _, first, second = text_table(results_table([{**row, **several, "std": std}, row], "FID")).splitlines()
    assert header.split()[3:-2] == ["FID", "ratio", "precision", "recall", "diversity", "CLIP", "R"]
    for words in ("2.000 ± 0.125", "0.500 ± 0.010", "0.250 ± 0.020", "7.000  ", "0.3000 ± 0.0040", "1.500 ± 0.500"):
        assert words in first
    assert "±" not in second


def test_the_command_takes_seeds_and_measures(tmp_path, label_folder, student_folder, network_file, reference_file):
    result = stepdistill(
        *("evaluate", f"teacher={label_folder}@1", f"student={student_folder}", "--extractor", network_file),
        *("--samples", 12, "--seeds", 2, "--precision-recall", "--diversity", "--set", "kid=false"),
        *("--output", tmp_path / "x.json", "--keep-samples", tmp_path / "kept"),
    )
    assert result.code == 0, result.err
    assert result.out.count("±") == 2 * 3  # distance, precision and recall of two pipelines
    assert "seeds 1234, 1235" in result.out
    assert len(list((tmp_path / "kept").rglob("*.png"))) == 2 * 2 * 12
