"""Pipeline folders on the disk: whether one is whole, and whether it may be written over."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from stepdistill import assets, files
from stepdistill.digests import RECORD
from stepdistill.errors import UserError, reading, show_value

INDEX = "model_index.json"
MANIFEST = "msd.json"
"""The file that marks a folder of several students."""
STAMP = "_stepdistill"
"""The key of stepdistill's entry in a config."""
CONFIGS = {
    "Scheduler": "scheduler_config.json",
    "Tokenizer": "tokenizer_config.json",
    "TokenizerFast": "tokenizer_config.json",
    "Processor": "preprocessor_config.json",
    "FeatureExtractor": "preprocessor_config.json",
}
"""By the end of a component's class; every other component is a network with ``config.json`` and weights."""
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model", "tokenizer.model")
"""One of these is next to a tokenizer's config."""


def hub_folder(path: str, revision: str | None = None) -> str:
    """The folder of a hub id that is in this machine's hub cache, as training leaves its teacher there; ``path`` itself
    where it is no such id.  Nothing is downloaded."""
    if Path(path).exists() or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", path):
        return path
    try:
        return snapshot_download(path, revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return path


def is_whole(folder: str | Path) -> bool:
    """Whether a folder holds a pipeline, or several students, with every part that it names.

    What a killed process had moved aside is brought back first.
    """
    folder = Path(folder)
    files.recover(folder)
    return find_missing(folder) is None


def find_missing(folder: Path) -> str | None:
    """The first file that a pipeline's folder, or that of several students, lacks; None where it is whole.

    A weight file that is cut short counts as missing.
    """
    if (folder / MANIFEST).is_file():
        return _missing_of_several(folder)
    index = _mapping(folder / INDEX)
    if index is None:
        return INDEX
    for name, value in index.items():
        if isinstance(value, list) and len(value) == 2 and all(isinstance(part, str) for part in value):
            part = _missing_of_component(folder / name, value[1])
            if part is not None:
                return f"{name}/{part}"
    return None


def _missing_of_several(folder: Path) -> str | None:
    students = (_mapping(folder / MANIFEST) or {}).get("students")
    if not isinstance(students, int):
        return MANIFEST
    if not (folder / "router.json").is_file():
        return "router.json"
    for k in range(students):
        part = find_missing(folder / f"student-{k}")
        if part is not None:
            return f"student-{k}/{part}"
    return None


def _missing_of_component(folder: Path, kind: str) -> str | None:
    config = next((file for end, file in CONFIGS.items() if kind.endswith(end)), None)
    if config is not None:
        if "Tokenizer" in kind and not any((folder / name).is_file() for name in VOCABULARIES):
            return "its vocabulary"
        return None if (folder / config).is_file() else config
    if not (folder / "config.json").is_file():
        return "config.json"
    weights = [*folder.glob("*.safetensors"), *folder.glob("*.bin")]
    for index in folder.glob("*.index.json"):
        shards = (_mapping(index) or {}).get("weight_map")
        if not isinstance(shards, dict):
            return index.name
        weights += [folder / shard for shard in sorted(set(map(str, shards.values())))]
    if not weights:
        return "its weights"
    return next((file.name for file in weights if not _is_whole_file(file)), None)


def _is_whole_file(file: Path) -> bool:
    if file.suffix != ".safetensors":
        return file.is_file()
    try:
        with safe_open(file, "pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _mapping(file: Path) -> dict[str, Any] | None:
    """A JSON object, None where there is no readable one."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


# -- stepdistill's entry in a config -----------------------------------------------------------------------------------


def check_stamp(config: Mapping[str, Any], what: str) -> None:
    """Refuse a config whose entry is not as stepdistill writes it.

    Raises:
        UserError: a part of it is of another type.
    """
    stamp = config.get(STAMP)
    if stamp is None:
        return
    with reading(what, "export it again, or remove the entry", f"the entry {STAMP} is damaged"):
        for key, check in STAMPED.items():
            value = stamp.get(key)
            if value is not None and not check(value):
                raise ValueError(f"{key} = {show_value(value)}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= 10_000


def _is_call(value: Any) -> bool:
    """Whether it can be passed to a pipeline: numbers by names of arguments."""
    if not isinstance(value, dict) or not all(re.fullmatch(r"[a-z][a-z_]*", str(key)) for key in value):
        return False
    steps, numbers = value.get("num_inference_steps", 1), value.values()
    return _is_count(steps) and all(type(number) in (int, float) and abs(number) < 1e6 for number in numbers)


STAMPED = {
    "steps": _is_count,
    "trained_steps": lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    "call": _is_call,
    "also_steps": lambda value: isinstance(value, list) and all(map(_is_count, value)),
    "null_label": lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    "label_names": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "msd": lambda value: isinstance(value, dict),
    "vae": lambda value: isinstance(value, dict),
    **{
        key: lambda value: isinstance(value, str)
        for key in ("version", "method", "teacher", "teacher_revision", "teacher_variant", "attention", "precision")
    },
}
"""By the keys of stepdistill's entry, whether a value is valid."""


# -- places on this machine ----------------------------------------------------------------------------------


def without_places(value: Any) -> Any:
    """Facts as an exported folder states them: of a path on this machine its last name, of a hub's cache the hub id."""
    if isinstance(value, dict):
        return {key: without_places(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_places(entry) for entry in value]
    return _without_place(value) if isinstance(value, str) else value


def _without_place(text: str) -> str:
    if text.startswith(assets.PREFIX) or "\n" in text:
        return text
    if cached := re.search(r"models--([^/]+)--([^/]+)/snapshots/", text):
        return f"{cached[1]}/{cached[2]}"
    prefix = match[0] if (match := re.match(r"[\w-]{2,}:", text)) else ""
    place = text.removeprefix(prefix)
    local = re.match(r"[/~\\]|\.{1,2}[/\\]|[A-Za-z]:[/\\]", place) or ("/" in place and Path(place).exists())
    if not local:
        return text
    return prefix + (re.split(r"[/\\]", place.rstrip("/\\"))[-1] or "folder")


def remove_places(folder: Path) -> None:
    """Remove from a saved pipeline's configs the paths on this machine that its parts were loaded from."""
    for file in folder.rglob("*.json"):
        config = _mapping(file) or {}
        named = {key: _without_place(config[key]) for key in NAMED if isinstance(config.get(key), str)}
        if any(config[key] != name for key, name in named.items()):
            file.write_text(json.dumps({**config, **named}, indent=2) + "\n", encoding="utf-8")


NAMED = ("_name_or_path", "name_or_path")
"""Keys under which diffusers and transformers write where something came from."""


# -- writing over one ----------------------------------------------------------------------------------------


def is_exported(folder: Path) -> bool:
    """Whether stepdistill exported this folder: a student, or several."""
    if (folder / MANIFEST).is_file():
        return True
    stamp = (_mapping(folder / "scheduler" / "scheduler_config.json") or {}).get(STAMP)
    return isinstance(stamp, dict) and "version" in stamp  # a teacher that stepdistill trained states its steps only


def is_trained_teacher(folder: Path) -> bool:
    """Whether ``stepdistill teacher train`` made this folder."""
    stamps = [(_mapping(config) or {}).get(STAMP) for config in folder.glob("*/config.json")]
    return any(isinstance(stamp, dict) and "trained_by" in stamp for stamp in stamps)


def is_free(folder: Path, names: Collection[str] = ()) -> bool:
    """Whether a folder does not exist, or has nothing in it but files called one of ``names``."""
    if not folder.is_dir():
        return not folder.exists()
    return all(path.name in names or files.is_internal(path) for path in folder.iterdir())


def check_replaceable(folder: str | Path, inputs: Iterable[str | Path | None] = (), teacher: bool = False) -> None:
    """Refuse to write a pipeline over files that stepdistill did not write, or over what it is made from.

    Args:
        inputs: folders (``asset:NAME`` or hub ids too) that it is made from.
        teacher: it is one that ``stepdistill teacher train`` makes; by default a student.

    Raises:
        UserError: the folder is one of the inputs, a file, or holds something else.
    """
    folder = Path(folder)
    files.recover(folder)
    for source in inputs:
        place = None if source is None else Path(assets.resolve(str(source)))
        if place is not None and place.exists() and folder.exists() and place.samefile(folder):
            raise UserError(f"{folder}: it would be written over what it is made from; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: that is a file; name a folder")
    ours = is_trained_teacher if teacher else is_exported
    if not is_free(folder) and not ours(folder):
        kind = "teacher that stepdistill trained" if teacher else "student that stepdistill exported"
        raise UserError(f"{folder}: the folder is not empty and holds no {kind}; choose another, or remove it")


def holds_parts(folder: Path) -> bool:
    """Whether a run's ``student`` has nothing but parts of a student, as an interrupted deletion leaves them."""
    parts = {INDEX, MANIFEST, RECORD, "router.json", "README.md", "lora", "scheduler", "unet", "transformer", "vae"}
    parts |= {"text_encoder", "tokenizer", "feature_extractor", "safety_checker", "image_encoder"}
    return all(p.name in parts or p.name.startswith("student-") or files.is_internal(p) for p in folder.iterdir())
