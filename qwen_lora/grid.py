"""One picture out of many: rows of images under column titles, each row with its caption."""

from __future__ import annotations

import math
import textwrap
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image, ImageDraw, ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

MAX_SIDE = 8192  # pixels; the cells shrink for more
GAP = 8  # pixels around every cell
_BACKGROUND, _TEXT = "#ffffff", "#202020"


@dataclass(frozen=True)
class Row:
    """Images side by side, with what they show."""

    caption: str
    images: Sequence[Image.Image]


def labelled_grid(columns: Sequence[str], rows: Sequence[Row]) -> Image.Image:
    """Titles over the columns, a caption under each row; images keep their size while they fit.

    All images have one size; every row has as many as there are columns.
    """
    from PIL import Image, ImageDraw

    cell = _cell_size(rows[0].images[0].size, len(columns), len(rows))
    font_size = max(11, min(28, cell[0] // 24))
    font = load_font(font_size)
    line_height = round(font_size * 1.3)
    width = len(columns) * (cell[0] + GAP) + GAP
    captions = [wrapped(row.caption, font, width - 2 * GAP) for row in rows]
    height = GAP + line_height + sum(cell[1] + GAP + len(c) * line_height for c in captions) + GAP
    grid = Image.new("RGB", (width, height), _BACKGROUND)
    draw = ImageDraw.Draw(grid)
    for number, title in enumerate(columns):
        shown = textwrap.shorten(title, max(8, 2 * cell[0] // font_size), placeholder="...")
        draw.text((GAP + number * (cell[0] + GAP), GAP // 2), shown, fill=_TEXT, font=font)
    top = GAP + line_height
    for row, caption in zip(rows, captions, strict=True):
        for number, image in enumerate(row.images):
            fitted = image if image.size == cell else image.resize(cell, Image.Resampling.LANCZOS)
            grid.paste(fitted, (GAP + number * (cell[0] + GAP), top))
        top += cell[1]
        _write_lines(draw, caption, (GAP, top + GAP // 4), line_height, font)
        top += len(caption) * line_height + GAP
    return grid


def _cell_size(image: tuple[int, int], columns: int, rows: int) -> tuple[int, int]:
    """(width, height) of a cell: the image's own, or less so that the grid stays a picture."""
    scale = min(1.0, MAX_SIDE / (columns * image[0]), MAX_SIDE / (rows * image[1]))
    return max(1, round(image[0] * scale)), max(1, round(image[1] * scale))


def _write_lines(
    draw: ImageDraw.ImageDraw,
    lines: Sequence[str],
    at: tuple[int, int],
    line_height: int,
    font: Font,
) -> None:
    for number, line in enumerate(lines):
        draw.text((at[0], at[1] + number * line_height), line, fill=_TEXT, font=font)


def wrapped(text: str, font: Font, width: int, lines: int = 3) -> list[str]:
    """At most `lines` lines that fit the width in pixels, one at least; a cut text ends in dots."""
    found: list[str] = []
    rest = " ".join(text.split())
    while rest and len(found) < lines:
        count = _fitting(rest, font, width)
        if count < len(rest) and (space := rest.rfind(" ", 0, count + 1)) > 0:
            count = space
        found.append(rest[:count].rstrip())
        rest = rest[count:].lstrip()
    if rest and found:
        last = found[-1]
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        found[-1] = f"{last.rstrip()}..."
    return found or [""]


def _fitting(text: str, font: Font, width: int) -> int:
    """How many characters from the beginning fit, at least one."""
    most = min(len(text), max(1, width))  # a thousand characters never fit, so none are measured
    fits = bisect_right(
        range(1, most + 1), width, key=lambda n: math.ceil(font.getlength(text[:n]))
    )
    return max(1, fits)


def load_font(size: int) -> Font:
    """matplotlib's DejaVu Sans (Latin, Greek, Cyrillic), or Pillow's own."""
    from PIL import ImageFont

    try:
        fonts = files("matplotlib") / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        with as_file(fonts) as path:
            return ImageFont.truetype(str(path), size)
    except (OSError, ImportError):
        return ImageFont.load_default(size)
