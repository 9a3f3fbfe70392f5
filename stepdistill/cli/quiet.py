"""What other libraries print.  They are imported with this module, so commands import it when they are called."""

from __future__ import annotations

import warnings

import diffusers
import transformers


def quiet_libraries() -> None:
    """No bars and notices of other libraries between ours."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
