"""Comparing methods at equal passes: the budget, the measured curve, going on, and what cannot be compared."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from console import stepdistill
from PIL import Image
from toys import toy_family, toy_trainer

from stepdistill.analytic import GaussianMixture
from stepdistill.config import merge, read_yaml
from stepdistill.data.images import ImageSet
from stepdistill.data.streams import RealSource
from stepdistill.eval.show.curves import curves_table, distance_at
from stepdistill.eval.show.grid import GAP, HEADER, TITLE
from stepdistill.run import RunFolder
from stepdistill.trainers.methods.base import Phase, planned_updates
from stepdistill.trainers.plans.compared import peak_memory
from stepdistill.trainers.plans.comparison_settings import ComparisonSettings
from stepdistill.trainers.plans.comparison_table import cost_cells
from stepdistill.trainers.plans.resolve import resolve_comparison

SMALL = {
    "teacher": {"path": "asset:fashion_mnist/teacher", "steps": 2},
    "optimizer": {"student": {"lr": 1e-3}, "fake_score": {"lr": 1e-3}},
    "train": {
        "updates": 50,
        "batch_size": 4,
        "sample_count": 10,
        "log_every": 1,
        "trackers": [],
        "checkpoint_every": 1,
    },
    "evaluation": {
        "extractor": "asset:fashion_mnist/features.safetensors",
        "reference": "asset:fashion_mnist/reference.safetensors",
        "batch_size": 20,
        "teacher_steps": [],
    },
}


def write(folder, **changes):
    for name, sections in {
        "dmd2": {"method": "dmd2", "dmd2": {"fake_score_updates": 2}},
        "sim": {"method": "sim"},
    }.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**SMALL, **sections, "output": "unused"}))
    raw = {
        "output": str(folder / "out"),
        "runs": {"DMD2": "dmd2.yaml", "SIM": "sim.yaml"},
        "passes": 200,
        "points": 4,
        "samples": 40,
        "final_samples": 60,
        **changes,
    }
    (folder / "compare.yaml").write_text(yaml.safe_dump(raw))
    return folder / "compare.yaml"


def test_one_command_makes_runs_curves_table_and_pictures(tmp_path):
    config = write(tmp_path)
    result = stepdistill("compare", config)
    assert result.code == 0, result.err[-2000:]
    out = tmp_path / "out"
    for name in ("compare.png", "grid.png", "compare.json", "report.html", "SIM/student/model_index.json"):
        assert (out / name).is_file(), name
    content = json.loads((out / "compare.json").read_text())
    for name, curve in content["curves"].items():
        passes = [done for done, _ in curve]
        assert passes == sorted(passes)
        assert passes[0] == 0
        assert 200 <= passes[-1] <= 260, name  # the budget, to one update
        assert len(passes) == 5
    assert [row["name"] for row in content["final"]] == ["teacher", "DMD2", "SIM"]
    assert "last / teacher" in result.out

    # a second time nothing is trained again
    before = (out / "SIM" / "metrics.jsonl").read_text()
    again = stepdistill("compare", config)
    assert "SIM: finished before" in again.out
    assert (out / "SIM" / "metrics.jsonl").read_text() == before


@pytest.mark.slow
def test_the_curves_last_point_is_what_evaluate_measures(tmp_path):
    config = write(tmp_path, samples=60, runs={"DMD2": "dmd2.yaml"})
    assert stepdistill("compare", config).code == 0
    content = json.loads((tmp_path / "out/compare.json").read_text())
    assert content["curves"]["DMD2"][-1][1] == pytest.approx(content["final"][1]["frechet"], rel=1e-4)


def test_a_protocol_that_does_not_work_is_answered_before_anything_is_trained(tmp_path):
    result = stepdistill("compare", write(tmp_path, diversity=True, final_samples=8))
    assert (result.code, "diversity is of pictures of one condition, and each of the 8" in result.error) == (2, True)
    assert not any((tmp_path / "out" / name).exists() for name in ("DMD2", "SIM"))


@pytest.mark.slow
def test_one_run_alone_and_the_rest_later(tmp_path):
    config = write(tmp_path)
    assert stepdistill("compare", config, "--only", "SIM").out.strip().endswith("SIM: done")
    assert not (tmp_path / "out" / "DMD2").exists()
    shown = stepdistill("compare", config, "--finished")
    assert shown.code == 0, shown.err[-2000:]
    content = json.loads((tmp_path / "out/compare.json").read_text())
    assert [row["name"] for row in content["final"]] == ["teacher", "SIM"]
    assert list(content["curves"]) == ["SIM"]
    assert not (tmp_path / "out" / "DMD2").exists()
    assert stepdistill("compare", config).code == 0
    content = json.loads((tmp_path / "out/compare.json").read_text())
    assert [row["name"] for row in content["final"]] == ["teacher", "DMD2", "SIM"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"passes": 4000}, "train.max_passes (200 there, 4000 now)"),
        ({"overrides": ["optimizer.student.lr=0.5"]}, "optimizer.student.lr (0.001 there, 0.5 now)"),
    ],
)
def test_what_is_finished_is_not_taken_for_another_config_s(tmp_path, changes, says):
    config = write(tmp_path, runs={"DMD2": "dmd2.yaml"})
    assert stepdistill("compare", config).code == 0
    before = (tmp_path / "out/compare.json").read_text()
    write(tmp_path, runs={"DMD2": "dmd2.yaml"}, **changes)
    for more in ([], ["--finished"], ["--only", "DMD2"]):
        result = stepdistill("compare", config, *more)
        assert (result.code, says in result.error) == (2, True), result.error
    assert (tmp_path / "out/compare.json").read_text() == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--only", "BOOT"], "--only BOOT: the runs are DMD2; SIM"),
        (["--only", "BOOT", "seeds=[0, 1]"], "the runs are DMD2; DMD2, seed 0; DMD2, seed 1; SIM; SIM, seed 0"),
        (["passes=0"], "passes = 0"),
        (["runs={A: nowhere.yaml}"], "no such config file"),
        (["passes=100000", "points=1", "--only", "DMD2"], "end after"),
    ],
)
def test_bad_comparisons_are_one_line(tmp_path, arguments, says):
    result = stepdistill("compare", write(tmp_path, overrides=["train.updates=2"]), *arguments)
    assert result.code == 2
    assert says in result.error


def test_runs_that_are_not_comparable_are_refused(tmp_path):
    config = write(tmp_path)
    raw = yaml.safe_load((tmp_path / "sim.yaml").read_text())
    for change, key in (({"seed": 7}, "seed"), ({"data": {"labels": [0, 1]}}, "data.labels")):
        (tmp_path / "sim.yaml").write_text(yaml.safe_dump({**raw, **change}))
        result = stepdistill("compare", config)
        assert result.code == 2
        assert f"runs.SIM: its {key} is not that of DMD2" in result.error
    assert not (tmp_path / "out").exists()


def test_the_budget_ends_a_run_at_the_first_update_past_it():
    trainer = toy_trainer(train={"updates": 1000, "max_passes": 500}, dmd2={"fake_score_updates": 1})
    trainer.fit()
    per_update = 8 * 7  # 4k + 3 passes of a batch of eight: a teacher in closed form makes none
    assert trainer.counters["student"] == -(-500 // per_update)
    assert trainer.passes == trainer.counters["student"] * per_update


@pytest.mark.parametrize("limit", [1, 60, 100, 130, 161])
def test_the_budget_ends_with_a_student_update_that_is_watched(limit):
    """Also where it runs out between the student's turns."""
    trainer = toy_trainer(train={"updates": 1000, "max_passes": limit}, dmd2={"fake_score_updates": 3})
    watched = []
    trainer.watchers.append(lambda trainer: watched.append(trainer.passes))
    trainer.fit()
    assert len(watched) == trainer.counters["student"]
    assert watched[-1] == trainer.passes >= limit
    assert all(passes < limit for passes in watched[:-1])
    again = trainer.counters["student"]
    trainer.fit()  # spent: nothing more
    assert trainer.counters["student"] == again


@pytest.mark.parametrize(
    ("method", "settings", "k", "expected"),
    [
        ("dmd2", {}, 1, 4 * 1 + 4),
        ("dmd2", {}, 3, 4 * 3 + 4),
        ("dmd2", {"guidance_scale": 2.0}, 3, 4 * 3 + 5),
        ("sim", {}, 1, 4 * 1 + 6),
        ("sim", {}, 2, 4 * 2 + 6),
        ("sim", {"guidance_scale": 2.0}, 2, 4 * 2 + 8),
        ("swiftbrush", {"guidance_scale": 1.0}, 1, 4 * 1 + 4),
        ("swiftbrush", {}, 1, 4 * 1 + 6),
        ("swiftbrush", {"fake_score_guidance": "none"}, 1, 4 * 1 + 5),
        ("swiftbrush", {"guidance_range": [0.5, 4.0]}, 1, 4 * 1 + 6),
    ],
)
def test_passes_of_an_update_are_what_the_readme_and_the_plan_say(method, settings, k, expected):
    family = toy_family(GaussianMixture([[-1.0], [1.0]], 0.05, labels=[0, 1]))
    family.teacher_denoiser = lambda: None  # the network is the teacher, so its passes count
    sections = {method: {"fake_score_updates": k, **settings}}
    trainer = toy_trainer(family, method=method, train={"updates": 3}, **sections)
    trainer.repeat(Phase("test", "student", 1, trainer.method.updates), lambda *_: None)
    for _ in range(k - 1):  # the fake score's other updates, until the student's next turn
        trainer.iteration()
    assert trainer.passes == 8 * expected
    assert trainer.method.passes(trainer.config).per_update == expected
    assert planned_updates(type(trainer.method), trainer.config) == 3
    for passes, world, planned in ((1, 1, 1), (2 * trainer.passes, 1, 2), (2 * trainer.passes, 2, 1), (10**9, 1, 3)):
        short = trainer.config.train.model_copy(update={"max_passes": passes})
        assert (
            planned_updates(type(trainer.method), trainer.config.model_copy(update={"train": short}), world) == planned
        )


@pytest.mark.parametrize(
    ("method", "changes", "expected"),
    [
        ("boot", {}, 9),
        ("boot", {"boot": {"guidance_scale": 2.0}}, 11),
        ("boot", {"boot": {"solver": "heun"}}, 10),
        ("boot", {"boot": {"solver": "heun", "guidance_scale": 2.0}}, 13),
        ("tscd", {}, 5),
        ("tscd", {"tscd": {"guidance_scale": 2.0}}, 6),
        ("tscd", {"tscd": {"adversarial": {"weight": 0.1}}}, 9),
        ("tscd", {"tscd": {"adversarial": {"weight": 0.1, "conditional": False}}}, 8),
        ("regression", {"regression": {"count": 16}}, 3),
        ("tsm", {}, 4),
        ("tsm", {"tsm": {"guidance_scale": 2.0}}, 5),
        ("enhance", {"dmd2": {"fake_score_updates": 1}, "enhance": {"mse_weight": 1.0, "hold_weight": 1.0}}, 13),
    ],
)
def test_passes_of_the_methods_without_a_fake_score(method, changes, expected, tmp_path):
    mixture = GaussianMixture([[-1.0], [1.0]], 0.05, labels=[0, 1])
    family = toy_family(mixture)
    family.teacher_denoiser = lambda: None  # the network is the teacher, so its passes count
    real = None
    if method in ("tscd", "tsm"):
        changes = merge({"data": {"images": {"npz": "unused"}}}, changes)
        images = ImageSet("noise", None, 32, [0, 1] * 16, "")
        real = RealSource(family, images, torch.randn(32, 1, 1, 1), 0)
    if method == "enhance":
        changes = merge({"sampler": {"steps": 4}}, changes)
    if method == "regression":
        changes = merge({"output": str(tmp_path / "run"), "teacher": {"steps": 2}}, changes)
    trainer = toy_trainer(family, real, method=method, train={"updates": 3}, **changes)
    trainer.begin()
    before = trainer.passes
    trainer.iteration()
    assert trainer.passes - before == 8 * expected
    assert trainer.method.passes(trainer.config).per_update == expected


@pytest.mark.parametrize(
    ("points", "shown"),
    [(16, [100, 200, 400, 600, 800]), (5, [160, 320, 640, 800]), (1, [800]), (4, [200, 400, 600, 800])],
)
def test_a_table_of_curves_shows_passes_where_they_are_measured(points, shown):
    settings = ComparisonSettings(output="x", runs={"A": "a.yaml"}, passes=800, points=points)
    assert settings.columns() == shown


def test_curve_values_are_the_last_at_or_before():
    curve = [(0, 9.0), (100, 5.0), (205, 3.0)]
    assert [distance_at(curve, passes) for passes in (0, 99, 200, 201, 1000)] == [9.0, 5.0, 5.0, 3.0, 3.0]
    assert distance_at(curve[1:], 50) is None
    cells = curves_table({"a": [curve], "b": [curve, [(0, 8.0), (100, 7.0)]], "c": [[]]}, [0.0, 100.0], 2.0)
    assert cells == [
        ["", "0k", "0k", "last / teacher"],
        ["a", "9.000", "5.000", "1.50"],
        ["b", "8.500 ± 0.707", "6.000 ± 1.414", "2.50"],  # (3 + 7) / 2 / 2
        ["c", "-", "-", "-"],
    ]


# -- more than single runs -------------------------------------------------------------------------------------

STAGE = {"method": "tscd", "data": {"images": {"npz": "asset:fashion_mnist/images.npz"}}}


def write_all_kinds(folder, **changes):
    """A run, a recipe of two stages, two students, and a tuning of the recipe's student, of about 200 passes each."""
    config = write(folder)
    stages = [
        {"name": "a", **STAGE, "train": {"updates": 5}, "tscd": {"segments": 2}, "sampler": {"transition": "ode"}},
        {"name": "b", **STAGE, "train": {"updates": 5}},
    ]
    recipe = {**SMALL, "output": "unused", "sampler": {"steps": 2}, "stages": stages}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    students = {
        **SMALL,
        "method": "dmd2",
        "dmd2": {"fake_score_updates": 2},
        "output": "unused",
        "msd": {"students": 2},
    }
    (folder / "msd.yaml").write_text(yaml.safe_dump(students))
    tuning = {**SMALL, "method": "pso", "output": "unused", "sampler": {"steps": 2}, "roles": {"lora": {"rank": 2}}}
    tuning = merge(
        tuning, {"pso": {"rewards": [{"reward": "stepdistill.judges.rewards:Brightness"}]}, "train": {"updates": 1}}
    )
    (folder / "pso.yaml").write_text(yaml.safe_dump(tuning))
    raw = yaml.safe_load(config.read_text())
    raw["runs"] = {
        "DMD2": "dmd2.yaml",
        "MSD": {"config": "msd.yaml"},
        "recipe": {"config": "recipe.yaml", "steps": [1, 2]},
        "PSO": {"config": "pso.yaml", "tunes": "recipe", "steps": [2]},
    }
    config.write_text(yaml.safe_dump({**raw, **changes}, sort_keys=False))
    return config


def comparison_of(config):
    return resolve_comparison(read_yaml(config), str(config))


def in_one_process(config):
    """What the command does, without a process for each run."""
    comparison_of(config).run()


@pytest.mark.slow
def test_every_kind_of_run_in_one_table(tmp_path, capsys):
    in_one_process(write_all_kinds(tmp_path, precision_recall=True, diversity=True))
    assert "Done." not in capsys.readouterr().out  # a run's closing screen
    content = json.loads((tmp_path / "out/compare.json").read_text())
    names = ["teacher", "DMD2", "MSD", "recipe", "recipe", "PSO"]
    assert [row["name"] for row in content["final"]] == names
    assert [row["steps"] for row in content["final"]][3:] == [1, 2, 2]
    assert content["curves"].keys() == {"DMD2"}
    costs = content["costs"]
    assert costs["recipe"]["passes"] == 200
    assert 200 <= costs["MSD"]["passes"] <= 260  # shared by two
    assert costs["MSD"]["students"] == 2
    assert costs["PSO"]["parameters"] < costs["DMD2"]["parameters"]
    assert all(0 < cost["peak_gib"] < 64 and cost["minutes"] > 0 for cost in costs.values())
    lines = (tmp_path / "out/table.md").read_text().splitlines()
    assert lines[0].count("|") == lines[1].count("|") == 13
    cells = {tuple(c.strip() for c in line.split("|")[1:3]): line for line in lines[2:]}
    assert cells.keys() == {
        ("teacher", "2"),
        ("DMD2", "1"),
        ("MSD", "1"),
        ("recipe", "1"),
        ("recipe", "2"),
        ("PSO", "2"),
    }
    assert "0k + " in cells["PSO", "2"]  # the recipe's passes, and its own
    assert "2 x 0.69M" in cells["MSD", "1"]
    for name in ("DMD2", "MSD", "PSO"):  # a recipe alone has no curve to draw
        (tmp_path / f"out/{name}/student").rename(tmp_path / name)
    (tmp_path / "out/compare.png").unlink()
    capsys.readouterr()
    shown = stepdistill("compare", tmp_path / "compare.yaml", "--finished")
    assert (shown.code, "grid.png" in shown.out, "compare.png" in shown.out) == (0, True, False)
    for name in ("DMD2", "MSD", "PSO"):
        (tmp_path / name).rename(tmp_path / f"out/{name}/student")
    capsys.readouterr()
    in_one_process(tmp_path / "compare.yaml")
    out = capsys.readouterr().out
    assert all(f"{name}: finished before" in out for name in ("DMD2", "MSD", "recipe", "PSO"))


def test_the_teacher_is_guided_as_the_first_is_distilled(tmp_path, monkeypatch):
    class Asked(Exception):
        pass

    def evaluate(targets, *_):
        raise Asked(targets)

    config = write(tmp_path, runs={"DMD2": {"config": "dmd2.yaml", "overrides": ["dmd2.guidance_scale=2.5"]}})
    monkeypatch.setattr("stepdistill.trainers.plans.comparison_report.evaluate", evaluate)
    with pytest.raises(Asked) as stop:
        in_one_process(config)
    ((teacher,),) = stop.value.args
    assert (teacher.name, teacher.steps, teacher.guidance_scale) == ("teacher", 2, 2.5)


@pytest.mark.slow
def test_training_seeds_are_averaged(tmp_path, capsys):
    config = write(tmp_path, seeds=[0, 3], runs={"DMD2": "dmd2.yaml"})
    comparison_of(config).part("DMD2").run()
    assert not (tmp_path / "out/compare.json").exists()
    printed, bars = capsys.readouterr()
    assert printed.endswith("DMD2: done\n")
    assert "| 5/5 [" in bars  # the updates that the passes allow, not the 50 of train.updates
    assert "/50 [" not in bars
    in_one_process(config)
    rows = json.loads((tmp_path / "out/compare.json").read_text())["final"]
    assert [row["name"] for row in rows] == ["teacher", "DMD2, seed 0", "DMD2, seed 3"]
    first, second = (row["frechet"] for row in rows[1:])
    assert first != second
    mean, std = (first + second) / 2, abs(first - second) / 2**0.5
    assert f"| {mean:.3f} ± {std:.3f} |" in (tmp_path / "out/table.md").read_text()
    saved = [yaml.safe_load((tmp_path / f"out/DMD2, seed {s}/config.yaml").read_text())["seed"] for s in (0, 3)]
    assert saved == [0, 3]
    picture = Image.open(tmp_path / "out/grid.png")  # a block each of the teacher and of the first seed
    assert picture.height == HEADER + 2 * (TITLE + 2 * (GAP + 64))  # 32 pixels, enlarged
    assert (tmp_path / "out/compare.png").is_file()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"passes": 400}, "runs.recipe: its stages plan 200 network passes, the budget is 400"),
        (
            {"runs": {"PSO": {"config": "pso.yaml", "tunes": "recipe"}}},
            "tunes = recipe: no run that tunes none has that name",
        ),
        ({"runs": {"DMD2": {"config": "dmd2.yaml", "step": 1}}}, "step"),
        ({"seeds": [1, 1]}, "seeds: one is named twice"),
    ],
)
def test_entries_that_do_not_fit_are_one_line(tmp_path, changes, says):
    result = stepdistill("compare", write_all_kinds(tmp_path, **changes))
    assert result.code == 2
    assert says in result.error
    assert not (tmp_path / "out").exists()


def test_what_is_finished_needs_something_finished(tmp_path):
    config = write(tmp_path)
    assert "--finished: no run is finished in" in stepdistill("compare", config, "--finished").error
    assert "give --only or --finished, not both" in stepdistill("compare", config, "--finished", "--only", "SIM").error
    assert not (tmp_path / "out").exists()


def test_costs_that_are_not_all_there_are_not_shown(tmp_path):
    def made(name, base=None, **cost):
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        (run.path / "cost.json").write_text(json.dumps(cost))
        return SimpleNamespace(folder=run, tuned=base)

    cost = {"passes": 200_000, "minutes": 2.0, "peak_gib": None, "parameters": 5e5, "students": 1}
    bases = [made("a", **cost), made("b", **cost), made("c")]
    tunings = [made(f"on {base.folder.path.name}", base, **cost) for base in bases]
    assert cost_cells(tunings[:2]) == ["200k + 200k", "2.0", "-", "0.50M"]
    assert cost_cells(bases[:2]) == ["200k", "2.0", "-", "0.50M"]
    assert cost_cells(tunings) == cost_cells(tunings[::-1]) == cost_cells(bases) == ["-"] * 4


@pytest.mark.slow
def test_a_process_s_peak_is_not_that_of_the_one_that_started_it():
    ballast = torch.ones(3 * 2**27)  # 1.5 GiB
    child = "from stepdistill.trainers.plans.compared import peak_memory; print(peak_memory())"
    printed = subprocess.run([sys.executable, "-c", child], capture_output=True, text=True, check=True).stdout
    assert 0.05 < float(printed) < ballast.numel() * 4 / 2**30 < peak_memory()


def test_a_run_that_fails_ends_the_comparison_with_its_own_line(tmp_path, capfd):
    config = write(tmp_path, overrides=["train.updates=2"], passes=100000, points=1)
    result = stepdistill("compare", config)
    assert result.code == 2
    assert "runs.DMD2: train.updates = 2 end after" in capfd.readouterr().err
    assert not (tmp_path / "out/compare.json").exists()
