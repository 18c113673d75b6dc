"""The printed characters as small grey pictures, so that rendering needs no fonts on the machine.

`glyphs.png` is a grid: one row per font and size, one column per character of `world.CHARS`, cells
of 19 x 28 pixels. It was made once with `python -m epd.demo.glyphs epd/demo/glyphs.png` from
Pillow's built-in font and five faces of DejaVu (both free to redistribute), each at two heights.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from epd.demo.world import CHARS, GLYPH_HEIGHT, GLYPH_WIDTH

if TYPE_CHECKING:
    from collections.abc import Iterator

ATLAS = Path(__file__).parent / "glyphs.png"
DEJAVU_FACES = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
    "DejaVuSerif-Bold.ttf",
    "DejaVuSansMono-Bold.ttf",
    "DejaVuSansCondensed-Bold.ttf",
)
HEIGHT_FRACTIONS = (0.80, 0.95)


def load_glyphs(device: torch.device | str = "cpu") -> torch.Tensor:
    """Ink coverage in [0, 1], shape `[fonts, characters, 28, 19]`, float32."""
    with Image.open(ATLAS) as picture:
        grid = np.array(picture.convert("L"))
    cells = grid.reshape(-1, GLYPH_HEIGHT, len(CHARS), GLYPH_WIDTH).transpose(0, 2, 1, 3)
    return torch.from_numpy(np.ascontiguousarray(cells)).to(device).float() / 255


def draw_glyph(char: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """One character centred in its cell, shrunk if the font draws it too large."""
    left, top, right, bottom = (round(edge) for edge in font.getbbox(char))
    glyph = Image.new("L", (max(right - left, 1), max(bottom - top, 1)))
    ImageDraw.Draw(glyph).text((-left, -top), char, fill=255, font=font)
    scale = min(1.0, (GLYPH_WIDTH - 1) / glyph.width, (GLYPH_HEIGHT - 2) / glyph.height)
    if scale < 1:
        size = (max(1, int(glyph.width * scale)), max(1, int(glyph.height * scale)))
        glyph = glyph.resize(size, Image.Resampling.BILINEAR)
    cell = Image.new("L", (GLYPH_WIDTH, GLYPH_HEIGHT))
    cell.paste(glyph, ((GLYPH_WIDTH - glyph.width) // 2, (GLYPH_HEIGHT - glyph.height) // 2))
    return cell


def fonts() -> Iterator[ImageFont.FreeTypeFont]:
    """Every face at every height; needs FreeType and the DejaVu faces installed."""
    for fraction in HEIGHT_FRACTIONS:
        size = round(GLYPH_HEIGHT * fraction)
        built_in = ImageFont.load_default(size)
        if isinstance(built_in, ImageFont.FreeTypeFont):
            yield built_in
        for face in DEJAVU_FACES:
            yield ImageFont.truetype(face, size)


def draw_atlas() -> Image.Image:
    """The whole grid."""
    rows = list(fonts())
    atlas = Image.new("L", (len(CHARS) * GLYPH_WIDTH, len(rows) * GLYPH_HEIGHT))
    for row, font in enumerate(rows):
        for column, char in enumerate(CHARS):
            atlas.paste(draw_glyph(char, font), (column * GLYPH_WIDTH, row * GLYPH_HEIGHT))
    return atlas


if __name__ == "__main__":
    draw_atlas().save(sys.argv[1], optimize=True)
