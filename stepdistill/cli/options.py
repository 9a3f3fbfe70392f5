"""Arguments that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

MOST_SEED = 2**32 - 1
"""More would be another seed again (stepdistill.seeds)."""
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="override the config's keys")]
