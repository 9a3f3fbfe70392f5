"""A kill before every file operation, and every error of the disk, lose nothing, leave nothing, and say one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCENARIOS = ("run", "export", "move", "recipe", "msd")
ERRORS = ("EIO", "ENOSPC", "EACCES", "EROFS", "EDQUOT")


def assert_nothing_wrong(folder: Path, request: list[dict]) -> None:
    """Make what :mod:`killing` is asked for; its counts are printed."""
    file = folder / "request.json"
    file.write_text(json.dumps(request))
    command = [sys.executable, str(Path(__file__).with_name("killing.py")), str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout)
    assert len(results) == len(request)
    for result in results:
        states = f", {result['states']} different states" if "states" in result else ""
        print(
            f"{result['scenario']:7s} {result['kind']:12s} {result['points']} of {result['operations']} points{states}"
        )
        assert result["points"] >= min(1, result["operations"])
        assert not result["wrong"], result


@pytest.mark.slow
def test_some_kills_and_errors(tmp_path):
    kinds = ("kill", "once-EIO", "ENOSPC")
    request = [{"scenario": name, "kind": kind, "count": 3} for name in ("run", "export") for kind in kinds]
    assert_nothing_wrong(tmp_path, request)


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_kill(tmp_path, scenario):
    assert_nothing_wrong(tmp_path, [{"scenario": scenario, "kind": "kills"}])


@pytest.mark.slow
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_errors_of_the_disk(tmp_path, scenario):
    kinds = [*(f"once-{name}" for name in ERRORS), *ERRORS]
    request = [{"scenario": scenario, "kind": kind, "count": 3} for kind in kinds]
    request.append({"scenario": scenario, "kind": "limit", "limits": [0, 100, 1000, 5000, 50_000]})
    assert_nothing_wrong(tmp_path, request)
