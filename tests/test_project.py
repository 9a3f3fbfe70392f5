"""What the project says about itself in several files agrees."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import stepdistill

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
CODE = {"stepdistill": "stepdistill", "trainers": "stepdistill.trainers"}
CODE |= {"pipelines": "stepdistill.pipelines", "eval": "stepdistill.eval"}
"""The package that each code folder is."""


def module_name(path: Path) -> str:
    """``stepdistill.eval.show.curves`` for ``eval/show/curves.py``, and a package's name for its ``__init__.py``."""
    first, *parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join([CODE[first], *(part for part in parts if part != "__init__")])


MODULES = {module_name(path) for folder in CODE for path in (ROOT / folder).rglob("*.py")}


def test_every_package_is_installed():
    packages = {module_name(path) for folder in CODE for path in (ROOT / folder).rglob("__init__.py")}
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages


def test_the_package_has_one_version():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "stepdistill.__version__"}
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == stepdistill.__version__
    assert f"## {stepdistill.__version__}" in (ROOT / ".github/CHANGELOG.md").read_text(encoding="utf-8")


def test_the_package_is_marked_as_typed():
    assert (ROOT / "stepdistill/py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["stepdistill"]


def test_pre_commit_and_ci_use_one_ruff():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    (revision,) = [repo["rev"] for repo in hooks["repos"] if repo["repo"].endswith("ruff-pre-commit")]
    assert f"ruff=={revision.removeprefix('v')}" in PROJECT["project"]["optional-dependencies"]["test"]


UNCHECKED = next(
    entry["module"] for entry in PROJECT["tool"]["mypy"]["overrides"] if entry.get("ignore_errors") is not None
)


def test_modules_without_type_check_exist():
    """An entry of a module that was renamed would hide nothing, and look as if it did."""
    assert [module for module in UNCHECKED if module.removesuffix(".*") not in MODULES] == []


def test_ci_reads_the_lowest_torch_from_the_project():
    """The workflow's sed expression, here in Python, finds both."""
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    expression = re.search(r"sed -nE 's/(.+)/\\1==\\2\.\*/p' pyproject.toml", workflow)[1]
    pairs = re.findall(expression, (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.M)
    assert [name for name, _ in pairs] == ["torch", "torchvision"]


def test_contributing_names_files_that_are_there():
    text = (ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")
    places = [place for place in re.findall(r"`([\w./]+/[\w./]*)`", text) if "NAME" not in place]
    assert len(places) > 15
    assert [place for place in places if not (ROOT / place).exists()] == []
