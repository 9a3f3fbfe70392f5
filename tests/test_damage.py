"""Damaged files, mutated configs and odd values: no traceback, no hang, no changed weights taken in silence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_some_of_each(tmp_path):
    """A part of ``python tests/damage.py``, which tries 600 files and 500 configs; its counts are printed."""
    command = [sys.executable, str(Path(__file__).with_name("damage.py")), "--world", str(tmp_path / "world")]
    sizes = ["--seed", "1", "--files", "150", "--configs", "100", "--workers", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    (tmp_path / "world").mkdir()
    done = subprocess.run([*command, *sizes], env=environment, capture_output=True, text=True, check=False)
    print(done.stdout[-1000:])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
