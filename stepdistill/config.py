"""Typed, closed configs: YAML in, a checked frozen object out, one clear line when something is wrong.

A file may inherit from another with ``inherits: other.yaml`` (relative to itself), or from several, the later over the
earlier, with a list: the child's keys override the parents', mapping by mapping.  Command-line overrides are
``key.sub=value`` with the value read as YAML.
"""

from __future__ import annotations

import itertools
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Self, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import ErrorDetails

from . import plain_yaml
from .errors import UserError, first_line, reading, show_value
from .plain_files import read_text

INHERITS = "inherits"
MOST_BYTES = 2**20
"""Of a config file."""
MOST_PARENTS = 30
MOST_INT, MOST_FLOAT = 2**53, 1e12
"""Sizes that no number of a config may have: beyond, integers are not exact in JSON and sums overflow."""


class Section(BaseModel):
    """A part of a config: unknown keys are refused, values do not change after the check, numbers are of sane size."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        for name, value in self:
            if (number := _excessive(value)) is not None:
                limit = f"{MOST_INT:,}" if isinstance(number, int) else f"{MOST_FLOAT:g}"
                raise ValueError(f"{name} = {show_value(number)}: at most {limit} is allowed")
        return self


def _excessive(value: Any) -> int | float | None:
    """A number in nested lists and mappings that is too large or not finite, None without one.

    Nested sections check theirs.
    """
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return next((odd for odd in map(_excessive, value) if odd is not None), None)
    if isinstance(value, int):
        return value if abs(value) > MOST_INT else None
    return value if isinstance(value, float) and not abs(value) <= MOST_FLOAT else None


SectionType = TypeVar("SectionType", bound=Section)


def expand_path(path: str) -> str:
    """A path with ``~`` and ``$VAR`` (``${VAR}``) put in, as a shell would; also behind a word and a colon
    (``dinov2:~/weights``).

    Raises:
        ValueError: an empty path, an unknown variable or user, or characters that no file name has.
    """
    if not path.strip():
        raise ValueError("the path is empty; name a file or folder, or remove the key")
    if any(unicodedata.category(c) in ("Cc", "Cs") for c in path):
        raise ValueError("the path has control characters, or others that no file name can have; correct it")
    whole = os.path.expandvars(path)
    if missing := re.search(r"\$(\w+|\{\w+\})", whole):
        raise ValueError(f"{missing[0]} is not set in the environment; set it, or write the path out")
    prefix = match[0] if (match := re.match(r"[\w-]+:(?=~)", whole)) else ""
    place = os.path.expanduser(whole.removeprefix(prefix))
    if re.match(r"~[\w.-]*(/|$)", place):
        raise ValueError(f"{place.split('/')[0]} is no user's home on this machine; write the path out")
    if any(len(os.fsencode(part)) > 255 for part in place.split("/")) or len(os.fsencode(place)) > 4000:
        raise ValueError("a name longer than 255 bytes, or a path longer than 4,000; shorten it")
    return prefix + place


UserPath = Annotated[str, AfterValidator(expand_path)]
"""A file, folder or hub id in a config; ``~`` and ``$VAR`` are put in."""


def user_path(path: str, key: str) -> str:
    """:func:`expand_path`, for a value that is read before its config is checked; ``key`` is its name in errors.

    Raises:
        UserError: as :func:`expand_path` does.
    """
    try:
        return expand_path(path)
    except ValueError as error:
        raise UserError(f"{key} = {path[:200]}: {error}") from None


def output_folder(raw: dict[str, Any], where: str, what: str) -> Path:
    """The folder that a raw config's ``output`` names; ``what`` it is of, for errors.

    Raises:
        UserError: the key is missing, or its value is no path.
    """
    output = raw.get("output")
    if not isinstance(output, str):
        raise UserError(f"{where}: key 'output' is missing: the folder of {what}")
    return Path(user_path(output, f"{where}: output"))


def section_of(raw: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """The mapping at ``key`` of a raw config, {} where the key is missing.

    Raises:
        UserError: it is something else.
    """
    section = raw.get(key)
    if section is not None and not isinstance(section, dict):
        raise UserError(f"{where}: {key} = {show_value(section)}: should be a mapping of keys to values")
    return section or {}


def read_config(path: str | Path, overrides: Iterable[str] | None = None) -> dict[str, Any]:
    """The raw config of a file, with what it inherits and with overrides.

    Raises:
        UserError: as :func:`read_yaml` and :func:`apply_overrides`.
    """
    return apply_overrides(read_yaml(path), list(overrides or []))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """One YAML file over the configs that it inherits from.

    Raises:
        UserError: no such file, not YAML, not a mapping, or configs that inherit from each other in a circle.
    """
    return _read_with_parents(Path(path), (), itertools.count())


def _read_with_parents(path: Path, children: tuple[Path, ...], files_read: Iterator[int]) -> dict[str, Any]:
    """A file and what it inherits; ``children``: the files, in turn, that inherit from it."""
    if next(files_read) > MOST_PARENTS:
        raise UserError(f"{path}: one of more than {MOST_PARENTS} configs to inherit from; merge some")
    try:
        raw = read_mapping(path)
    except FileNotFoundError:
        if children:
            raise UserError(f"{children[-1]}: {INHERITS}: {path} does not exist") from None
        raise UserError(f"{path}: no such config file; configs/ has some to start from") from None
    parents = _parents(raw.pop(INHERITS, None), path)
    resolved = path.resolve()
    if parents and resolved in children:
        raise UserError(f"{path}: its '{INHERITS}' comes back to itself; remove one of these keys")
    inherited: dict[str, Any] = {}
    for parent in parents:
        inherited = merge(inherited, _read_with_parents(parent, (*children, resolved), files_read))
    return merge(inherited, raw)


def _parents(value: Any, path: Path) -> list[Path]:
    """The files that the value of ``inherits`` in the file ``path`` names."""
    names = value if isinstance(value, list) else [] if value is None else [value]
    for name in names:
        if not isinstance(name, str):
            raise UserError(
                f"{path}: {INHERITS} must be the path of another config, or a list of such, not {show_value(name)}"
            )
    return [path.parent / user_path(name, f"{path}: {INHERITS}") for name in names]


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in one YAML file, {} for an empty one; ``inherits`` is a key as any other.

    Raises:
        FileNotFoundError: no such file.
        UserError: not a plain file, not YAML, or another kind of value.
    """
    try:
        text = read_text(path, MOST_BYTES)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({first_line(error)}); name a .yaml file") from None
    with reading(path, "correct the file", "not valid YAML"):
        raw = plain_yaml.parse(text)
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values, not a {type(raw).__name__}")
    return raw


def merge(parent: dict[str, Any], child: dict[str, Any]) -> dict[str, Any]:
    """``child`` over ``parent``, mapping by mapping; other values replace."""
    merged = dict(parent)
    for key, value in child.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def apply_overrides(raw: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """``key.sub=value`` strings over a raw config; the value is read as YAML.

    Raises:
        UserError: not of that form, or a value that is not YAML.
    """
    for override in overrides:
        key, separator, value = override.partition("=")
        *path, last = key.strip().split(".")
        if not separator or not all(part.strip() for part in (*path, last)) or len(path) >= plain_yaml.MOST_DEPTH:
            raise UserError(f"{show_value(override)}: an override is key=value or key.sub=value")
        try:
            nested = {last: plain_yaml.parse(value)}
        except plain_yaml.YamlProblem as problem:
            raise UserError(f"{show_value(override)}: the value is not valid YAML ({problem})") from None
        for part in reversed(path):
            nested = {part: nested}
        raw = merge(raw, nested)
    return raw


def check(model: type[SectionType], raw: dict[str, Any], where: str) -> SectionType:
    """``raw`` as a ``model``, or a UserError that names the key, the value and what is allowed."""
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        problems = [_describe_problem(model, detail) for detail in error.errors(include_url=False)[:3]]
        shortened = [text if len(text) <= 400 else f"{text[:397]}..." for text in problems]
        raise UserError(f"{where}: {'; '.join(shortened)}") from None


def _describe_problem(model: type[BaseModel], error: ErrorDetails) -> str:
    """One error of pydantic in words, with the key and what is allowed."""
    location = [str(part)[:100] for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, location)
        hint = f"; known keys here: {', '.join(known)}" if known else ""
        return f"unknown key {show_value(key)}{hint}"
    if error["type"] == "missing":
        return f"key '{key}' is missing"
    message = error["msg"].removeprefix("Value error, ").removeprefix("Input ").rstrip(".")
    if error["type"] == "value_error":
        return f"{key}: {message}" if key else message
    return f"{f'{key} = ' if key else ''}{show_value(error['input'])}: {message}"


def _known_keys(model: type[BaseModel], location: list[str]) -> list[str]:
    """The keys of the section that ``location`` lies in."""
    for part in location[:-1]:
        field = model.model_fields.get(part)
        if field is None:
            return []
        candidates = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)
        if section is None:
            return []
        model = section
    return sorted(model.model_fields)


def dump_yaml(config: BaseModel | dict[str, Any]) -> str:
    """The whole config, defaults included, as YAML."""
    raw = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True)
