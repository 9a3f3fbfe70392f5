"""Parts of a self-contained HTML page: it holds everything that it shows and fetches nothing."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stepdistill import files
from stepdistill.config import read_mapping
from stepdistill.errors import UserError, first_line, reading
from stepdistill.readers import parse_json, read_bytes

MOST_POINTS = 1000
"""Points of a curve; longer ones are averaged in equal spans."""

GENERATOR = '<meta name="generator" content="stepdistill">'
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1b1f24;background:#fff;max-width:62rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;margin:.4rem 0}h2{font-size:1.15rem;margin:2rem 0 .5rem;border-bottom:1px solid #dde1e6}
table{border-collapse:collapse;font-size:.9rem}td,th{
padding:.25rem .7rem;text-align:right;border-bottom:1px solid #e8ebef}
td:first-child,th:first-child,.facts td{text-align:left}.wide{overflow-x:auto}img{max-width:100%;height:auto}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(18rem,1fr));gap:.5rem}
figure{margin:.5rem 0}figcaption,.note{color:#5a6470;font-size:.85rem}pre{
background:#f5f7f9;padding:.8rem;overflow-x:auto}
"""


def write_page(path: Path, name: str, sections: list[tuple[str, str]]) -> Path:
    """A page called ``name`` with a heading for each (title, HTML).

    Raises:
        UserError: it cannot be written, or a file that is no page of ours stands there.
    """
    check_page(path)
    body = "\n".join(f"<h2>{escape(title)}</h2>\n{content}" for title, content in sections)
    name = escape(name)
    page = (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{GENERATOR}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{STYLE}</style></head>\n<body><h1>{name}</h1>\n{body}\n</body></html>\n"
    )
    files.write_text(path, page)
    return path


def check_page(path: Path) -> None:
    """Refuse to write a page over a file of something else.

    Raises:
        UserError: it is one, or cannot be read.
    """
    if not path.is_file():
        return
    with reading(path, "name another place for the page"):
        text = path.read_text(encoding="utf-8", errors="replace")
    if GENERATOR not in text and STYLE not in text:  # pages of earlier versions
        raise UserError(f"{path}: is no page of stepdistill's, so it is not written over; name another place for it")


def escape(value: Any) -> str:
    return html.escape(str(value))


def missing(what: str) -> str:
    return f'<p class="note">Not there: {escape(what)}.</p>'


def image(data: bytes, text: str) -> str:
    return f'<img alt="{escape(text)}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'


def html_table(rows: list[list[Any]], header: bool = True, kind: str = "wide") -> str:
    lines = []
    for i, row in enumerate(rows):
        tag = "th" if header and i == 0 else "td"
        lines.append("<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return f'<div class="{kind}"><table>{"".join(lines)}</table></div>'


MOST_BYTES = 2**30
"""Of a file that a page is made of."""


def read_text(path: Path) -> str | None:
    """A text file, what is not UTF-8 replaced; None where there is none that can be read."""
    try:
        return read_bytes(path, MOST_BYTES).decode("utf-8", errors="replace")
    except (OSError, ValueError):
        return None


def read_json(path: Path) -> Any:
    """A JSON file's value, None where there is none."""
    try:
        return parse_json(read_text(path) or "")
    except ValueError:
        return None


def read_config(run: Path) -> dict[str, Any]:
    """A run's ``config.yaml``, {} where there is none that can be read."""
    try:
        return read_mapping(run / "config.yaml")
    except (OSError, UserError):
        return {}


def guarded(what: str, build: Callable[[], str]) -> str:
    """What ``build`` gives; where a file of the run is not what it should be, a note that says so.

    Raises:
        UserError: ``build`` raised one.
    """
    try:
        return build()
    except UserError:
        raise
    except Exception as error:  # whatever a damaged file makes of tables and figures
        return f'<p class="note">{escape(what)} cannot be shown: {escape(first_line(error))}.</p>'


def thin(xs: list[float], ys: list[float]) -> tuple[list[float], list[float]]:
    """At most ``MOST_POINTS`` points: means over equal spans."""
    span = -(-len(xs) // MOST_POINTS)
    starts = range(0, len(xs), span)
    return (
        [sum(xs[i : i + span]) / len(xs[i : i + span]) for i in starts],
        [sum(ys[i : i + span]) / len(ys[i : i + span]) for i in starts],
    )


def svg(figure) -> str:
    """A figure as an ``<svg>`` element alone: no prolog, no metadata, scaling with the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 width="100%"', text, count=1)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
