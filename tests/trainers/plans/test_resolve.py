"""From a raw config to its plan: every kind, one way to ask all of them, and each part made once."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import tiny
import yaml
from console import stepdistill

from stepdistill.config import merge
from stepdistill.errors import UserError
from stepdistill.trainers.plans import prepare, single
from stepdistill.trainers.plans.comparison import Comparison
from stepdistill.trainers.plans.resolve import read_comparison, read_job, read_plan, resolve
from stepdistill.trainers.plans.single import Run
from stepdistill.trainers.plans.stages import Stages
from stepdistill.trainers.plans.students import Students

PLANS = Path(__file__).parents[3] / "trainers" / "plans"


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plans")
    tiny.save_pixels(folder / "teacher", "v", labels=4, null=True)
    np.savez(folder / "images.npz", images=np.zeros((8, 8, 8), np.uint8), labels=np.arange(8) % 4)
    return folder


def raw_config(root: Path, output: Path, **changes) -> dict:
    raw = {
        "method": "dmd2",
        "output": str(output),
        "teacher": {"path": str(root / "teacher"), "steps": 3},
        "train": {"updates": 2, "batch_size": 2, "sample_count": 2, "trackers": []},
        "evaluation": {"enabled": False},
    }
    return merge(raw, changes)


STAGES = {"stages": [{"name": "first"}, {"name": "second"}]}
WARM_UP = {"stages": [{"name": "warm", "method": "regression", "regression": {"count": 4}}, {"name": "dm"}]}
JUDGE = {"evaluation": {"extractor": "fashion_mnist", "reference": "asset:fashion_mnist/reference.safetensors"}}


def comparison_of(root: Path, folder: Path, **changes) -> Path:
    """The file of a comparison of one run at a budget of 100 passes."""
    (folder / "run.yaml").write_text(yaml.safe_dump(raw_config(root, folder / "unused", **JUDGE)))
    raw = {"output": str(folder / "out"), "runs": {"A": "run.yaml"}, "passes": 100, **changes}
    (folder / "compare.yaml").write_text(yaml.safe_dump(raw))
    return folder / "compare.yaml"


def test_every_kind_of_config_is_its_plan(root, tmp_path):
    assert type(resolve(raw_config(root, tmp_path))) is Run
    assert type(resolve(raw_config(root, tmp_path, **STAGES))) is Stages
    assert type(resolve(raw_config(root, tmp_path, msd={"students": 2}))) is Students
    assert type(read_plan(comparison_of(root, tmp_path))) is Comparison


def test_plans_are_asked_the_same_questions(root, tmp_path):
    """Jobs, folder, cost: of a whole what its parts say together."""
    one = resolve(raw_config(root, tmp_path / "a"))
    stages = resolve(raw_config(root, tmp_path / "b", **STAGES))
    students = resolve(raw_config(root, tmp_path / "c", msd={"students": 3}))
    both = resolve(raw_config(root, tmp_path / "d", msd={"students": 3}, **STAGES))
    assert [len(plan.jobs) for plan in (one, stages, students, both)] == [1, 2, 3, 6]
    assert [plan.cost // one.cost for plan in (one, stages, students, both)] == [1, 2, 3, 6]
    assert [plan.num_students for plan in (one, stages, students, both)] == [1, 1, 3, 3]
    assert [plan.folder.path.name for plan in (one, stages, students, both)] == ["a", "b", "c", "d"]
    assert [plan.measurable for plan in (one, stages, students, both)] == [True, False, False, False]
    assert not any(plan.finished or plan.check_folder(resume=False) for plan in (one, stages, students, both))
    assert [len(plan.undivided_jobs) for plan in (students, both)] == [1, 2]
    assert all(job.config.data.part is None for job in both.undivided_jobs)


def test_the_teachers_pairs_are_counted_once_for_all_students(root, tmp_path):
    stages = resolve(raw_config(root, tmp_path / "one", **WARM_UP))
    students = resolve(raw_config(root, tmp_path / "two", msd={"students": 2}, **WARM_UP))
    (pairs,) = [job.method.passes(job.config).before for job in stages.jobs if job.needs.teacher_pairs]
    assert pairs > 0
    assert students.cost == 2 * stages.cost - pairs


def test_one_student_is_a_plan_too(root, tmp_path):
    students = resolve(raw_config(root, tmp_path / "out", msd={"students": 2}))
    assert students.part("1").jobs == students.students[1].jobs
    assert students.part("1").output == tmp_path / "out" / "student-1"
    for name in ("2", "-1", "x"):
        with pytest.raises(UserError, match=rf"--student {name}: students are 0\.\.1, or shared"):
            students.part(name)
    with pytest.raises(UserError, match="--student shared: no stage has shared = true"):
        students.part("shared")
    for raw in (raw_config(root, tmp_path / "one"), raw_config(root, tmp_path / "one", **STAGES)):
        with pytest.raises(UserError, match="--student 0: the config has one student"):
            resolve(raw).part("0")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"msd": {"students": 2}}, "several students"),
        (STAGES, "a recipe of stages"),
        ({"runs": {}}, "a comparison of runs"),
    ],
)
def test_what_takes_one_run_refuses_several(root, tmp_path, changes, says):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(raw_config(root, tmp_path / "out", **changes)))
    with pytest.raises(UserError, match=says):
        read_job(path)


def test_a_comparison_is_no_run_of_another(root, tmp_path):
    comparison_of(root, tmp_path)
    path = tmp_path / "outer.yaml"
    path.write_text(yaml.safe_dump({"output": str(tmp_path / "o"), "runs": {"A": "compare.yaml"}, "passes": 1}))
    with pytest.raises(UserError, match=r"runs\.A: .*compare\.yaml is a comparison itself; name a run's config"):
        read_comparison(path)


def test_the_budget_is_shared_by_students(root, tmp_path):
    config = {"config": "run.yaml", "overrides": ["msd={students: 2}"]}
    comparison = read_comparison(comparison_of(root, tmp_path, runs={"A": "run.yaml", "B": config}))
    budgets = {name: [job.config.train.max_passes for job in run.plan.jobs] for name, run in comparison.runs.items()}
    assert budgets == {"A": [100], "B": [50, 50]}


@pytest.mark.parametrize("command", ["distill", "compare"])
def test_a_dry_run_shows_a_comparison_and_tries_its_runs(command, root, tmp_path):
    path = comparison_of(root, tmp_path)
    judged = stepdistill(command, path, "overrides=[evaluation.enabled=true]", "--dry-run")
    assert judged.code == 2  # the teacher draws 8x8 pixels, and the reference is of 16x16
    assert "reference" in judged.error
    shown = stepdistill(command, path, "--dry-run")
    assert shown.code == 0, shown.err
    first, *_, run = shown.out.splitlines()
    assert first == f"# 1 run at a budget of 100 network passes, in {tmp_path / 'out'}"
    assert run.split() == ["A", "dmd2", str(read_comparison(path).runs["A"].plan.cost)]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", [{}, {"stages": [{"name": "only"}]}])
def test_teacher_and_sampler_are_made_once(kind, root, tmp_path, monkeypatch):
    """A run loads its teacher once, and trains and exports with the sampler that was checked."""
    plan = resolve(raw_config(root, tmp_path / "out", **kind))
    loaded, samplers, used = [], [], []
    load, build, export = prepare.load_teacher, single.build_trainer, single.export
    make = plan.job.method.make_sampler

    def spied_make(*arguments):
        samplers.append(make(*arguments))
        return samplers[-1]

    def spied_build(*arguments, **keywords):
        trainer = build(*arguments, **keywords)
        used.append(trainer.sampler)
        return trainer

    monkeypatch.setattr(prepare, "load_teacher", lambda config: loaded.append(load(config)) or loaded[-1])
    monkeypatch.setattr(plan.job.method, "make_sampler", staticmethod(spied_make))
    monkeypatch.setattr(single, "build_trainer", spied_build)
    monkeypatch.setattr(single, "export", lambda job, trainer, run: used.append(trainer.sampler))
    assert export is not single.export
    if kind:
        plan = plan.stages[0]
    assert plan.train(False)
    assert len(loaded) == len(samplers) == 1
    assert used == [samplers[0]] * 2


def test_only_resolve_looks_what_kind_a_config_is():
    """No other file tells the kinds of plans apart, or looks for the keys that make them."""
    kinds = {"Plan", "Run", "Stage", "Stages", "Students", "OneStudent", "Comparison"}
    for path in PLANS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance":
                names = {name.id for name in ast.walk(node.args[1]) if isinstance(name, ast.Name)}
                assert not names & kinds, f"{path}:{node.lineno}"
