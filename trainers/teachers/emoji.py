"""A small real text-to-image set: emoji of several designs, drawn from Iconify's SVG with their names as captions.

The canonical caption is ``NAME, STYLE style`` ("grinning face, noto style"); training varies it with keywords.  Held
out, by a hash so that more data do not move it: names in all styles, and (name, style) pairs whose name is trained on
in other styles.  Fluent and flat are two renderings of one drawing, so their held-out pairs are easy.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from stepdistill.errors import UserError

from .captioned import Entry, caption_of, write_pictures
from .npm import read_package, unreadable

STYLES = {
    "noto": "noto",
    "noto-v1": "blob",
    "fxemoji": "firefox",
    "fluent-emoji": "fluent",
    "fluent-emoji-flat": "flat",
}
"""Iconify's sets that may be passed on (Apache-2.0 and MIT), and their styles' names in captions."""
RUN_TOGETHER = {"fxemoji"}
"""Sets that write names without hyphens: only names that another set writes with hyphens are taken."""
SKIN_TONE = re.compile(r"-skin-tone\b|(-(medium-light|medium-dark|medium|light|dark))+$")
ICONS_PACKAGE, KEYWORDS_PACKAGE = "@iconify/json@2.2.535", "emojibase-data@17.0.0"
HELD_OUT = 0.05


def _fraction(text: str) -> float:
    """A number in [0, 1) that depends on ``text`` alone."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def split_pairs(pairs: list[tuple[str, str]], share: float = HELD_OUT) -> list[str]:
    """The split of each (name, style): about ``share`` of the names, and of the pairs whose name stays in training."""
    names = {name for name, _ in pairs if _fraction(f"name {name}") < share}
    held = {pair for pair in pairs if pair[0] not in names and _fraction("pair {} {}".format(*pair)) < share}
    trained = {name for name, style in pairs if name not in names and (name, style) not in held}

    def split_of(pair: tuple[str, str]) -> str:
        if pair[0] in names:
            return "held-out-name"
        return "held-out-pair" if pair in held and pair[0] in trained else "train"

    return [split_of(pair) for pair in pairs]


def _read_documents(source: Path, names: list[str], option: str, package: str) -> dict[str, dict[str, Any]]:
    """The JSON files at the paths ``names`` of an npm package.

    Raises:
        UserError: as :func:`read_package`, or not JSON.
    """
    try:
        return {name: json.loads(raw) for name, raw in read_package(source, names, option, package).items()}
    except ValueError as error:
        raise unreadable(source, option, package, error) from None


def read_sets(source: Path) -> dict[str, dict[str, Any]]:
    """Iconify's documents of the sets in :data:`STYLES`, by prefix."""
    paths = {prefix: f"json/{prefix}.json" for prefix in STYLES}
    documents = _read_documents(source, list(paths.values()), "icons", ICONS_PACKAGE)
    return {prefix: documents[path] for prefix, path in paths.items()}


def collect_credits(sets: dict[str, dict[str, Any]]) -> list[dict[str, str]]:
    """The author of each style, and its licence."""
    credits = []
    for prefix, document in sets.items():
        info = document.get("info", {})
        author, licence = info.get("author", {}), info.get("license", {})
        credits.append(
            {
                "style": STYLES[prefix],
                "set": info.get("name", prefix),
                "author": author.get("name", ""),
                "url": author.get("url", ""),
                "licence": licence.get("spdx", licence.get("title", "")),
            }
        )
    return credits


def collect_icons(sets: dict[str, dict[str, Any]]) -> dict[tuple[str, str], str]:
    """SVG by (name, style) of all sets; hidden icons, aliases and skin tones are left out."""
    icons: dict[tuple[str, str], str] = {}
    spelled: dict[str, str] = {}
    for prefix in sorted(STYLES, key=lambda p: p in RUN_TOGETHER):
        document = sets[prefix]
        for key, icon in document["icons"].items():
            if icon.get("hidden") or (SKIN_TONE.search(key) and "traffic" not in key):
                continue
            name = key.removeprefix("flag-for-").replace("-", " ")
            if prefix in RUN_TOGETHER:
                if key not in spelled:
                    continue
                name = spelled[key]
            spelled[name.replace(" ", "")] = name
            box = [icon.get(k, document.get(k, default)) for k, default in _BOX]
            icons[name, STYLES[prefix]] = (
                '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" viewBox="'
                f'{" ".join(map(str, box))}">{icon["body"]}</svg>'
            )
    return icons


_BOX = (("left", 0), ("top", 0), ("width", 16), ("height", 16))


def read_keywords(source: Path) -> dict[str, list[str]]:
    """Emojibase's tags by the name without spaces and signs."""
    document: Any = _read_documents(source, ["en/data.json"], "keywords", KEYWORDS_PACKAGE)["en/data.json"]
    return {_letters(item["label"]): [str(tag) for tag in item.get("tags", [])] for item in document}


def _letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def render(svg: str, size: int) -> np.ndarray | None:
    """uint8 (size, size, 3) on white; None where the SVG draws nothing or cannot be read."""
    try:
        import resvg_py
    except ImportError:
        raise UserError("drawing SVG needs the package resvg-py: pip install 'stepdistill[emoji]'") from None
    try:
        png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    except ValueError:
        return None
    picture = Image.open(io.BytesIO(bytes(png))).convert("RGBA").resize((size, size))
    white = Image.new("RGBA", picture.size, "white")
    pixels = np.asarray(Image.alpha_composite(white, picture).convert("RGB"))
    return None if (pixels == 255).all() else pixels


def is_selected(name: str, style: str, styles: list[str], without: list[str]) -> bool:
    """Whether a drawing is of one of ``styles`` (all, if there are none) and has no word of ``without`` in its name."""
    return (not styles or style in styles) and not set(without) & set(re.split(r"[^a-z0-9]+", name))


def make_emoji(
    icons: Path,
    keywords: Path | None,
    output: Path,
    size: int = 64,
    styles: list[str] | None = None,
    without: list[str] | None = None,
) -> dict[str, int]:
    """Write a folder of captioned pictures (``captioned.py``) into ``output``: its splits' sizes.

    Args:
        styles, without: as :func:`is_selected`.

    Raises:
        UserError: a source is missing or damaged, a style is unknown, or resvg-py is missing.
    """
    styles, without = styles or [], without or []
    unknown = [style for style in styles if style not in STYLES.values()]
    if unknown:
        raise UserError(f"--styles {unknown[0]}: the styles are {', '.join(STYLES.values())}")
    tags = {} if keywords is None else read_keywords(keywords)
    sets = read_sets(icons)
    drawings = sorted((pair, svg) for pair, svg in collect_icons(sets).items() if is_selected(*pair, styles, without))
    if not drawings:
        raise UserError("--styles, --without: no picture is left")
    render("<svg xmlns='http://www.w3.org/2000/svg'/>", 1)  # a missing resvg-py is reported before the work
    pictures, pairs = [], []
    for pair, svg in tqdm(drawings, desc="emoji", unit="picture"):
        picture = render(svg, size)
        if picture is not None:
            pictures.append(picture)
            pairs.append(pair)
    entries = []
    for (name, style), part in zip(pairs, split_pairs(pairs), strict=True):
        words = [word for word in tags.get(_letters(name), []) if word != name]
        entries.append(Entry(caption_of(name, style), name, style, words, part))
    credits = [line for line in collect_credits(sets) if not styles or line["style"] in styles]
    write_pictures(output, np.stack(pictures), entries, credits)
    return {part: sum(e.split == part for e in entries) for part in ("train", "held-out-name", "held-out-pair")}
