"""The command line: ``stepdistill COMMAND``.  The one room of the library that knows the rooms above it.

Every command imports what it needs when it is called, so that help and wrong usage are answered at once.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import typer

from stepdistill.errors import UserError, first_line, is_full, printable

from . import benchmarks, distill, evaluate, pipelines, teachers

app = typer.Typer(
    help="Distil a diffusion teacher into a student that needs one step.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for commands in (distill, evaluate, pipelines):
    app.registered_commands += commands.app.registered_commands
app.add_typer(teachers.app, name="teacher")
app.add_typer(benchmarks.app, name="benchmark")


def main() -> None:
    """Run the command line; a user's mistake is one line and exit code 2."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # read when torch loads OpenMP, so before it; threads that wait actively take the cores of a busy machine
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if hasattr(sys.stdout, "reconfigure"):  # a terminal that lacks a character shows its escape
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        code = app(standalone_mode=False)
    except UserError as error:
        _fail(str(error))
    except (typer.Abort, KeyboardInterrupt):
        sys.exit(130)
    except OSError as error:
        if error.errno is None:
            raise
        remedy = "free some space and try again" if is_full(error) else "see to it and try again"
        _fail(f"{error.filename or 'a file'}: {first_line(error)}; {remedy}")
    except MemoryError as error:
        _fail(f"not enough memory ({first_line(error)}); use smaller files or sizes, or a larger machine")
    except Exception as error:
        usage: Any = error  # click's usage errors, which typer does not name
        if type(error).__name__ == "NoArgsIsHelpError":  # without a command
            print(usage.format_message(), file=sys.stderr)
            sys.exit(usage.exit_code)
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            _fail(usage.format_message(), usage.exit_code)
        raise
    if isinstance(code, int):  # what a command gave typer.Exit comes back as a value
        sys.exit(code)


def _fail(message: str, code: int = 2) -> None:
    for bar in list(getattr(getattr(sys.modules.get("tqdm"), "tqdm", None), "_instances", ())):
        bar.close()  # which ends its line
    if os.environ.get("RANK", "0") == "0":
        print(f"stepdistill: {printable(message)}", file=sys.stderr)
    _leave_processes()
    sys.exit(code)


def _leave_processes() -> None:
    """Leave the process group, if this process is in one: at exit its threads would abort where another process of it
    has ended before."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


if __name__ == "__main__":
    main()
