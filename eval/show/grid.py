"""Pictures of several pipelines on the same noise, a block for each."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from stepdistill.data.grid import save_picture, tile_pictures
from stepdistill.data.pixels import unit_to_bytes
from stepdistill.errors import UserError
from stepdistill.eval.measure.draws import select_conditions, step_generator, unit_noise
from stepdistill.eval.measure.targets import Target, count_steps

CELL, GAP, TITLE, HEADER = 64, 4, 30, 22
"""Pixels of a grid: the least side of a picture, between pictures, of a block's title, of the column names."""


def draw_grid(
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
    blocks: list[tuple[str, Tensor]] = []
    names: list[str] | None = None
    for target in targets:
        stock = target.load(device)
        steps, guidance = target.resolve_call(stock)
        conditions = select_conditions(stock, range(columns), prompts, labels)
        noise = unit_noise(seed, 0, rows * columns, stock.noise_shape)
        generator = step_generator(seed, 0)
        pixels = torch.cat(
            [stock.generate(conditions, row, steps, generator, guidance) for row in noise.split(columns)]
        )
        blocks.append((f"{target.name}, {count_steps(steps)}", unit_to_bytes(pixels)))
        if names is None and conditions is not None:
            names = [_name_column(condition, label_names) for condition in conditions]
    path = Path(path)
    save_picture(_stack_blocks(blocks, columns, names), path, optimize=True)
    return path


def _name_column(condition: int | str, label_names: list[str] | None) -> str:
    if isinstance(condition, str):
        return condition
    if label_names is not None and condition < len(label_names):
        return label_names[condition]
    return str(condition)


def _stack_blocks(blocks: list[tuple[str, Tensor]], columns: int, names: list[str] | None) -> Image.Image:
    """Blocks of (title, uint8 (rows * columns, C, H, W)) under each other, the columns' names above all."""
    tiles = [tile_pictures(pictures, columns, CELL, GAP) for _, pictures in blocks]
    header = HEADER if names else 0
    width = max(tile.width for tile in tiles) + GAP
    canvas = Image.new("RGB", (width, sum(tile.height + TITLE for tile in tiles) + header), "white")
    draw = ImageDraw.Draw(canvas)
    title_font, small_font = ImageFont.load_default(18), ImageFont.load_default(12)
    cell = tiles[0].width // columns
    for column, name in enumerate(names or []):
        draw.text((column * cell + GAP, 4), _cut_text(name, cell - GAP, small_font), fill="black", font=small_font)
    y = header
    for (title, _), tile in zip(blocks, tiles, strict=True):
        draw.text((GAP, y + 4), _cut_text(title, width - GAP, title_font), fill="black", font=title_font)
        canvas.paste(tile, (0, y + TITLE))
        y += TITLE + tile.height
    return canvas


def _cut_text(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
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
