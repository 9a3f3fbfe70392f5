"""Checkpoints are whole or absent."""

from __future__ import annotations

import errno
import json

import pytest
import torch
from safetensors import SafetensorError

from stepdistill import checkpoint, files
from stepdistill.errors import UserError

META = {"method": "m", "counters": {"student": 3}}


def tensors(seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(4, 3, generator=generator)
    return {
        "student": {"a.weight": shared, "a.same": shared, "b": torch.randn(2, generator=generator).double()},
        "optimizer-student": {"0.step": torch.tensor(3.0), "0.exp_avg": shared.t()},
        "noise": {"generator": torch.Generator().manual_seed(seed).get_state()},
        "half": {"w": torch.randn(3, generator=generator).bfloat16()},
    }


def names(root) -> list[str]:
    return sorted(p.name for p in root.iterdir())


def test_round_trip_keeps_values_types_and_meta(tmp_path):
    path = checkpoint.save(tmp_path / "deep" / "checkpoints", 12, tensors(), META, keep=2)
    assert path.name == "step-00000012"
    loaded, meta = checkpoint.load(path)
    assert meta == META
    assert loaded.keys() == tensors().keys()
    for group, expected in tensors().items():
        assert loaded[group].keys() == expected.keys()
        for key, value in expected.items():
            assert loaded[group][key].dtype == value.dtype
            assert torch.equal(loaded[group][key], value)


def test_nothing_is_pickled(tmp_path):
    path = checkpoint.save(tmp_path, 1, tensors(), META, keep=1)
    assert names(path) == sorted([*(f"{group}.safetensors" for group in tensors()), "state.json"])
    for file in path.glob("*.safetensors"):
        length = int.from_bytes(file.read_bytes()[:8], "little")
        assert json.loads(file.read_bytes()[8 : 8 + length])  # safetensors' own header, not a pickle


def test_the_newest_are_kept(tmp_path):
    for step in (2, 10, 9, 11):
        checkpoint.save(tmp_path, step, tensors(), META, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-00000011"]
    assert checkpoint.latest(tmp_path).name == "step-00000011"


def test_what_is_not_whole_is_not_seen(tmp_path):
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "gone") is None
    checkpoint.save(tmp_path, 3, tensors(), META, keep=2)
    (tmp_path / ".step-00000009.tmp").mkdir()
    (tmp_path / ".step-00000009.tmp" / "state.json").write_text("{}")
    (tmp_path / "step-00000008").mkdir()  # without state.json: half deleted by an earlier version
    (tmp_path / "step-00000003-copy").mkdir()
    (tmp_path / "step-00000003-copy" / "state.json").write_text("{}")
    assert [p.name for p in checkpoint.folders(tmp_path)] == ["step-00000003"]
    checkpoint.save(tmp_path, 10, tensors(), META, keep=1)
    assert names(tmp_path) == ["step-00000003-copy", "step-00000010"]  # leftovers of a kill are gone


def test_the_same_step_again_keeps_the_whole_one(tmp_path):
    checkpoint.save(tmp_path, 3, tensors(0), META, keep=2)
    checkpoint.save(tmp_path, 3, tensors(0), {**META, "seconds": 5}, keep=2)
    assert checkpoint.load(checkpoint.latest(tmp_path))[1] == META
    assert names(tmp_path) == ["step-00000003"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), SafetensorError("No space left on device")])
@pytest.mark.parametrize("at", [0, 2])
def test_no_space_left_leaves_the_earlier_ones_whole(tmp_path, monkeypatch, error, at):
    first = checkpoint.save(tmp_path, 1, tensors(1), META, keep=1)
    real, calls = checkpoint.save_file, []

    def fails_later(group, file):
        calls.append(file)
        if len(calls) > at:
            file.write_bytes(b"half")
            raise error
        real(group, file)

    monkeypatch.setattr(checkpoint, "save_file", fails_later)
    with pytest.raises(UserError) as caught:
        checkpoint.save(tmp_path, 2, tensors(2), META, keep=1)
    message = str(caught.value)
    assert "step-00000002: cannot be written (" in message
    assert "free some space" in message
    assert f"the last whole checkpoint is {first}" in message
    assert "--resume" in message
    assert names(tmp_path) == ["step-00000001"]
    loaded, _ = checkpoint.load(first)
    assert torch.equal(loaded["student"]["b"], tensors(1)["student"]["b"])


def test_an_old_one_that_a_kill_left_beside_the_newest_goes_when_the_run_ends(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, tensors(), META, keep=2)
    checkpoint.save(tmp_path, 2, tensors(), META, keep=1)
    assert names(tmp_path) == ["step-00000002"]


def test_no_space_left_for_the_very_first(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="free some space and try again; there is no checkpoint yet"):
        checkpoint.save(tmp_path, 2, tensors(), META, keep=1)
    assert names(tmp_path) == []


def test_other_errors_of_the_disk_are_one_line_too(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(UserError, match=r"step-00000002: cannot be written \(broken\)"):
        checkpoint.save(tmp_path, 2, tensors(), META, keep=1)
    assert names(tmp_path) == []


def test_old_ones_go_only_after_the_new_one_is_whole(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 1, tensors(), META, keep=1)
    remove, seen = files.shutil.rmtree, []

    def spying(path, **arguments):
        seen.append((path.name, [p.name for p in checkpoint.folders(tmp_path)]))
        remove(path, **arguments)

    monkeypatch.setattr(files.shutil, "rmtree", spying)
    checkpoint.save(tmp_path, 2, tensors(), META, keep=1)
    ((name, whole),) = seen
    assert name.startswith(".step-00000001.")  # what is being deleted does not have its name any more
    assert whole == ["step-00000002"]


def test_an_old_one_that_cannot_be_deleted_is_a_note_and_tried_again(tmp_path, monkeypatch, capsys):
    checkpoint.save(tmp_path, 1, tensors(), META, keep=1)

    def fail(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", fail)
        checkpoint.save(tmp_path, 2, tensors(), META, keep=1)
    assert "note:" in (printed := capsys.readouterr().out)
    assert "step-00000001: an old checkpoint that cannot be deleted (Input/output error)" in printed
    assert [p.name for p in checkpoint.folders(tmp_path)] == ["step-00000002"]
    checkpoint.save(tmp_path, 3, tensors(), META, keep=1)
    assert names(tmp_path) == ["step-00000003"]


def flip(file) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a changed byte": (lambda p: flip(p / "student.safetensors"), "student.safetensors is damaged"),
    "a file cut short": (
        lambda p: (p / "noise.safetensors").write_bytes((p / "noise.safetensors").read_bytes()[:50]),
        "noise.safetensors is damaged",
    ),
    "a missing file": (lambda p: (p / "noise.safetensors").unlink(), "noise.safetensors is missing"),
    "no state": (lambda p: (p / "state.json").unlink(), "state.json is missing"),
    "state cut short": (lambda p: (p / "state.json").write_text('{"files": {'), "state.json is damaged"),
    "state not text": (lambda p: (p / "state.json").write_bytes(b"\xff\xfe"), "state.json is damaged"),
    "state of another": (lambda p: (p / "state.json").write_text("[1, 2]"), "state.json is damaged"),
    "state without meta": (lambda p: (p / "state.json").write_text('{"files": {}}'), "state.json is damaged"),
    "state of wrong types": (
        lambda p: (p / "state.json").write_text('{"files": [1], "meta": 3}'),
        "state.json is damaged",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_one_line_with_file_and_remedy(tmp_path, damage):
    path = checkpoint.save(tmp_path, 1, tensors(), META, keep=1)
    spoil, says = DAMAGES[damage]
    spoil(path)
    with pytest.raises(UserError) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert "\n" not in message
    assert says in message
    assert f"delete {path} to go on" in message
