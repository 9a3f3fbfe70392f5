"""stepdistill: distil a diffusion teacher into a student that needs one step.

The library every method stands on.  Methods live in ``stepdistill.trainers``, exports in
``stepdistill.pipelines``, measurements in ``stepdistill.eval``.
"""

__version__ = "0.1.0"
