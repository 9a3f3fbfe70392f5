"""Teachers and judges from their config files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepdistill.config import check, read_config
from stepdistill.devices import best_device
from stepdistill.errors import UserError
from stepdistill.locks import Lock

from .class_conditional import TeacherConfig, train_teacher
from .judge_captions import MatchingConfig, prepare_matching
from .judge_labels import FeatureConfig, prepare_assets
from .text_to_image import TextTeacherConfig, train_text_teacher

TEACHERS: dict[str, tuple[type, Any]] = {
    "class_conditional": (TeacherConfig, train_teacher),
    "text_to_image": (TextTeacherConfig, train_text_teacher),
}
"""By the config's ``kind``: the settings and what trains by them."""


def train_teacher_from(path: Path, overrides: list[str] | None = None) -> Path:
    """Train the teacher that a config describes; goes on if it was stopped.

    Returns:
        The teacher's folder.

    Raises:
        UserError: anything wrong with the config, or another process writes in its folder.
    """
    raw = read_config(path, overrides)
    kind = raw.get("kind", "class_conditional")
    if not isinstance(kind, str) or kind not in TEACHERS:
        raise UserError(f"{path}: kind = {kind!r}: use one of {', '.join(TEACHERS)}")
    model, train = TEACHERS[kind]
    settings: Any = check(model, raw, str(path))
    with Lock(settings.output, file=Path(f"{settings.output}.lock")):
        return train(settings, best_device())


def make_judge_from(path: Path, overrides: list[str] | None = None) -> dict[str, Path]:
    """Train the feature network that a config describes, make its reference statistics, pack real images.

    Returns:
        The written files by what they are.

    Raises:
        UserError: anything wrong with the config.
    """
    raw = read_config(path, overrides)
    if "kind" in raw:
        return prepare_matching(check(MatchingConfig, raw, str(path)), best_device())
    return prepare_assets(check(FeatureConfig, raw, str(path)), best_device())
