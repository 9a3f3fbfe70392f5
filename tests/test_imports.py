"""Imports go one way: no circle of modules, and no room imports one above it; imports inside functions count too."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from test_project import CODE, ROOT, module_name

BELOW = {
    "library": set(),
    "pipelines": {"library"},
    "eval": {"library", "pipelines"},
    "trainers": {"library", "pipelines", "eval"},
    "cli": {"library", "pipelines", "eval", "trainers"},
}
"""What each part of the package may import besides itself."""
FILES = {module_name(path): path for folder in CODE for path in (ROOT / folder).rglob("*.py")}


def imported_modules(path: Path, name: str) -> Iterator[str]:
    """The modules of this package that a file imports anywhere in it."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                yield f"{base}.{alias.name}" if f"{base}.{alias.name}" in FILES else base


GRAPH = {name: {m for m in imported_modules(path, name) if m in FILES and m != name} for name, path in FILES.items()}


def part_of(module: str) -> str:
    second = module.split(".")[1:2]
    return second[0] if second and second[0] in BELOW else "library"


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def test_modules_import_each_other_in_no_circle():
    assert len(GRAPH) > 200
    assert circle(GRAPH) is None
    assert circle({**GRAPH, "stepdistill.errors": {"stepdistill.roles.roles"}}) is not None  # one arrow back is seen


def test_no_part_imports_one_above_it():
    main = "stepdistill.__main__"  # starts the command line
    arrows = {(name, target) for name, targets in GRAPH.items() for target in targets if name != main}
    wrong = [
        f"{name} imports {target}"
        for name, target in sorted(arrows)
        if part_of(target) != part_of(name) and part_of(target) not in BELOW[part_of(name)]
    ]
    assert wrong == []
