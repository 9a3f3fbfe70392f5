"""The command line in this process: its exit code and what it printed."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import dataclass
from unittest import mock

from stepdistill.cli.main import main


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that says what is wrong; bars of what ran before it do not count."""
        lines = [line for line in self.err.replace("\r", "\n").splitlines() if line.strip()]
        lines = [line for line in lines if "update/s" not in line and "img/s" not in line]
        assert len(lines) == 1, self.err
        assert lines[0].startswith("stepdistill: "), self.err
        assert "Traceback" not in self.out
        return lines[0]


def stepdistill(*arguments) -> Result:
    """``stepdistill ARGUMENTS...``"""
    out, err = io.StringIO(), io.StringIO()
    argv = ["stepdistill", *(str(a) for a in arguments)]
    with mock.patch.object(sys, "argv", argv), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    return Result(code, out.getvalue(), err.getvalue())
