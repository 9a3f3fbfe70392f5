"""YAML as configs need it: mappings with text keys, lists, text, numbers, booleans and null, and nothing else.

The scalars are YAML 1.1's as PyYAML reads them, less what surprises: a date, a time (12:30) and a number with leading
zeros stay text.  Text of any size is read or refused in bounded time: nesting and what aliases
expand to are counted before anything is made of them, and no constructor of YAML's tags is run.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

MOST_NODES = 100_000
"""Values of a document, aliases expanded."""
MOST_DEPTH = 30
MOST_DIGITS = 400

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"yes|Yes|YES|true|True|TRUE|on|On|ON")
_FALSE = re.compile(r"no|No|NO|false|False|FALSE|off|Off|OFF")
_INT = re.compile(r"[-+]?(0|[1-9][0-9_]*)|[-+]?0b[01][01_]*|[-+]?0x[0-9a-fA-F][0-9a-fA-F_]*")
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)([eE][-+][0-9]+)?")
_INFINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_TAG = "tag:yaml.org,2002:"
_MERGE = object()
"""In place of a key: the value that follows is merged in."""


class YamlProblem(ValueError):
    """A text that is not YAML, or YAML that configs do not have; one line that says where."""


def parse(text: str) -> Any:
    """The value of a YAML text, None for an empty one.

    Raises:
        YamlProblem: see :class:`YamlProblem`.
    """
    builder = _Builder()
    try:
        for event in yaml.parse(_text(text), Loader=_LOADER):
            builder.take(event)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise YamlProblem(f"{_line(mark)}{error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise YamlProblem(" ".join(str(error).split())) from None
    return builder.document


def _line(mark: Any) -> str:
    return "" if mark is None else f"line {mark.line + 1}: "


def _text(text: str) -> str:
    """The text itself.

    Raises:
        YamlProblem: it has characters that neither files nor terminals take.
    """
    if "\0" in text or any("\ud800" <= c <= "\udfff" for c in text):
        raise YamlProblem("it holds NUL or half of a surrogate pair, which are no text")
    return text


@dataclass
class _Open:
    """A list or mapping whose end has not come yet, with the size and depth of its content so far."""

    value: Any
    anchor: str | None
    key: Any = None
    merged: list[dict[str, Any]] = field(default_factory=list)
    size: int = 1
    depth: int = 0


class _Builder:
    """Makes a document's value of YAML's events."""

    def __init__(self) -> None:
        self.document: Any = None
        self.documents = 0
        self.stack: list[_Open] = []
        self.anchors: dict[str, tuple[Any, int, int] | None] = {}
        """Value, size and depth by name; None while the value is not complete."""

    def take(self, event: yaml.Event) -> None:
        match event:
            case yaml.DocumentStartEvent():
                self.documents += 1
                if self.documents > 1:
                    self.refuse(event, "a second document starts; one is read")
            case yaml.SequenceStartEvent() | yaml.MappingStartEvent():
                self.open(event)
            case yaml.SequenceEndEvent() | yaml.MappingEndEvent():
                self.close(event)
            case yaml.ScalarEvent():
                self.scalar(event)
            case yaml.AliasEvent():
                self.alias(event)

    @staticmethod
    def refuse(event: yaml.Event, what: str) -> NoReturn:
        raise YamlProblem(f"{_line(event.start_mark)}{what}")

    def open(self, event: yaml.SequenceStartEvent | yaml.MappingStartEvent) -> None:
        mapping = isinstance(event, yaml.MappingStartEvent)
        if event.tag not in (None, "!", f"{_TAG}{'map' if mapping else 'seq'}"):
            self.refuse(event, f"the tag {event.tag} is not read")
        if self._wants_key():
            self.refuse(event, "a list or mapping cannot be a key")
        if len(self.stack) >= MOST_DEPTH:
            self.refuse(event, f"nested more than {MOST_DEPTH} deep")
        if event.anchor is not None:
            self.anchors[event.anchor] = None
        self.stack.append(_Open({} if mapping else [], event.anchor))

    def close(self, event: yaml.Event) -> None:
        done = self.stack.pop()
        if isinstance(done.value, dict):
            for other in done.merged:  # the mapping's keys win, then the first of those merged in
                done.value |= {key: value for key, value in other.items() if key not in done.value}
        self.add(event, done.value, done.anchor, done.size, done.depth + 1)

    def scalar(self, event: yaml.ScalarEvent) -> None:
        if self._wants_key():
            self.key(event)
        else:
            self.add(event, self.value_of(event), event.anchor, 1, 0)

    def alias(self, event: yaml.AliasEvent) -> None:
        if self._wants_key():
            self.refuse(event, "an alias cannot be a key")
        anchor = str(event.anchor)
        if anchor not in self.anchors:
            self.refuse(event, f"the alias *{anchor} has no anchor before it")
        anchored = self.anchors[anchor]
        if anchored is None:
            self.refuse(event, f"the alias *{anchor} stands inside of what it means")
        value, size, depth = anchored
        self.add(event, value, None, size, depth)

    def _wants_key(self) -> bool:
        return bool(self.stack) and isinstance(self.stack[-1].value, dict) and self.stack[-1].key is None

    def key(self, event: yaml.ScalarEvent) -> None:
        mapping = self.stack[-1]
        if event.value == "<<" and event.implicit[0]:
            mapping.key = _MERGE
            return
        key = self.value_of(event)
        if not isinstance(key, str):
            self.refuse(event, f"the key {event.value or 'null'} is read as {key!r}, not as text; put it in quotes")
        if key in mapping.value:
            self.refuse(event, f"the key {key!r} stands twice; remove one")
        mapping.value[key] = None
        mapping.key = key

    def add(self, event: yaml.Event, value: Any, anchor: str | None, size: int, depth: int) -> None:
        """Put a complete value where it belongs."""
        if anchor is not None:
            self.anchors[anchor] = (value, size, depth)
        if not self.stack:
            self.document = value
            return
        parent = self.stack[-1]
        parent.size += size
        parent.depth = max(parent.depth, depth)
        if sum(part.size for part in self.stack) > MOST_NODES:
            self.refuse(event, f"more than {MOST_NODES:,} values, aliases expanded")
        if len(self.stack) + depth > MOST_DEPTH:
            self.refuse(event, f"nested more than {MOST_DEPTH} deep")
        if isinstance(parent.value, list):
            parent.value.append(value)
        elif parent.key is _MERGE:
            parent.merged += self.mappings(event, value)
            parent.key = None
        else:
            parent.value[parent.key] = value
            parent.key = None

    def mappings(self, event: yaml.Event, value: Any) -> list[dict[str, Any]]:
        """What ``<<`` merges in."""
        mappings = value if isinstance(value, list) else [value]
        if not all(isinstance(mapping, dict) for mapping in mappings):
            self.refuse(event, "<< merges a mapping, or a list of mappings")
        return mappings

    def value_of(self, event: yaml.ScalarEvent) -> Any:
        """The scalar's value, by its tag where it has one, by its form where it is not quoted."""
        try:
            text = _text(event.value)
            if event.tag is None and event.implicit[0]:
                return _by_form(text)
            if event.tag in (None, "!", f"{_TAG}str"):
                return text
            return _by_tag(event.tag, text)
        except YamlProblem as problem:
            self.refuse(event, str(problem))


def _by_form(text: str) -> Any:
    if _NULL.fullmatch(text):
        return None
    if _TRUE.fullmatch(text):
        return True
    if _FALSE.fullmatch(text):
        return False
    if _INT.fullmatch(text):
        return _int(text)
    if _FLOAT.fullmatch(text) or _INFINITE.fullmatch(text):
        return _float(text)
    return text


def _by_tag(tag: str, text: str) -> Any:
    kind = tag.removeprefix(_TAG)
    forms = {"null": (_NULL,), "bool": (_TRUE, _FALSE), "int": (_INT,), "float": (_FLOAT, _INFINITE, _INT)}
    if kind not in forms or kind == tag:
        raise YamlProblem(f"the tag {tag} is not read")
    if not any(form.fullmatch(text) for form in forms[kind]):
        raise YamlProblem(f"{text[:40]!r} is no {kind}")
    return _float(text) if kind == "float" else _by_form(text)


def _int(text: str) -> int:
    if len(text) > MOST_DIGITS:
        raise YamlProblem(f"a number of {len(text)} digits")
    return int(text.replace("_", ""), 0)


def _float(text: str) -> float:
    return float(text.replace("_", "").lower().replace(".inf", "inf").replace(".nan", "nan"))
