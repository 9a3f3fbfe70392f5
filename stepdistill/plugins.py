"""Objects that a config names as ``module:attribute``: the user's own networks."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from stepdistill.errors import UserError


def import_attribute(spec: str, what: str) -> Any:
    """The object ``attribute`` of ``module``, for ``spec`` = ``module:attribute``; ``what`` names it in errors.

    Modules of the current folder are found too.

    Raises:
        UserError: the module cannot be imported, or has no such attribute.
    """
    where, _, attribute = spec.partition(":")
    if os.getcwd() not in sys.path:  # the last place to look, and a process of ours does not start with it
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(where), attribute)
    except (ImportError, ValueError) as error:
        raise UserError(f"{what} {spec!r}: module {where!r} cannot be imported ({error})") from None
    except AttributeError:
        raise UserError(f"{what} {spec!r}: module {where!r} has no {attribute!r}") from None
