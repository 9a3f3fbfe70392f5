"""Reports, comparisons and evaluations of runs whose files are damaged or of another type: a page or one line."""

from __future__ import annotations

import json
import os
import time

import pytest

from stepdistill.errors import UserError
from stepdistill.eval.measure.results import check_replaceable, read_results
from stepdistill.eval.run_evaluation import MeasuredRun, read_label_names
from stepdistill.eval.show.comparison_page import write_comparison
from stepdistill.eval.show.curves import read_curve
from stepdistill.eval.show.run_files import cost_cells, read_metrics
from stepdistill.eval.show.run_page import write_report
from stepdistill.run import RunFolder
from stepdistill.run_record import FILE, RunRecord
from stepdistill.trainers.plans.compared import COST, read_cost

ROW = {"iteration": 1, "seconds": 1.0, "passes": 8, "loss/student": 0.5, "updates/student": 1}
EVALUATION = {
    "date": "2026-01-01 00:00:00",
    "protocol": {"metric": "frechet[x]", "settings": {"samples": 4}, "reference": {"n": 4}, "seeds": [0]},
    "rows": [
        {
            "name": "teacher",
            "steps": 4,
            "frechet": 1.0,
            "passes_per_image": 4.0,
            "images_per_second": 2.0,
            "parameters": [10],
            "rewards": {"a": 1.0},
            "std": {"frechet": 0.1, "rewards": {"a": 0.1}},
            "latency": {"seconds": 0.1, "shares": {"denoiser": 1.0}},
            "fingerprint": "f",
        }
    ],
}
CONFIG = "method: dmd2\noutput: x\nteacher: {path: t, steps: 4}\ntrain: {updates: 1, batch_size: 1}\n"


def make_run(folder):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "metrics.jsonl").write_text(json.dumps(ROW) + "\n")
    (folder / "environment.json").write_text('{"seed": 0}')
    RunRecord().save(folder)
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / "distances.json").write_text("[[0, 2.0], [8, 1.0]]")
    return folder


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path / "run")


def pages(run):
    """The report of the run, and the page of it and a whole one ("": refused, in one line)."""
    other = make_run(run.parent / "other")
    started = time.monotonic()
    report = write_report(run).read_text(encoding="utf-8")
    comparison = write_comparison([run, other], run.parent / "both.html").read_text(encoding="utf-8")
    assert time.monotonic() - started < 20
    return report, comparison


METRICS = [
    "3",
    "[]",
    "null",
    '"x"',
    "{}",
    "[" * 100_000,
    '{"iteration": "one"}',
    '{"iteration": null, "loss/student": 1}',
    '{"iteration": 1e999, "loss/student": 1}',
    '{"iteration": ' + "9" * 400 + ', "loss/student": 1}',
    '{"iteration": ' + "9" * 5000 + "}",
    '{"iteration": 2, "loss/student": ' + "9" * 400 + "}",
    '{"iteration": 2, "loss/student": [1]}',
    '{"iteration": 2, "passes": "many", "seconds": "long", "updates/student": {}}',
    '{"iteration": 2, "passes": null, "seconds": [], "loss/student": true}',
    '{"iteration": 2, "passes": 1e308, "seconds": 1e308, "loss/student": 1e308}',
    '{"iteration": 2, "loss/$a_b^": 1, "loss/\\u0000": 2}',
    "\udc80\udcff",
]


def spoil(run, lines):
    with (run / "metrics.jsonl").open("ab") as file:
        file.write("".join(f"{line}\n" for line in lines).encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize("line", METRICS)
def test_rows_of_metrics_that_are_no_rows(line, run):
    spoil(run, [line])
    assert read_metrics(run / "metrics.jsonl")["loss/student"][1][0] == 0.5
    assert len(cost_cells(run)) == 3


def test_pages_of_rows_that_are_no_rows(run):
    spoil(run, METRICS)
    report, comparison = pages(run)
    assert "Curves" in report
    assert "Losses over training" in comparison


CHANGES = [
    {"rows": None},
    {"rows": 3},
    {"rows": [3]},
    {"rows": [{}]},
    {"rows": [{"name": 3}]},
    {"rows": [{"name": "a", "frechet": "near"}]},
    {"rows": [{"name": "a", "frechet": [1]}]},
    {"rows": [{"name": "a", "frechet": True}]},
    {"rows": [{"name": "a", "parameters": 3}]},
    {"rows": [{"name": "a", "parameters": ["many"]}]},
    {"rows": [{"name": "a", "rewards": 3}]},
    {"rows": [{"name": "a", "rewards": {"b": "c"}}]},
    {"rows": [{"name": "a", "std": [1]}]},
    {"rows": [{"name": "a", "latency": 3}]},
    {"rows": [{"name": "a", "latency": {"seconds": 1, "shares": [1]}}]},
    {"rows": [{"name": "a", "fingerprint": {}}]},
    {"protocol": 3},
    {"protocol": {"settings": 3}},
    {"protocol": {"settings": {"samples": "many", "precision_recall": True}}},
    {"protocol": {"reference": [1]}},
    {"protocol": {"extractor_fingerprint": 3}},
    {"protocol": {"seeds": "all"}},
    {"protocol": {"line": {}}},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_evaluations_of_other_types_are_none(changes, run):
    (run / "evaluation.json").write_text(json.dumps({**EVALUATION, **changes}))
    assert read_results(run / "evaluation.json") is None
    with pytest.raises(UserError, match="is no evaluation of stepdistill's, or damaged"):
        check_replaceable(run / "evaluation.json")


def test_pages_of_an_evaluation_of_another_type(run):
    (run / "evaluation.json").write_text(json.dumps({**EVALUATION, "rows": [{"name": "a", "rewards": 3}]}))
    report, comparison = pages(run)
    assert "Not there: evaluation.json" in report
    assert "Not there: evaluation.json of run" in comparison


def test_a_whole_evaluation_is_read(run):
    assert read_results(run / "evaluation.json") == (EVALUATION["protocol"], EVALUATION["rows"])
    report, comparison = pages(run)
    assert "frechet[x]" in report
    assert "frechet[x]" in comparison


def test_a_row_that_took_no_time_has_no_speed(run):
    row = {**EVALUATION["rows"][0], "images_per_second": 0.0}
    (run / "evaluation.json").write_text(json.dumps({**EVALUATION, "rows": [row]}))
    report, _ = pages(run)
    assert "frechet[x]" in report


CONFIGS = [
    "",
    "[]",
    "a: [",
    "on: 1",
    "a: &a [*a]",
    "msd: {students: 1000000000000}",
    "msd: {students: many}",
    "stages: 3",
    "stages: [{name: ../../etc}, {name: [1]}, 3]",
    "evaluation: 3",
    "evaluation: {seed: [1]}",
    "msd: 3\nstages: {a: 1}",
    "\x00",
]


@pytest.mark.parametrize("config", CONFIGS)
def test_pages_of_a_damaged_config(config, run):
    (run / "metrics.jsonl").unlink()
    (run / "distances.json").unlink()
    (run / "config.yaml").write_text(config)
    report, comparison = pages(run)
    assert "Evaluation" in report
    assert "etc" not in report.partition("<pre>")[0]
    assert "Evaluation" in comparison


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl", "environment.json", "evaluation.json", "grid.png"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link"])
def test_pages_of_what_is_no_file(name, kind, run):
    (run / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(run / name)
    elif kind == "folder":
        (run / name).mkdir()
    else:
        (run / name).symlink_to("/dev/zero")
    started = time.monotonic()
    assert "What was run" in write_report(run).read_text(encoding="utf-8")
    assert time.monotonic() - started < 20


@pytest.mark.parametrize(
    "changes",
    ["teacher: 3", "teacher: {}", "data: []", "evaluation: {samples: many}", "sampler: {steps: 0}"],
)
def test_the_config_of_a_run_that_is_evaluated_is_looked_at(changes, run):
    key = changes.partition(":")[0]
    lines = [line for line in CONFIG.splitlines() if not line.startswith(key)]
    (run / "config.yaml").write_text("\n".join([*lines, changes]))
    with pytest.raises(UserError, match=r"config\.yaml: ") as caught:
        MeasuredRun.read(run)
    assert "\n" not in str(caught.value)


def test_a_runs_config_has_its_defaults(run):
    measured = MeasuredRun.read(run)
    assert measured.evaluation.samples == 5000
    assert measured.labels == "uniform"
    assert measured.record == RunRecord()


RECORDS = [
    "",
    "3",
    "{",
    '{"guidance_scale": "strong"}',
    '{"guidance_scale": -1}',
    '{"baseline": "other"}',
    '{"rewards": [{"reward": "no such"}]}',
    '{"parts": [{"name": "a", "folder": "../a", "method": "dmd2"}]}',
    '{"other": 1}',
]


@pytest.mark.parametrize("content", RECORDS)
def test_a_damaged_record_is_one_line_for_an_evaluation_and_none_for_a_page(content, run):
    (run / FILE).write_text(content)
    with pytest.raises(UserError, match=r"record\.json: ") as caught:
        MeasuredRun.read(run)
    assert "\n" not in str(caught.value)
    assert "Curves" in write_report(run).read_text(encoding="utf-8")


def test_a_run_without_a_record_says_how_to_get_one(run):
    (run / FILE).unlink()
    with pytest.raises(UserError, match=r"record\.json: is missing.*--resume, which writes it"):
        MeasuredRun.read(run)


@pytest.mark.parametrize("content", ["{", "3", "[1]", "[[1]]", '[["a", 1]]', '{"points": 3}', "[[1e999, 1]]"])
def test_a_damaged_curve_is_none(content, run):
    (run / "distances.json").write_text(content)
    assert read_curve(run / "distances.json") == []


@pytest.mark.parametrize(
    "content", ["", "3", "{}", '{"passes": 1}', '{"passes": "x", "minutes": 1, "parameters": 1, "students": 1}']
)
def test_a_damaged_cost_is_none(content, tmp_path):
    (tmp_path / COST).write_text(content)
    assert read_cost(RunFolder(tmp_path)) == {}


@pytest.mark.parametrize("names", [3, "abc", {"a": 1}, [1, 2], None])
def test_names_of_labels_are_a_list_of_words(names, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_text(json.dumps({"_stepdistill": {"label_names": names}}))
    assert read_label_names(tmp_path) is None
