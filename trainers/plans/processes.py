"""This process among others: the end of a process group, a command in a new process."""

from __future__ import annotations

import signal
import subprocess
import sys

import torch.distributed as dist


def end_processes() -> None:
    """Leave the process group of a training with several processes, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


class CommandFailed(Exception):
    """A command in a new process ended with an exit code other than 0.  It has printed why."""

    def __init__(self, exit_code: int):
        super().__init__(f"exit code {exit_code}")
        self.exit_code = exit_code


def run_command(*arguments: str) -> None:
    """``stepdistill ARGUMENTS`` in a new process.  A Ctrl-C, or a SIGTERM passed on, stops that one, which saves.

    Raises:
        CommandFailed: it ended with another exit code than 0.
    """
    child = subprocess.Popen([sys.executable, "-P", "-m", "stepdistill", *arguments])
    previous = {
        signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None),  # the terminal sends it to the child too
        signal.SIGTERM: signal.signal(signal.SIGTERM, lambda *_: child.terminate()),
    }
    try:
        code = child.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if code:
        raise CommandFailed(code)
