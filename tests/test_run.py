"""The run folder: whose it is, what may change, which rows stay."""

from __future__ import annotations

import errno
import io
import json

import pytest
import yaml
from toys import toy_config

from stepdistill.errors import UserError
from stepdistill.run import RunFolder
from stepdistill.trainers.plans.job import make_job


def config_for(path, **changes):
    return make_job(toy_config(output=str(path), **changes)).config


@pytest.fixture
def run(tmp_path):
    """A folder that holds a run of the toy config."""
    run = RunFolder(tmp_path / "run")
    run.create(config_for(run.path), 4)
    return run


def refused(run: RunFolder, config, resume: bool) -> str:
    with pytest.raises(UserError) as caught:
        run.check(config, resume)
    assert "\n" not in str(caught.value)
    assert str(run.path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("resume", [False, True])
def test_a_new_folder_and_an_empty_one_are_free(tmp_path, resume):
    run = RunFolder(tmp_path / "new")
    assert run.check(config_for(run.path), resume) is False
    assert not run.path.exists()
    run.path.mkdir()
    assert run.check(config_for(run.path), resume) is False
    (run.path / "cache").mkdir()  # a run killed while it cached latents
    assert run.check(config_for(run.path), resume) is False
    (run.path / ".lock").write_text("process 1 on a since then\n")  # of one killed before it wrote its config
    (run.path / ".config.yaml.host-1-0123abcd.tmp").write_text("seed: ")
    (run.path / "samples").mkdir()  # earlier versions made it before the config
    assert run.check(config_for(run.path), resume) is False
    (run.path / "samples" / "mine.png").write_text("")
    assert "not empty and holds no run" in refused(run, config_for(run.path), resume)


def test_prompts_of_its_pictures_may_change_and_may_not_be_there(run):
    saved = yaml.safe_load((run.path / "config.yaml").read_text())
    assert run.check(config_for(run.path, data={"shown": ["a cat"]}), True)
    del saved["data"]["shown"]  # as it was written before there were any
    (run.path / "config.yaml").write_text(yaml.safe_dump(saved))
    assert run.check(config_for(run.path), True)
    assert "data.labels" in refused(run, config_for(run.path, data={"labels": [1]}), True)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_something_else_is_refused(tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("years of work")
    run = RunFolder(tmp_path)
    assert "not empty and holds no run" in refused(run, config_for(tmp_path), resume)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_refused(tmp_path):
    run = RunFolder(tmp_path / "file")
    run.path.write_text("")
    assert "that is a file" in refused(run, config_for(run.path), False)


def test_a_run_needs_resume(run):
    message = refused(run, config_for(run.path), False)
    assert "holds a run" in message
    assert "--resume" in message
    assert run.check(config_for(run.path), True) is True


def test_what_is_recorded(run):
    saved = yaml.safe_load((run.path / "config.yaml").read_text())
    assert saved == config_for(run.path).model_dump(mode="json")
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["seed"] == 4
    assert {"torch", "diffusers", "stepdistill", "python"} <= environment["versions"].keys()
    assert {"git", "command", "started"} <= environment.keys()
    assert not list(run.path.glob(".*"))


FREE = {
    "more updates": {"train": {"updates": 999}},
    "a time limit": {"train": {"max_minutes": 5}},
    "logging": {"train": {"log_every": 3, "sample_every": 3, "checkpoint_every": 3, "keep_checkpoints": 5}},
    "evaluation": {"evaluation": {"samples": 77}},
}


@pytest.mark.parametrize("name", FREE)
def test_what_does_not_change_the_training_may_change(run, name):
    config = config_for(run.path, **FREE[name])
    assert run.check(config, True) is True
    run.write_config(config)
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == config.model_dump(mode="json")


DIFFERENT = {
    "train.batch_size (8 there, 16 now)": {"train": {"batch_size": 16}},
    "optimizer.student.lr (0.001 there, 0.5 now)": {"optimizer": {"student": {"lr": 0.5}}},
    "seed (0 there, 1 now)": {"seed": 1},
    "teacher.path ('unused' there, 'other' now)": {"teacher": {"path": "other"}},
    "dmd2.guidance_scale (1.0 there, 2.0 now)": {"dmd2": {"guidance_scale": 2.0}},
    "data.labels ('all' there, [1] now)": {"data": {"labels": [1]}},
}


@pytest.mark.parametrize("says", DIFFERENT)
def test_what_changes_the_training_is_named_with_both_values(run, says):
    message = refused(run, config_for(run.path, **DIFFERENT[says]), True)
    assert f"its config differs: {says}" in message


def test_another_method_is_named(run, monkeypatch):
    from stepdistill.trainers.methods.dmd2 import DMD2
    from stepdistill.trainers.methods.registry import METHODS

    class Other(DMD2):
        name = "other"

    monkeypatch.setitem(METHODS, "other", Other)
    assert "method ('dmd2' there, 'other' now)" in refused(run, config_for(run.path, method="other"), True)


@pytest.mark.parametrize("content", [b"", b"[1]", b"a: [", b"\xff\xfe", b"train: 3"])
def test_a_damaged_config_is_refused(run, content):
    (run.path / "config.yaml").write_bytes(content)
    assert "damaged" in refused(run, config_for(run.path), True)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    run = RunFolder(tmp_path / "file" / "run")
    with pytest.raises(UserError, match=r"file/run: cannot be written"):
        run.create(config_for(run.path), 0)


def rows(run: RunFolder) -> list[int]:
    return [json.loads(line)["iteration"] for line in run.metrics.read_text().splitlines()]


@pytest.mark.parametrize("cut", ["", '{"itera', '{"iteration": 4, "loss": 0.', '{"loss": 1}'])
def test_rows_after_the_checkpoint_and_a_last_line_cut_short_are_dropped(run, cut):
    for iteration in (1, 2, 3, 4):
        run.append({"iteration": iteration, "loss": 1 / 3})
    before = run.metrics.read_text().splitlines()
    with run.metrics.open("a") as file:
        file.write(cut)
    run.drop_metrics_after(3)
    assert run.metrics.read_text().splitlines() == before[:3]
    run.append({"iteration": 4})
    assert rows(run) == [1, 2, 3, 4]


DAMAGES = {
    "text": b"half a r",
    "bytes": b"\xff\xfe",
    "a row without its iteration": b'{"loss": 1}',
    "no object": b"[3]",
    "an iteration that is no number": b'{"iteration": "2"}',
    "nothing": b"",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("where", [0, 2, 4])
@pytest.mark.parametrize("damage", DAMAGES)
def test_good_rows_behind_a_damaged_line_stay(run, damage, where):
    for iteration in (1, 2, 3, 4):
        run.append({"iteration": iteration, "loss": 1 / 3})
    good = run.metrics.read_bytes().splitlines(keepends=True)
    before = b"".join([*good[:where], DAMAGES[damage] + b"\n", *good[where:]])
    run.metrics.write_bytes(before)
    note = run.drop_metrics_after(3)
    assert run.metrics.read_bytes() == b"".join(good[:3])
    assert note == f"{run.metrics}: 1 damaged lines are left out; the file as it was is metrics.jsonl.damaged"
    assert (run.path / "metrics.jsonl.damaged").read_bytes() == before
    assert run.drop_metrics_after(3) is None
    run.metrics.write_bytes(before)
    run.drop_metrics_after(3)
    assert (run.path / "metrics.jsonl.damaged-2").read_bytes() == before


def test_a_last_row_without_its_end_of_line_is_a_row(run):
    run.append({"iteration": 1})
    run.metrics.write_bytes(run.metrics.read_bytes().rstrip())
    assert run.drop_metrics_after(1) is None
    run.append({"iteration": 2})
    assert rows(run) == [1, 2]


def test_what_is_no_number_is_null_in_a_row(run):
    run.append({"iteration": 1, "loss": float("nan"), "grad_norm": float("-inf")})
    assert run.metrics.read_text() == '{"iteration": 1, "loss": null, "grad_norm": null}\n'


def test_a_row_that_the_disk_does_not_take_leaves_no_half_of_it(run, monkeypatch):
    run.append({"iteration": 1})
    before = run.metrics.read_bytes()
    write = io.FileIO.write

    class Full(io.FileIO):
        def write(self, data):
            if len(data) < 20:
                raise OSError(errno.ENOSPC, "No space left on device")
            return write(self, data[:10])

    with monkeypatch.context() as patch:
        patch.setattr(type(run.metrics), "open", lambda path, mode, buffering: Full(path, mode))
        with pytest.raises(UserError, match=r"metrics.jsonl: cannot be written \(No space left on device\)"):
            run.append({"iteration": 2, "loss": 1.0})
    assert run.metrics.read_bytes() == before
    run.append({"iteration": 2})
    assert rows(run) == [1, 2]


def test_without_a_checkpoint_all_rows_go_and_no_file_is_no_trouble(run):
    run.drop_metrics_after(5)
    assert not run.metrics.exists()
    run.append({"iteration": 0})
    run.drop_metrics_after(-1)
    assert run.metrics.read_text() == ""
