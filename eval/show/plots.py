"""Figures of matplotlib in one style, as PNG files or inline SVG."""

from __future__ import annotations

import io
import re
from typing import Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure

MOST_POINTS = 1000
"""Points of a curve; longer ones are averaged in equal spans."""
FEW_POINTS = 30
"""Curves of fewer points show each as a dot."""
Line = tuple[list[float], list[float]]
"""The x and y of a curve."""


def make_axes(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure with one pair of axes, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def style_axes(axes: Axes, which: Literal["major", "minor", "both"] = "major") -> None:
    """A light grid and no frame above or at the right; ``which``: the ticks that have grid lines."""
    axes.grid(alpha=0.3, which=which)
    axes.spines[["top", "right"]].set_visible(False)


def label_small(axes: Axes, title: str, label: str) -> None:
    """Title, name of the x axis and numbers in the small letters of a page."""
    axes.set_title(plain_text(title), fontsize=9)
    axes.set_xlabel(label, fontsize=8)
    axes.tick_params(labelsize=7, which="both")


def use_logarithm(axes: Axes) -> None:
    """A logarithmic y axis with plain numbers at 1, 2, 3 and 5 of every power of ten."""
    axes.set_yscale("log")
    for set_formatter in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        set_formatter(lambda value, _: f"{value:g}" if f"{value:g}".lstrip("0.")[:1] in "1235" else "")


def use_thousands(axes: Axes) -> None:
    """An x axis of network passes: 200k."""
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1000:g}k")


def average_spans(xs: list[float], ys: list[float]) -> Line:
    """At most ``MOST_POINTS`` points: means over equal spans."""
    span = -(-len(xs) // MOST_POINTS)
    starts = range(0, len(xs), span)
    return (
        [sum(xs[i : i + span]) / len(xs[i : i + span]) for i in starts],
        [sum(ys[i : i + span]) / len(ys[i : i + span]) for i in starts],
    )


def plot_line(axes: Axes, xs: list[float], ys: list[float], color: str, label: str | None = None) -> None:
    """One thinned curve."""
    x, y = average_spans(xs, ys)
    axes.plot(x, y, linewidth=1.2, marker="." if len(x) < FEW_POINTS else None, color=color, label=label)


def plain_text(text: str) -> str:
    """For matplotlib: no mathematics, and a leading underscore would hide a line from the legend."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def to_svg(figure: Figure) -> str:
    """A figure as an ``<svg>`` element alone: no prolog, no metadata, scaling with the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?) width="[^"]*"', r'\1 width="100%"', text, count=1)
    return re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1)
