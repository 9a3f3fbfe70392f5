"""Who may write where: one process in a run's folder, none where a command reads, and nowhere over what is not ours."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from console import stepdistill
from killing import raw_config, snapshot
from test_pipeline_folders import stamp
from tiny import save_pixels

from stepdistill import checkpoint, run
from stepdistill.config import merge
from stepdistill.errors import UserError
from stepdistill.locks import Lock
from stepdistill.stock.folders import is_whole
from stepdistill.trainers.loop.trainer import Trainer
from stepdistill.trainers.plans import finish


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("writers")
    save_pixels(folder / "teacher", "v", labels=4, null=True)
    return folder


@pytest.fixture(autouse=True)
def no_report(monkeypatch, request):
    """Its curves take longer than all else."""
    monkeypatch.setattr(finish, "write_report", lambda *_: None)


def config(folder, root, name="run", **changes):
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(merge(raw_config(root, folder / name), changes)))
    return path


@pytest.fixture(scope="module")
def finished(root):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish, "write_report", lambda *_: None)
        assert stepdistill("distill", config(root, root)).code == 0
    return root / "run"


def tree(folder) -> dict:
    """Every file with its bytes and time."""
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


# -- one writer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["distill", "{config}", "--resume"], ["export", "{run}"], ["evaluate", "{run}"]])
def test_a_second_writer_is_one_line_and_changes_nothing(finished, root, command):
    command = [part.format(config=root / "run.yaml", run=finished) for part in command]
    with Lock(finished):
        before = tree(finished)
        result = stepdistill(*command)
        assert result.code == 2
        assert f"{finished}: another process is writing here (process {os.getpid()} on" in result.error
        assert tree(finished) == before


def test_a_new_run_is_not_begun_twice(root, tmp_path):
    with Lock(tmp_path / "run"):
        result = stepdistill("distill", config(tmp_path, root))
        assert "or choose another folder with output=FOLDER" in result.error
        assert os.listdir(tmp_path / "run") == [".lock"]


@pytest.mark.slow
def test_two_processes_that_begin_at_once_leave_one_run(root, tmp_path):
    path = config(tmp_path, root)
    command = [sys.executable, "-m", "stepdistill", "distill", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    errors = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    (loser,) = [error for process, error in zip(both, errors, strict=True) if process.returncode]
    assert "another process is writing here" in loser or "the folder holds a run" in loser
    iterations = [json.loads(row)["iteration"] for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert iterations == sorted(set(iterations))


@pytest.mark.slow
def test_of_several_ranks_every_one_ends_when_another_process_writes(finished, root):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2"}
    environment |= {
        "LOCAL_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(20000 + os.getpid() % 20000),
    }
    command = [sys.executable, "-m", "stepdistill", "distill", str(root / "run.yaml"), "--resume"]
    with Lock(finished):
        ranks = [
            subprocess.Popen(
                command, env={**environment, "RANK": n, "LOCAL_RANK": n}, stderr=subprocess.PIPE, text=True
            )
            for n in "01"
        ]
        errors = [rank.communicate(timeout=100)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], errors
    assert errors[0].count("another process is writing here") == 1
    assert "Traceback" not in errors[0] + errors[1]


def test_students_train_beside_each_other_but_each_once(root, tmp_path):
    path = config(tmp_path, root, "msd", msd={"students": 2}, train={"updates": 1})
    assert stepdistill("distill", path, "--student", "0").code == 0
    with Lock(tmp_path / "msd" / "student-1"):
        result = stepdistill("distill", path, "--student", "1")
        assert result.code == 2
        assert "student-1: another process is writing here" in result.error
    assert stepdistill("distill", path, "--student", "1").code == 0
    assert stepdistill("distill", path, "--resume").code == 0
    assert is_whole(tmp_path / "msd" / "student")


def test_a_hollow_student_is_exported_again_before_it_is_gathered(root, tmp_path):
    path = config(tmp_path, root, "msd", msd={"students": 2}, train={"updates": 1})
    assert stepdistill("distill", path).code == 0
    before = snapshot(tmp_path / "msd")
    for part in ("student-0/student/unet/config.json", "student/student-1/unet/diffusion_pytorch_model.safetensors"):
        (tmp_path / "msd" / part).unlink()
    shutil.rmtree(tmp_path / "msd" / "student-1" / "student" / "scheduler")
    result = stepdistill("distill", path, "--resume")
    assert result.code == 0, result.err
    assert "finished before" not in result.out
    assert snapshot(tmp_path / "msd") == before


# -- reading only ----------------------------------------------------------------------------------------------


def test_exporting_elsewhere_reads_only_and_works_while_the_run_trains(finished, tmp_path):
    copy = shutil.copytree(finished, tmp_path / "run")
    row = json.loads((copy / "metrics.jsonl").read_text().splitlines()[-1])
    with (copy / "metrics.jsonl").open("a") as file:  # as a run goes on after its last checkpoint
        file.write(json.dumps({**row, "iteration": row["iteration"] + 1}) + "\n")
    with Lock(copy):
        before = tree(copy)
        for name in ("a", "b"):  # a new folder, and over the student before
            assert stepdistill("export", copy, "--output", tmp_path / "a").code == 0, name
        assert tree(copy) == before
        assert stepdistill("report", copy).code == 0
    metrics = (copy / "metrics.jsonl").read_bytes()
    assert stepdistill("export", copy).code == 0
    assert (copy / "metrics.jsonl").read_bytes() == metrics
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() == (finished / "student" / weights).read_bytes()


def test_an_export_takes_the_newer_checkpoint_where_the_older_one_goes_meanwhile(finished, tmp_path, monkeypatch):
    copy = shutil.copytree(finished, tmp_path / "run")
    newest = checkpoint.latest(copy / "checkpoints")
    older = shutil.copytree(newest, copy / "checkpoints" / "step-00000000")
    order = iter([older, newest])
    monkeypatch.setattr(checkpoint, "latest", lambda root: next(order))
    load = checkpoint.load

    def deleted_first(path):
        shutil.rmtree(older, ignore_errors=True)
        return load(path)

    monkeypatch.setattr(checkpoint, "load", deleted_first)
    assert checkpoint.load_latest(copy / "checkpoints")[0] == newest


# -- a disk that is full ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["append", "save_grid"])
def test_what_the_disk_does_not_take_ends_a_run_that_is_saved(root, tmp_path, monkeypatch, what):
    """Rows that are due are in the checkpoint; the run that goes on writes them, and draws the picture."""
    from stepdistill.trainers.loop import recorder as base

    path = config(tmp_path, root, train={"updates": 4, "log_every": 2, "checkpoint_every": 3})
    assert stepdistill("distill", path).code == 0
    whole = snapshot(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    owner = run.RunFolder if what == "append" else base
    work = getattr(owner, what)

    def full(*arguments):
        if what == "append" or arguments[1].name == "000002.png":
            raise UserError(f"{what}: cannot be written (No space left on device); free some space and try again")
        return work(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(owner, what, full)
        result = stepdistill("distill", path)
    assert result.code == 2
    assert result.error.endswith("try again; the run is saved at student update 2, go on with --resume")

    def killed(trainer):
        trainer.recorder.write_rows()
        raise KeyboardInterrupt

    for _ in range(2):  # a row that is in the checkpoint and written already comes but once
        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "fit", killed)
            assert stepdistill("distill", path, "--resume").code == 130
    result = stepdistill("distill", path, "--resume")
    assert result.code == 0, result.err
    assert "resumed at student update 2" in result.out
    assert snapshot(tmp_path / "run") == whole


def test_a_first_picture_that_the_disk_does_not_take_ends_a_run_before_it_trains(root, tmp_path, monkeypatch):
    from stepdistill.trainers.loop import recorder as base

    def full(*_):
        raise UserError("000000.png: cannot be written (Input/output error); choose another place")

    path = config(tmp_path, root)
    with monkeypatch.context() as patch:
        patch.setattr(base, "save_grid", full)
        result = stepdistill("distill", path)
    assert result.error == "stepdistill: 000000.png: cannot be written (Input/output error); choose another place"
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert stepdistill("distill", path, "--resume").code == 0
    assert (tmp_path / "run" / "samples" / "000000.png").is_file()


def test_a_stop_between_two_rows_changes_no_row(root, tmp_path, monkeypatch):
    path = config(tmp_path, root, train={"updates": 6, "log_every": 4, "checkpoint_every": 5})
    assert stepdistill("distill", path).code == 0
    whole = snapshot(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    after = Trainer._after_update

    def stop(trainer, bar, counter):
        after(trainer, bar, counter)
        if trainer.counters["student"] == 3:
            trainer.stopping.reason = ("stopped", 0)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_after_update", stop)
        assert "saved at student update 3" in stepdistill("distill", path).out
    assert stepdistill("distill", path, "--resume").code == 0
    assert snapshot(tmp_path / "run") == whole


# -- what is not ours ------------------------------------------------------------------------------------------


def test_an_export_does_not_write_over_its_teacher_or_another_pipeline(root, tmp_path):
    teacher = stamp(save_pixels(tmp_path / "teacher", "v", labels=4, null=True))  # itself a student of something
    other = save_pixels(tmp_path / "other", "v", labels=4)
    path = config(tmp_path, root, teacher={"path": str(teacher)}, train={"updates": 1})
    assert stepdistill("distill", path).code == 0
    before = tree(teacher) | tree(other)
    assert "written over what it is made from" in stepdistill("export", tmp_path / "run", "--output", teacher).error
    assert "holds no student" in stepdistill("export", tmp_path / "run", "--output", other).error
    assert tree(teacher) | tree(other) == before


def test_an_evaluation_does_not_write_over_other_json_nor_clean_other_folders(finished, root, tmp_path):
    evaluate = ["evaluate", root / "teacher", "--samples", "4", "--extractor", "judges:Means", "--output"]
    file = tmp_path / "notes.json"
    file.write_text('{"years": "of work"}')
    result = stepdistill(*evaluate, file)
    assert result.code == 2
    assert "is no evaluation of stepdistill's" in result.error
    assert file.read_text() == '{"years": "of work"}'
    (tmp_path / "numbers.work").mkdir()
    (tmp_path / "numbers.work" / "thesis.tex").write_text("years")
    from stepdistill.eval.measure.evaluate import delete_batches

    (tmp_path / "numbers.work" / "0123456789abcdef").mkdir()
    delete_batches(tmp_path / "numbers.work")
    assert os.listdir(tmp_path / "numbers.work") == ["thesis.tex"]
    assert "end its name in .png" in stepdistill(*evaluate, tmp_path / "x.json", "--picture", file).error


def test_a_report_and_a_benchmark_do_not_write_over_other_files(finished, tmp_path):
    page, numbers = tmp_path / "index.html", tmp_path / "package.json"
    page.write_text("<html>my site</html>")
    numbers.write_text('{"name": "mine"}')
    result = stepdistill("report", finished, finished.parent / "run", "--output", page)
    assert result.code == 2
    second = shutil.copytree(finished, tmp_path / "second")
    result = stepdistill("report", finished, second, "--output", page)
    assert "is no page of stepdistill's" in result.error
    assert page.read_text() == "<html>my site</html>"
    for _ in range(2):
        assert stepdistill("report", finished, second, "--output", tmp_path / "ours.html").code == 0
    result = stepdistill("benchmark", "inference", finished / "student", "--output", numbers)
    assert "is no benchmark of stepdistill's" in result.error
    assert numbers.read_text() == '{"name": "mine"}'


def test_a_comparison_does_not_begin_in_a_folder_of_something_else(root, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "table.md").write_text("mine")
    config(tmp_path, root, evaluation={"extractor": "judges:Means", "reference": "x"})
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump({"output": str(tmp_path / "out"), "passes": 10, "runs": {"a": "run.yaml"}}))
    result = stepdistill("compare", path)
    assert result.code == 2
    assert "not empty and holds no comparison" in result.error
    assert os.listdir(tmp_path / "out") == ["table.md"]
