"""The shipped files: two small real teachers, their feature networks, reference statistics and real images.

``asset:fashion_mnist/teacher`` in a config names the file or folder of that path next to this module.  Each of the two
has a record of its files' digests (:mod:`stepdistill.digests`), which are compared when one of them is named.
"""

import functools
from pathlib import Path

from stepdistill.digests import RECORD, check_folder, read_record
from stepdistill.errors import UserError

ROOT = Path(__file__).parent
PREFIX = "asset:"
RECORDED = (".safetensors", ".npz")
"""Suffixes of the files that a record is of."""


def resolve(path: str) -> str:
    """``asset:NAME`` to its path; any other path as it is.

    Raises:
        UserError: no such asset, or one of its files is not the one that was shipped.
    """
    if not path.startswith(PREFIX):
        return path
    name = path.removeprefix(PREFIX)
    place = ROOT / name
    if ".." in Path(name).parts or Path(name).is_absolute() or not place.exists():
        shipped = sorted(
            f"{PREFIX}{p.relative_to(ROOT)}"
            for p in ROOT.glob("*/*")
            if p.suffix not in (".md", ".py") and p.name != RECORD
        )
        raise UserError(f"{path}: no such asset; shipped are {', '.join(shipped)}")
    _check(ROOT, name)
    return str(place)


@functools.lru_cache
def _check(root: Path, name: str) -> None:
    """Compare the files that ``name`` is or holds with the record of its collection, once for each process."""
    collection, _, rest = name.strip("/").partition("/")
    folder, place = root / collection, root / name
    listed = read_record(folder) or {}
    names = [file for file in listed if not rest or (folder / file) == place or (folder / file).is_relative_to(place)]
    check_folder(folder, f"{PREFIX}{collection}", names, "not the file that was shipped; install stepdistill again")
