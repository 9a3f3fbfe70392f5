"""One page of many runs: what it holds, what it refuses, and that it fetches nothing."""

import json
import re
from html.parser import HTMLParser

import pytest
import yaml
from console import stepdistill
from matplotlib.figure import Figure
from PIL import Image

from stepdistill.errors import UserError
from stepdistill.eval.show import comparison_page
from stepdistill.eval.show.comparison_page import Together, compare_configs, write_comparison
from stepdistill.eval.show.curves import CURVE, draw_curves, read_curve, write_curve
from stepdistill.eval.show.page import Note, Plot


class Page(HTMLParser):
    """Tags, addresses, figures' names, the text, and every table as rows of cells."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.addresses, self.figures, self.text, self.tables = [], [], [], [], []
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.addresses += [v for k, v in attrs if k in ("src", "href", "xlink:href", "srcset", "action", "data")]
        self.figures += [v for k, v in attrs if k == "aria-label"]
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        self.text.append(data)
        if self.in_cell:
            self.tables[-1][-1][-1] += data


PROTOCOL = {"metric": "frechet[tiny]", "extractor": "tiny", "seeds": [0], "settings": {"samples": 20}, "device": "cpu"}


def make_run(folder, method, distance, protocol=PROTOCOL, **config):
    """A finished run: passes twice as fast as seconds, a loss, a curve, numbers and a grid."""
    folder.mkdir(parents=True)
    raw = {"method": method, "output": str(folder), "optimizer": {"student": {"lr": distance / 100}}, **config}
    (folder / "config.yaml").write_text(yaml.safe_dump(raw))
    rows = [
        {
            "iteration": i,
            "seconds": 60.0 * i,
            "passes": 1000 * i,
            "updates/student": 5 * i,
            "loss/student": 1.0 / (i + 1),
        }
        for i in range(1, 5)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"iteration": 5, "se')
    (folder / CURVE).write_text(json.dumps([[0, 9.0], [2000, 2 * distance], [4000, distance]]))
    teacher = {"name": "teacher", "steps": 25, "passes_per_image": 25.0, "frechet": 0.2, "images_per_second": 9.0}
    student = {**teacher, "name": "student", "steps": 1, "frechet": distance, "fingerprint": method}
    content = {"protocol": protocol, "rows": [{**teacher, "fingerprint": "same"}, student]}
    (folder / "evaluation.json").write_text(json.dumps(content))
    Image.new("RGB", (4, 4), "red" if method == "dmd2" else "blue").save(folder / "grid.png")
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        make_run(tmp_path / "a" / "run", "dmd2", 0.5, train={"batch_size": 4}, dmd2={"gan": None}),
        make_run(tmp_path / "b" / "run", "sim", 0.25, train={"batch_size": 4}, sim={"alpha": "<b>1</b>"}),
    ]


def test_the_page_of_two_runs_holds_everything_and_fetches_nothing(tmp_path, runs):
    text = write_comparison(runs, tmp_path / "page" / "report.html").read_text()
    page = Page(text)
    assert all(address.startswith(("data:image/png;base64,", "#")) for address in page.addresses)
    assert not {"script", "link", "iframe", "object", "base", "b"} & set(page.tags)
    assert not re.search(r"(https?:)?//[a-z]", text)
    facts, numbers, configs = page.tables
    assert facts[1:] == [["a/run", "dmd2", "20", "4,000", "4.0"], ["b/run", "sim", "20", "4,000", "4.0"]]
    assert [row[:4] for row in numbers[1:]] == [
        ["a/run: teacher", "25", "25", "0.200"],  # the same row of both runs stands once
        ["a/run: student", "1", "25", "0.500"],
        ["b/run: student", "1", "25", "0.250"],
    ]
    assert configs == [
        ["key", "a/run", "b/run"],
        ["dmd2.gan", "None", "-"],
        ["method", "dmd2", "sim"],
        ["optimizer.student.lr", "0.005", "0.0025"],
        ["sim.alpha", "-", "<b>1</b>"],
    ]
    figures = [
        "distance over network passes",
        "distance over time",
        "loss/student over passes",
        "loss/student over time",
    ]
    assert [name for name in page.figures if " over " in name] == figures
    assert len([a for a in page.addresses if a.startswith("data:")]) == 2
    text = "".join(page.text)
    assert "frechet[tiny]: extractor tiny" in text
    assert "Not there" not in text
    assert "Pictures, on the same noise" in text
    assert [p.name for p in (tmp_path / "page").iterdir()] == ["report.html"]


def test_time_is_read_from_the_metrics(tmp_path, runs, monkeypatch):
    plotted = {}

    def draw_lines(title, series, *_):
        plotted[title] = series
        return Plot(title, "", "not drawn")

    monkeypatch.setattr(comparison_page, "draw_lines", draw_lines)
    write_comparison(runs[:1], tmp_path / "report.html")
    assert plotted["distance over network passes"] == {"run": [([0, 2000, 4000], [9.0, 1.0, 0.5])]}
    ((minutes, values),) = plotted["distance over time"]["run"]
    assert minutes == pytest.approx([0, 2, 4])
    assert values == [9.0, 1.0, 0.5]


def test_numbers_of_different_protocols_are_refused(tmp_path, runs):
    other = make_run(tmp_path / "c", "boot", 0.3, protocol={**PROTOCOL, "settings": {"samples": 50}})
    result = stepdistill("report", *runs, other, "--output", tmp_path / "all.html")
    assert result.code == 2
    assert re.search(r"next to .*: measured under another protocol: samples \(20 there, 50 now\)", result.error)
    assert not (tmp_path / "all.html").exists()
    assert stepdistill("report", *runs, "--output", tmp_path / "all.html").code == 0
    assert (tmp_path / "all.html").is_file()
    assert not (runs[0] / "report.html").exists()
    assert stepdistill("report", runs[0]).code == 0
    assert (runs[0] / "report.html").is_file()


def test_what_is_missing_is_named_and_what_is_no_run_is_refused(tmp_path, runs):
    for name in (CURVE, "evaluation.json", "grid.png", "metrics.jsonl"):
        (runs[1] / name).unlink()
    page = Page(write_comparison(runs, tmp_path / "report.html").read_text())
    text = re.findall(r"Not there: ([^(]*?)\.(?=\s|$)", "".join(page.text) + " ")
    assert text == ["evaluation.json of b/run", "a loss in the metrics.jsonl of two runs", "grid.png of b/run"]
    assert page.tables[0][2] == ["b/run", "sim", "-", "-", "-"]
    with pytest.raises(UserError, match=r"holds no config\.yaml, so it is not a run"):
        write_comparison([*runs, tmp_path], tmp_path / "report.html")
    with pytest.raises(UserError, match="a run is named twice"):
        write_comparison([runs[0], runs[0]], tmp_path / "report.html")


def test_given_numbers_picture_and_level_stand_for_the_runs_own(tmp_path, runs):
    content = {"protocol": PROTOCOL, "rows": [{"name": "all", "steps": 1, "passes_per_image": 1, "frechet": 7.0}]}
    content["rows"][0]["images_per_second"] = 1.0
    (tmp_path / "evaluation.json").write_text(json.dumps(content))
    named = {"DMD2": runs[0], "_$x$": runs[1]}
    summary = [["", "distance"], ["x", "1.0 ± 0.1"]]
    together = Together(
        tmp_path / "evaluation.json", runs[0] / "grid.png", ("teacher", 0.2), "FID", summary, {"DMD2": "DMD"}
    )
    page = Page(write_comparison(named, tmp_path / "r.html", together).read_text())
    assert page.tables[1] == summary
    assert page.tables[2][1][:2] == ["all", "1"]
    assert [name for name in page.figures if name.startswith("FID")] == ["FID over network passes", "FID over time"]
    assert len([a for a in page.addresses if a.startswith("data:")]) == 1


def test_training_seeds_of_one_title_share_a_colour_and_a_column(tmp_path, monkeypatch):
    runs = {f"DMD2, seed {i}": make_run(tmp_path / str(i), "dmd2", 0.5 + i, seed=i) for i in range(2)}
    runs["SIM"] = make_run(tmp_path / "sim", "sim", 0.25, seed=0)
    together = Together(tmp_path / "none", tmp_path / "none", ("teacher", 0.2), "FID", [], dict.fromkeys(runs, "DMD2"))
    together.titles["SIM"] = "SIM"
    plotted, to_svg = {}, comparison_page.to_svg
    monkeypatch.setattr(comparison_page, "to_svg", lambda figure: plotted.update(figure_of(figure)) or to_svg(figure))
    text = write_comparison(runs, tmp_path / "report.html", together).read_text()
    assert "<h1>Comparison of DMD2, SIM</h1>" in text
    for title in ("FID over network passes", "FID over time", "loss/student over passes"):
        colours, legend = plotted[title]
        assert colours[0] == colours[1] != colours[2], title
        assert legend[:2] == ["DMD2", "SIM"]
    assert Page(text).tables[-1][0] == ["key", "DMD2, seed 0", "SIM"]


def figure_of(figure):
    """Its title to its lines' colours and its legend."""
    axes = figure.axes[0]
    return {
        axes.get_title(): (
            [line.get_color() for line in axes.get_lines()],
            [text.get_text() for text in axes.get_legend().get_texts()],
        )
    }


def test_the_curves_of_one_student_share_its_colour(tmp_path, monkeypatch):
    plotted, saved = {}, Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *to, **how: plotted.update(figure_of(figure)) or saved(figure, *to, **how)
    )
    curves = {"a": [[(0, 9.0), (10, 3.0)], [(0, 8.0), (10, 4.0)]], "b": [[(0, 7.0), (10, 2.0)]], "c": [[]]}
    draw_curves(curves, 1.0, "teacher", "FID", [5.0, 10.0], tmp_path / "c.png")
    ((colours, legend),) = plotted.values()
    assert colours[0] == colours[1] != colours[2] != colours[3] == "black"
    assert legend == ["a", "b", "teacher"]
    assert (tmp_path / "c.png").is_file()


def test_grids_of_different_seeds_are_said_to_be(tmp_path):
    runs = [make_run(tmp_path / name, "dmd2", 0.5, evaluation={"seed": seed}) for name, seed in (("a", 1), ("b", 2))]
    assert "Pictures, each on another noise" in write_comparison(runs, tmp_path / "report.html").read_text()


def test_configs_that_agree_do_not_differ():
    same = compare_configs({"a": {"output": "x", "seed": 1}, "b": {"output": "y", "seed": 1}})
    assert same == Note("They do not.")


def test_a_curve_of_another_protocol_is_refused(tmp_path):
    protocol = {"samples": 20, "seed": 0}
    write_curve(tmp_path / CURVE, [(0, 9.0), (10, 1.5)], protocol)
    assert read_curve(tmp_path / CURVE, protocol) == read_curve(tmp_path / CURVE) == [(0, 9.0), (10, 1.5)]
    with pytest.raises(UserError, match=r"measured under another protocol: samples \(20 there, 30 now\)"):
        read_curve(tmp_path / CURVE, {**protocol, "samples": 30})
    (tmp_path / CURVE).write_text("[[0, 9.0]]")  # as it was written before it said
    assert read_curve(tmp_path / CURVE, protocol) == [(0, 9.0)]
    (tmp_path / CURVE).write_text("{")
    assert read_curve(tmp_path / CURVE, protocol) == []
