"""Objects that a config names as ``module:attribute``: the user's own networks."""

from __future__ import annotations

import importlib
from typing import Any

from stepdistill.errors import UserError


def import_attribute(spec: str, what: str) -> Any:
    """The object ``attribute`` of ``module``, for ``spec`` = ``module:attribute``; ``what`` names it in errors.

    Raises:
        UserError: the module cannot be imported, or has no such attribute.
    """
    where, _, attribute = spec.partition(":")
    try:
        return getattr(importlib.import_module(where), attribute)
    except (ImportError, ValueError) as error:
        raise UserError(f"{what} {spec!r}: module {where!r} cannot be imported ({error})") from None
    except AttributeError:
        raise UserError(f"{what} {spec!r}: module {where!r} has no {attribute!r}") from None
