"""The reference that a distance is measured from, by what a setting says: a file, or a folder of pictures."""

from __future__ import annotations

import hashlib
from pathlib import Path

from stepdistill import assets
from stepdistill.errors import UserError
from stepdistill.eval.extractors.base import Extractor
from stepdistill.eval.extractors.load import find_reference

from .preprocessing import Preprocessing, read_preprocessed_folder
from .processes import Processes
from .reference_statistics import ReferenceStatistics, make_reference

FEATURES_KEPT = 10_000
"""Features that a reference made of a folder stores, for the kernel distance, and precision and recall."""


def load_reference(
    spec: str | None,
    extractor_spec: str,
    extractor: Extractor,
    preprocessing: Preprocessing,
    folder: Path,
    processes: Processes,
) -> ReferenceStatistics:
    """Statistics from a file (stepdistill's, or an ``.npz`` of moments), or made of a folder's pictures and saved.

    Args:
        spec: None: the file next to the extractor's.
        preprocessing: of a folder's pictures, which then has a side; a file of stepdistill's must have been made with
            the same.
        folder: where statistics of a folder of pictures are saved, as ``reference-HASH.safetensors``.

    Raises:
        UserError: no reference, a file that is none, or one that does not fit extractor or preprocessing.
    """
    path = find_reference(extractor_spec) if spec is None else Path(assets.resolve(spec))
    if path is None:
        raise UserError(
            f"reference is not set, and extractor {extractor_spec!r} ships with none; make one of your real "
            "pictures and name its file"
        )
    if path.is_dir():
        reference = _measure_folder(path, extractor, preprocessing, folder, processes)
    else:
        reference = ReferenceStatistics.load(path)
        if (
            reference.extractor_fingerprint
            and preprocessing.side is not None
            and reference.resize != preprocessing.description
        ):
            raise UserError(
                f"reference {reference.source}: its pictures were made by resize {reference.resize!r}, these by "
                f"{preprocessing.description!r}; make the reference of the folder of pictures again"
            )
    reference.check(extractor)
    return reference


def _measure_folder(
    pictures: Path, extractor: Extractor, preprocessing: Preprocessing, folder: Path, processes: Processes
) -> ReferenceStatistics:
    if preprocessing.side is None:
        raise UserError(f"reference {pictures}: a folder of pictures needs a size to bring them to; set resize=SIDE")
    channels = getattr(extractor.module, "channels", 3)
    images = read_preprocessed_folder(pictures, preprocessing, channels)
    key = f"{images.fingerprint} {extractor.fingerprint} {preprocessing.description} {channels} {FEATURES_KEPT}"
    file = folder / f"reference-{hashlib.sha256(key.encode()).hexdigest()[:12]}.safetensors"
    error = None
    if processes.main and not file.is_file():
        try:
            make_reference(
                images,
                extractor,
                source=pictures.resolve().name,
                kid_features=FEATURES_KEPT,
                batch_size=50,
                resize=preprocessing.description,
                device=processes.device,
            ).save(file)
            print(f"reference {pictures}: statistics are in {file}")
        except UserError as user_error:
            error = user_error
    processes.agree(error)
    return ReferenceStatistics.load(file)
