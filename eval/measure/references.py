"""The reference that a distance is measured from, by what a setting says: a file, or a folder of pictures."""

from __future__ import annotations

import hashlib
from pathlib import Path

from stepdistill import assets
from stepdistill.errors import UserError
from stepdistill.eval.extractors.base import Extractor, reference_beside

from .frechet import ReferenceStatistics, make_reference
from .preprocessing import Treatment, treated_folder
from .processes import Processes

FEATURES_KEPT = 10_000
"""Features that a reference made of a folder keeps, for the kernel distance, and precision and recall."""


def load_reference(
    spec: str | None,
    extractor_spec: str,
    extractor: Extractor,
    treatment: Treatment,
    beside: Path,
    processes: Processes,
) -> ReferenceStatistics:
    """Statistics from a file (ours, or an ``.npz`` of moments), or made of a folder's pictures and kept.

    Args:
        spec: None: beside the extractor's file.
        treatment: of a folder's pictures, which then has a side; a file of ours must have been made with the same.
        beside: the folder where statistics of a folder are kept, as ``reference-HASH.safetensors``.

    Raises:
        UserError: no reference, a file that is none, or one that does not fit extractor or treatment.
    """
    path = reference_beside(extractor_spec) if spec is None else Path(assets.resolve(spec))
    if path is None:
        raise UserError(
            f"reference is not set, and extractor {extractor_spec!r} ships with none; make one of your real "
            "pictures and name its file"
        )
    if path.is_dir():
        reference = _of_folder(path, extractor, treatment, beside, processes)
    else:
        reference = ReferenceStatistics.load(path)
        if reference.extractor_fingerprint and treatment.side is not None and reference.resize != treated(treatment):
            raise UserError(
                f"reference {reference.source}: its pictures were made by resize {reference.resize!r}, these by "
                f"{treated(treatment)!r}; make the reference of the folder of pictures again"
            )
    reference.check(extractor)
    return reference


def treated(treatment: Treatment) -> str:
    """A treatment as a reference's ``resize`` says it."""
    files = ", as a viewer shows them" if treatment.files == "shown" else ""
    return f"crop {treatment.crop}, {treatment.resize}{files}"


def _of_folder(
    folder: Path, extractor: Extractor, treatment: Treatment, beside: Path, processes: Processes
) -> ReferenceStatistics:
    if treatment.side is None:
        raise UserError(f"reference {folder}: a folder of pictures needs a size to bring them to; set resize=SIDE")
    channels = getattr(extractor.module, "channels", 3)
    images = treated_folder(folder, treatment, channels)
    made = f"{images.fingerprint} {extractor.fingerprint} {treated(treatment)} {channels} {FEATURES_KEPT}"
    file = beside / f"reference-{hashlib.sha256(made.encode()).hexdigest()[:12]}.safetensors"
    error = None
    if processes.main and not file.is_file():
        try:
            make_reference(
                images,
                extractor,
                source=folder.resolve().name,
                kid_features=FEATURES_KEPT,
                batch_size=50,
                resize=treated(treatment),
                device=processes.device,
            ).save(file)
            print(f"reference {folder}: statistics kept in {file}")
        except UserError as wrong:
            error = wrong
    processes.agree(error)
    return ReferenceStatistics.load(file)
