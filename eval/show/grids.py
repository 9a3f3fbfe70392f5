"""Tables and pictures of an evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stepdistill import files
from stepdistill.errors import UserError
from stepdistill.eval.measure.draws import select_conditions, step_generator, unit_noise
from stepdistill.eval.measure.pixels import unit_to_bytes
from stepdistill.eval.measure.targets import Target, count_steps
from stepdistill.eval.stock_pipeline import StockPipeline

CELL, GAP, TITLE, HEADER = 64, 4, 30, 22
"""Pixels of a grid: the least width of a picture, between pictures, of a block's title, of the column names."""


def table(rows: list[dict[str, Any]], metric: str = "frechet") -> str:
    """The rows as text, one line each; ``ratio`` and ``speed`` are against the first row.

    Columns that no row has a value for are left out.  ``metric`` names the distance (``protocol["metric"]``).  ± is the
    standard deviation over seeds; KID's of one seed that over subsets.
    """
    return "\n".join(_aligned(table_cells(rows, metric)))


def table_cells(rows: list[dict[str, Any]], metric: str = "frechet") -> list[list[str]]:
    """The header and one list of cells for each row."""
    if not rows:
        return [["name"]]
    first = rows[0]
    columns: list[tuple[str, Any]] = [
        ("name", lambda r: r["name"]),
        ("steps", lambda r: str(r["steps"])),
        ("passes", lambda r: f"{r['passes_per_image']:g}"),
        (metric, lambda r: _spread(r, "frechet", ".3f")),
        ("ratio", lambda r: f"{r['frechet'] / max(first['frechet'], 1e-12):.2f}"),
    ]
    if any(r.get("parameters") for r in rows):
        columns.append(("params", lambda r: _parameters(r["parameters"])))
    if any(r.get("kid_mean") is not None for r in rows):
        columns.append(("KID x1000", lambda r: f"{1000 * r['kid_mean']:.2f} ± {1000 * r['kid_std']:.2f}"))
    for key in ("precision", "recall", "diversity"):
        if any(r.get(key) is not None for r in rows):
            columns.append((key, lambda r, key=key: _spread(r, key, ".3f")))
    if any(r.get("clip_score") is not None for r in rows):
        columns.append(("CLIP", lambda r: _spread(r, "clip_score", ".4f")))
    for name in dict.fromkeys(name for r in rows for name in r.get("rewards") or {}):
        columns.append((name.rpartition(":")[2], lambda r, name=name: _spread(_rewards(r), name, ".3f")))
    columns.append(("images/s", lambda r: f"{r['images_per_second']:.1f}"))
    columns.append(("speed", lambda r: f"{r['images_per_second'] / first['images_per_second']:.1f}x"))
    if any(r.get("latency") for r in rows):
        columns.append(("ms/call", lambda r: f"{1000 * r['latency']['seconds']:.1f}"))
        columns.append(("text|denoiser|decoder|rest", lambda r: _shares(r["latency"]["shares"])))
    return [[name for name, _ in columns], *[[_cell(cell, row) for _, cell in columns] for row in rows]]


def _cell(cell, row: dict[str, Any]) -> str:
    try:
        return cell(row)
    except (KeyError, TypeError, ZeroDivisionError):  # this row was not measured for that column
        return "-"


def _spread(row: dict[str, Any], key: str, form: str) -> str:
    """``0.341``, or ``0.341 ± 0.012`` where the row is of several seeds."""
    std = (row.get("std") or {}).get(key)
    return f"{row[key]:{form}}" if std is None else f"{row[key]:{form}} ± {std:{form}}"


def _rewards(row: dict[str, Any]) -> dict[str, Any]:
    """A row's rewards as a row of their own."""
    return {**row["rewards"], "std": (row.get("std") or {}).get("rewards")}


def _parameters(counts: list[int]) -> str:
    """``0.69M``, or ``4 x 0.39M`` of several students, one of which draws a picture."""
    size = f"{max(counts) / 1e6:.2f}M"
    return size if len(counts) == 1 else f"{len(counts)} x {size}"


def _shares(shares: dict[str, float]) -> str:
    return "|".join(f"{share:.0%}" for share in shares.values())


def _aligned(cells: list[list[str]]) -> list[str]:
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    lines = [
        "  ".join(
            text.ljust(w) if i == 0 else text.rjust(w) for i, (text, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    ]
    return [lines[0], "-" * (sum(widths) + 2 * (len(widths) - 1)), *lines[1:]]


def grid(
    targets: list[Target],
    path: str | Path,
    rows: int = 3,
    columns: int = 10,
    seed: int = 0,
    device: str | torch.device = "cpu",
    label_names: list[str] | None = None,
    prompts: list[str] | None = None,
    labels: Literal["uniform"] | list[int] = "uniform",
) -> Path:
    """A PNG with a block for each target, all on the same noise; a column is a label or a prompt.

    Args:
        targets: as in evaluation; a block is titled "name, N steps".
        rows, columns: pictures down and across in each block.
        label_names: what labels are called above the columns; their numbers by default.
        prompts: for prompt pipelines.
        labels: which labels stand above the columns, in turn.

    Raises:
        UserError: a target that cannot be loaded or drawn.
    """
    blocks, names = [], None
    for target in targets:
        stock = StockPipeline.load(target.path, device, null_label=target.null_label, variant=target.variant)
        steps, guidance = target.resolve_call(stock)
        conditions = select_conditions(stock, range(columns), prompts, labels)
        noise = unit_noise(seed, 0, rows * columns, stock.noise_shape)
        generator = step_generator(seed, 0)
        drawn = [stock.generate(conditions, row, steps, generator, guidance) for row in noise.split(columns)]
        pixels = torch.cat(drawn)
        blocks.append((f"{target.name}, {count_steps(steps)}", unit_to_bytes(pixels).cpu()))
        if names is None and conditions is not None:
            names = [_column_name(condition, label_names) for condition in conditions]
    return _save(_compose(blocks, columns, names), Path(path))


def _column_name(condition: int | str, label_names: list[str] | None) -> str:
    if isinstance(condition, str):
        return condition
    return label_names[condition] if label_names is not None and condition < len(label_names) else str(condition)


def _compose(blocks: list[tuple[str, Tensor]], columns: int, names: list[str] | None) -> Image.Image:
    """Blocks of (title, uint8 (rows * columns, C, H, W)) under each other, small pictures enlarged by whole factors."""
    tiles = [_block(pixels, columns) for _, pixels in blocks]
    header = HEADER if names else 0
    canvas = Image.new(
        "RGB", (max(t.width for t in tiles) + GAP, sum(t.height + TITLE for t in tiles) + header), "white"
    )
    draw = ImageDraw.Draw(canvas)
    title_font, small_font = ImageFont.load_default(18), ImageFont.load_default(12)
    cell = tiles[0].width // columns
    for column, name in enumerate(names or []):
        draw.text((column * cell + GAP, 4), _fit(name, cell - GAP, small_font), fill="black", font=small_font)
    y = header
    for (title, _), tile in zip(blocks, tiles, strict=True):
        draw.text((GAP, y + 4), _fit(title, canvas.width - GAP, title_font), fill="black", font=title_font)
        canvas.paste(tile, (0, y + TITLE))
        y += TITLE + tile.height
    return canvas


def _block(pixels: Tensor, columns: int) -> Image.Image:
    """uint8 (N, C, H, W) as rows of ``columns`` pictures on white."""
    height, width = pixels.shape[-2:]
    factor = max(1, -(-CELL // width))
    w, h = width * factor + GAP, height * factor + GAP
    tile = Image.new("RGB", (columns * w, len(pixels) // columns * h), "white")
    rgb = pixels.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    for i, array in enumerate(rgb):
        picture = Image.fromarray(array).resize((width * factor, height * factor), Image.Resampling.NEAREST)
        tile.paste(picture, (i % columns * w + GAP, i // columns * h))
    return tile


def _fit(text: str, width: int, font) -> str:
    """``text`` cut to ``width`` pixels, with an ellipsis where it was."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"


def check_picture(path: Path | None) -> None:
    """Refuse to write a picture to a name that is no PNG's.

    Raises:
        UserError: its name does not end in .png.
    """
    if path is not None and path.suffix.lower() != ".png":
        raise UserError(f"{path}: the picture is a PNG; end its name in .png")


def _save(image: Image.Image, path: Path) -> Path:
    with files.replacing(path) as temporary:
        image.save(temporary, format="PNG", optimize=True)
    return path
