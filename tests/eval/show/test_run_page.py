import base64
import json
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from stepdistill.errors import UserError
from stepdistill.eval.show.run_files import read_metrics
from stepdistill.eval.show.run_page import MOST_SAMPLES, write_report
from stepdistill.run_record import FILE, PartRecord, RunRecord

CONFIG = """
method: dmd2
seed: 3
teacher: {path: "teachers/<script>alert(1)</script>", steps: 25}
sampler: {steps: 1}
"""


class Page(HTMLParser):
    """Every tag that is opened, the addresses that a browser would fetch, and the text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action", "data")]

    def handle_data(self, data):
        self.text.append(data)


def picture(path):
    path.parent.mkdir(exist_ok=True)
    Image.new("RGB", (4, 4), "red").save(path)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "a <b>run"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    environment = {
        "versions": {"torch": "2.13", "xformers": None},
        "git": {"commit": "abc123", "dirty": True},
        "command": "stepdistill distill x.yaml 'name=<img src=x>'",
        "seed": 3,
        "started": "2026-01-01",
    }
    (folder / "environment.json").write_text(json.dumps(environment))
    rows = [
        {"iteration": i, "seconds": 1.5 * i, "loss/student": 100.0 / (i + 1), "grad_norm/student": 1.0, "odd<i>": i}
        for i in range(5)
    ]
    lines = [json.dumps(row) for row in rows]
    lines[2] = lines[2].replace('"loss/student": 33.333333333333336', '"loss/student": NaN')
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"iteration": 5, "loss/st')
    row = {"name": "<u>teacher</u>", "steps": 25, "passes_per_image": 25.0, "frechet": 2.5, "images_per_second": 9.0}
    protocol = {"metric": "frechet[tiny]", "settings": {"samples": 20, "seed": 0}, "reference": {"n": 200}}
    (folder / "evaluation.json").write_text(json.dumps({"protocol": protocol, "rows": [row]}))
    picture(folder / "grid.png")
    for iteration in range(0, 200, 10):
        picture(folder / "samples" / f"{iteration:06d}.png")
    return folder


def test_the_page_holds_everything_and_fetches_nothing(run):
    text = write_report(run).read_text()
    page = Page(text)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert not re.search(r"(https?:)?//[a-z]", text)
    assert "@import" not in text
    pictures = [base64.b64decode(a.split(",")[1]) for a in page.addresses if a.startswith("data:")]
    assert pictures[0] == (run / "grid.png").read_bytes()
    assert len(pictures) == 1 + MOST_SAMPLES
    assert page.tags.count("svg") == 3
    assert "viewport" in text
    shown = "".join(page.text)
    for words in (
        "dmd2",
        "frechet[tiny]",
        "2.500",
        "abc123, with changes",
        "torch 2.13",
        "0 student updates",
        "190 student updates",
    ):
        assert words in shown
    assert "1 values that are not finite are left out" in shown
    assert "Not there" not in shown
    assert [p.name for p in run.iterdir() if "report" in p.name] == ["report.html"]


def test_what_a_user_wrote_is_text(run):
    page = Page(write_report(run).read_text())
    assert not {"script", "b", "u", "i"} & set(page.tags)
    shown = "".join(page.text)
    for words in ("a <b>run", "<script>alert(1)</script>", "<u>teacher</u>", "name=<img src=x>"):
        assert words in shown


@pytest.mark.parametrize(
    "name", ["config.yaml", "environment.json", "metrics.jsonl", "evaluation.json", "grid.png", "samples/*.png"]
)
def test_what_is_missing_is_named(run, name):
    for path in run.glob(name):
        path.unlink()
    shown = "".join(Page(write_report(run).read_text()).text)
    assert re.findall(r"Not there: ([a-z.*/]+[a-z])", shown) == [name]


def test_damaged_files_do_not_stop_the_page(run):
    (run / "evaluation.json").write_text("{")
    (run / "environment.json").write_text("[1]")
    (run / "config.yaml").write_text("a: [")
    shown = "".join(Page(write_report(run).read_text()).text)
    assert shown.count("Not there") == 2
    assert "a: [" in shown


def test_metrics_are_read_past_a_cut_line(run):
    curves = read_metrics(run / "metrics.jsonl")
    assert set(curves) == {"loss/student", "grad_norm/student", "odd<i>"}
    assert curves["grad_norm/student"] == ([0.0, 1.0, 2.0, 3.0, 4.0], [1.0] * 5)


def test_a_long_run_gives_a_small_page(run):
    lines = [json.dumps({"iteration": i, "loss/student": 1.0 + i % 7}) for i in range(20000)]
    (run / "metrics.jsonl").write_text("\n".join(lines))
    assert len(write_report(run).read_bytes()) < 300_000


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    for path, message in ((tmp_path, "is not a run"), (tmp_path / "none", "no such folder")):
        with pytest.raises(UserError, match=message):
            write_report(path)
    assert not list(tmp_path.iterdir())


def test_what_a_tuning_run_watched_has_a_section_of_its_own(run):
    title = "Reward and distance to the untuned model"
    assert title not in write_report(run).read_text()
    rows = [{"iteration": i, "loss/student": 1.0, "probe/reward@1": 0.1 * i, "probe/distance@1": 0.2} for i in (1, 2)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = write_report(run).read_text()
    tuning, others = text[text.index(title) : text.index("<h2>Curves")], text[text.index("<h2>Curves") :]
    assert re.findall(r'aria-label="([^"]*)"', tuning) == ["distance@1", "reward@1"]
    assert re.findall(r'aria-label="([^"]*)"', others[: others.index("<h2>Samples")]) == ["loss/student"]


@pytest.mark.parametrize("folder", ["../other", "/etc", "a/../../b"])
def test_parts_outside_of_the_run_are_not_read(run, folder):
    (run / FILE).write_text(json.dumps({"parts": [{"name": "x", "folder": folder, "method": "dmd2"}]}))
    assert "Curves: x" not in write_report(run).read_text()


@pytest.mark.parametrize("stages", [False, True])
def test_several_students_are_listed_with_what_each_cost(run, stages):
    folders = {"student 0": "student-0", "student 1": "student-1"}
    if stages:
        folders = {f"{name}, dm": f"{folder}/01-dm" for name, folder in folders.items()}
        folders = {"shared, tsm": "shared/01-tsm", **folders}
    parts = [
        PartRecord(name=name, folder=folder, method="tsm" if "tsm" in name else "dmd2", undivided=False)
        for name, folder in folders.items()
    ]
    RunRecord(parts=parts).save(run)
    for number, folder in enumerate(folders.values()):
        (run / folder).mkdir(parents=True)
        row = {"iteration": 1, "seconds": 60, "passes": 1000 + number, "updates/student": 7, "loss/student": 1.0}
        (run / folder / "metrics.jsonl").write_text(json.dumps(row))
    text = write_report(run).read_text()
    cells = text[text.index("<h2>Students") : text.index("<h2>Curves")]
    for number, name in enumerate(folders):
        method = "tsm" if "tsm" in name else "dmd2"
        assert f"<td>{name}</td><td>{method}</td><td>7</td><td>{1000 + number:,}</td>" in cells
        assert f"<h2>Curves: {name}" in text
