"""Objects of a user's code that a config names as ``module:attribute``."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any

from .errors import UserError, first_line, running


def import_attribute(spec: str, what: str) -> Any:
    """The object ``attribute`` of ``module``, for ``spec`` = ``module:attribute``; ``what`` names it in errors.

    Modules of the current folder can be named too.

    Raises:
        UserError: the module cannot be imported, or has no such attribute.
    """
    where, _, attribute = spec.partition(":")
    if os.getcwd() not in sys.path:  # searched last; the command line starts without it
        sys.path.append(os.getcwd())
    try:
        module = importlib.import_module(where)
    except (Exception, SystemExit) as error:  # whatever the module's code raises
        reason = first_line(error) if isinstance(error, ImportError) else f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"{what} {spec!r}: module {where!r} cannot be imported ({reason})") from None
    if not hasattr(module, attribute):
        raise UserError(f"{what} {spec!r}: module {where!r} has no {attribute!r}")
    return getattr(module, attribute)


def call_factory(factory: Any, spec: str, what: str) -> Any:
    """The result of a class or function that is called without arguments.

    Raises:
        UserError: it fails.
    """
    with running(f"{what} {spec!r}: called without arguments it"):
        return factory()
