"""A folder has one writer at a time."""

from __future__ import annotations

import os
import subprocess
import sys

from stepdistill.locks import Lock


def test_a_folder_has_one_writer(tmp_path):
    again = f"from stepdistill.locks import Lock\nwith Lock({str(tmp_path)!r}): print('in')"
    with Lock(tmp_path):
        done = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, check=False)
        assert f"UserError: {tmp_path}: another process is writing here (process {os.getpid()}" in done.stderr
    done = subprocess.run([sys.executable, "-c", again], capture_output=True, text=True, check=False)
    assert done.stdout == "in\n"


def test_a_lock_is_free_once_its_holder_is_killed(tmp_path):
    hold = (
        f"import os\nfrom stepdistill.locks import Lock\nLock({str(tmp_path)!r}).__enter__()\nos.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", hold], check=False).returncode == -9
    with Lock(tmp_path):
        pass


def test_a_lock_goes_with_its_holder_and_so_does_a_folder_made_for_it(tmp_path):
    with Lock(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert os.listdir(tmp_path) == []
    with Lock(tmp_path / "a" / "b"):
        (tmp_path / "a" / "b" / "work").write_text("")
    assert os.listdir(tmp_path / "a" / "b") == ["work"]


def test_whoever_waits_for_a_lock_gets_it(tmp_path):
    (tmp_path / "seen").write_text("")
    add = (
        "import time\nfrom pathlib import Path\nfrom stepdistill.locks import Lock\n"
        f"seen = Path({str(tmp_path / 'seen')!r})\n"
        f"with Lock({str(tmp_path / 'run')!r}, wait=60):\n"
        "    before = seen.read_text(); time.sleep(0.05); seen.write_text(before + 'x')\n"
    )
    writers = [subprocess.Popen([sys.executable, "-c", add]) for _ in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    assert (tmp_path / "seen").read_text() == "xxxx"
    assert not list(tmp_path.rglob(".lock"))
