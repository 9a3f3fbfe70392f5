"""Arguments that several commands share, and their first check."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MOST_SEED = 2**32 - 1
"""More would be another seed again (stepdistill.seeds)."""
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="override the config's keys")]


def check_readable(config: Path, overrides: list[str] | None) -> None:
    """Refuse a config file or overrides that cannot be read, before a command imports what is large.

    Raises:
        UserError: no such file, or not YAML.
    """
    from stepdistill.config import read_config

    read_config(config, overrides)
