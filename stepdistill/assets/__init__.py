"""What is shipped: two small real teachers, their feature networks, reference statistics and real images.

``asset:fashion_mnist/teacher`` in a config names the file or folder of that path beside this module.
"""

from pathlib import Path

from stepdistill.errors import UserError

ROOT = Path(__file__).parent
PREFIX = "asset:"


def resolve(path: str) -> str:
    """``asset:NAME`` to its path; any other path as it is."""
    if not path.startswith(PREFIX):
        return path
    found = ROOT / path.removeprefix(PREFIX)
    if not found.exists():
        shipped = sorted(f"{PREFIX}{p.relative_to(ROOT)}" for p in ROOT.glob("*/*") if p.suffix not in (".md", ".py"))
        raise UserError(f"{path}: no such asset; shipped are {', '.join(shipped)}")
    return str(found)
