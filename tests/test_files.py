"""Files and folders are whole or absent, whatever happens."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from stepdistill import files
from stepdistill.errors import UserError, first_line, reading

KILLED = """
import os, sys
from pathlib import Path
from stepdistill import files
kind, path, at = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
if kind == "fallback":
    files._exchange = lambda a, b: False
left = at
def die(event, arguments):
    global left
    if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.scandir") and armed:
        left -= 1
        if left < 0:
            os._exit(9)
armed = False
sys.addaudithook(die)
armed = True
with files.replacing_folder(path) as temporary:
    (temporary / "a").write_text("new")
    (temporary / "b").mkdir()
    (temporary / "b" / "c").write_text("new")
armed = False
"""


def contents(folder: Path) -> set[str]:
    return {p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("kind", ["exchange", "fallback"])
def test_a_folder_is_the_old_or_the_new_one_wherever_its_writer_is_killed(tmp_path, kind):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    seen = set()
    for at in range(200):
        root = tmp_path / str(at)
        folder = root / "student"
        (folder / "b").mkdir(parents=True)
        for name in ("a", "b/c", "old"):
            (folder / name).write_text("old")
        code = subprocess.run([sys.executable, str(script), kind, str(folder), str(at)], check=False).returncode
        files.recover(folder)
        files.remove_leftovers(folder)
        assert contents(folder) in ({"old"}, {"new"})
        assert len(list(folder.rglob("*"))) == (4 if contents(folder) == {"old"} else 3)
        seen |= contents(folder)
        with files.replacing_folder(folder) as temporary:  # and nothing is in the way of the next writer
            (temporary / "a").write_text("next")
        assert contents(folder) == {"next"}
        assert os.listdir(root) == ["student"]
        if code == 0:
            break
    assert code == 0
    assert at > 8
    assert seen == {"old", "new"}


def test_a_file_is_replaced_whole_with_the_usual_rights(tmp_path):
    path = tmp_path / "deep" / "file"
    files.write_text(path, "first")
    with pytest.raises(ZeroDivisionError), files.replacing(path) as temporary:
        temporary.write_text(f"half {1 / 0}")
    assert path.read_text() == "first"
    assert os.listdir(path.parent) == ["file"]
    previous = os.umask(0o027)
    try:
        with files.replacing(path) as temporary:
            temporary.touch(0o600)
    finally:
        os.umask(previous)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_a_temporary_name_is_not_followed_as_a_link(tmp_path):
    target = tmp_path / "elsewhere"
    target.write_text("theirs")
    (tmp_path / ".file.tmp").symlink_to(target)
    files.write_text(tmp_path / "file", "ours")
    assert target.read_text() == "theirs"


def test_what_is_no_number_in_json_is_null(tmp_path):
    files.write_json(tmp_path / "a.json", {"x": float("nan"), "y": [1.5, float("-inf")]})
    assert '"x": null' in (tmp_path / "a.json").read_text()
    assert "Infinity" not in (tmp_path / "a.json").read_text()


def test_leftovers_are_those_of_writers_that_are_gone(tmp_path):
    host, pid = files._host(), os.getpid()
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    old = tmp_path / f".a.elsewhere-{pid}-00000000.tmp"
    for name in (
        f".a.{host}-{gone.pid}-00000000.tmp",
        f".a.{host}-{pid}-00000000.tmp",  # of an earlier process with this number
        f".a.{host}-{os.getppid()}-00000000.tmp",
        ".a.elsewhere-1-00000000.tmp",
        old.name,
        ".mine.tmp",
        "a.tmp",
    ):
        (tmp_path / name).write_text("")
    os.utime(old, (0, 0))
    with files.replacing(tmp_path / "a") as temporary:
        temporary.write_text("new")
        files.tidy(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [f".a.{host}-{os.getppid()}-00000000.tmp", ".a.elsewhere-1-00000000.tmp", ".mine.tmp", "a", "a.tmp"]
    )


def test_the_old_folder_is_back_where_the_new_one_cannot_take_its_place(tmp_path, monkeypatch):
    folder = tmp_path / "student"
    folder.mkdir()
    (folder / "a").write_text("old")
    rename = Path.rename

    def fail(path, target):
        if path.name.endswith(".tmp"):
            raise OSError(5, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(UserError, match="cannot be written"), files.replacing_folder(folder) as temporary:
        (temporary / "a").write_text("new")
    assert contents(folder) == {"old"}
    assert os.listdir(tmp_path) == ["student"]


def test_a_rust_library_s_word_on_the_disk_is_one_line(tmp_path):
    with pytest.raises(UserError, match="free some space"), files.replacing(tmp_path / "tokenizer.json"):
        raise Exception("No space left on device (os error 28)")
    with pytest.raises(ValueError, match="a mistake"), files.replacing(tmp_path / "tokenizer.json"):
        raise ValueError("a mistake")


def test_a_removed_folder_is_never_half_there(tmp_path, monkeypatch):
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / "a").write_text("")

    def fail(path, ignore_errors=False):
        if not ignore_errors:
            raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(files.shutil, "rmtree", fail)
        assert files.remove_folder(folder) == "Permission denied"
    assert not folder.exists()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (OSError(30, "Read-only file system", "/x"), "Read-only file system"),
        (ValueError("\n  one\ntwo"), "one"),
        (ValueError(""), "ValueError"),
        (KeyError("mean"), "mean is missing"),
        (ValueError("x" * 500), "x" * 197 + "..."),
    ],
)
def test_the_first_line_of_an_error(error, line):
    assert first_line(error) == line


@pytest.mark.parametrize("error", [KeyError("a"), RecursionError("deep"), MemoryError(), TypeError("not a mapping")])
def test_whatever_reading_raises_is_one_line(error):
    line = r"^file.json: cannot be read \(.+\); write it again$"
    with pytest.raises(UserError, match=line), reading("file.json", "write it again"):
        raise error


@pytest.mark.parametrize("code", [28, 13, 30, 5, 122, 27])
def test_whatever_writing_raises_is_one_line(tmp_path, code):
    with pytest.raises(UserError, match="file: cannot be written") as caught, files.replacing(tmp_path / "file"):
        raise OSError(code, os.strerror(code))
    assert ("free some space" in str(caught.value)) == (code in (28, 122, 27))
    assert os.listdir(tmp_path) == []
