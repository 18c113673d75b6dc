"""Turns a `SceneBatch` into uint8 RGB pictures on whatever device the generator lives on.

Painter's order: a busy background (gradient, stripes, textures, noise), clutter (thin lines, dull
squares, specks), the objects as anti-aliased signed distance fields, and the printed word.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from epd.demo.scenes import SceneBatch, constant, uniform
from epd.demo.world import (
    COLOR_RGB,
    GLYPH_HEIGHT,
    GLYPH_WIDTH,
    IMAGE_SIDE,
    MAX_CHARS,
    MAX_OBJECTS,
    RADII,
)

if TYPE_CHECKING:
    from collections.abc import Callable

SIDE = IMAGE_SIDE
NUM_LINES = 5
# object windows hold the largest radius, its jitter and the rotated corners of a square
WINDOW = 2 * math.ceil(max(RADII) * 1.07 * 1.2 * SIDE) + 2
STAR_TIP, STAR_NOTCH = 1.05, 0.45


@torch.no_grad()
def render(scenes: SceneBatch, glyphs: Tensor, generator: torch.Generator) -> Tensor:
    """Pictures `[B, 3, 224, 224]`, uint8. The generator decides background, tints and rotations."""
    picture = _background(scenes.shape.shape[0], generator)
    picture = _clutter(picture, generator)
    _paint_objects(picture, scenes, generator)
    _print_word(picture, scenes, glyphs, generator)
    return (picture * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def _background(batch: int, generator: torch.Generator) -> Tensor:
    """Two muted colours blended along a direction, with stripes, textures and noise over them."""
    base = 0.12 + 0.76 * uniform(generator, batch, 1, 1, 1)
    tones = base + 0.16 * (uniform(generator, batch, 6, 1, 1) - 0.5)
    angle = 2 * math.pi * uniform(generator, batch, 2, 1, 1)
    line = torch.linspace(-1, 1, SIDE, device=generator.device)
    along = angle.cos() * line[None, None, None, :] + angle.sin() * line[None, None, :, None]
    blend = 0.5 + 0.35 * along[:, :1]
    picture = tones[:, :3] * (1 - blend) + tones[:, 3:] * blend
    frequency = 8 + 32 * uniform(generator, batch, 1, 1, 1)
    striped = uniform(generator, batch, 1, 1, 1) < 0.35
    picture = picture + striped * 0.05 * (along[:, 1:] * frequency).sin()
    for cells, strength in ((5, 0.22), (17, 0.14), (SIDE // 3, 0.10)):
        texture = F.interpolate(
            uniform(generator, batch, 1, cells, cells) - 0.5, size=(SIDE, SIDE), mode="bilinear"
        )
        picture = picture + texture * (strength * uniform(generator, batch, 1, 1, 1))
    noise = uniform(generator, batch, 1, SIDE, SIDE) - 0.5
    return (picture + noise * (0.14 * uniform(generator, batch, 1, 1, 1))).clamp(0, 1)


def _clutter(picture: Tensor, generator: torch.Generator) -> Tensor:
    """Things that mean nothing: thin lines, dull squares of eight pixels, coloured specks."""
    batch = picture.shape[0]
    cover = _line_cover(batch, generator)
    tone = uniform(generator, batch, NUM_LINES, 3, 1, 1)
    for number in range(NUM_LINES):
        picture = torch.lerp(picture, tone[:, number], cover[:, number, None])
    squares = (uniform(generator, batch, 1, SIDE // 8, SIDE // 8) < 0.03).float() * 0.3
    squares = F.interpolate(squares, size=(SIDE, SIDE))
    picture = torch.lerp(picture, uniform(generator, batch, 3, 1, 1), squares)
    density = 0.004 * uniform(generator, batch, 1, 1, 1)
    specks = (uniform(generator, batch, 1, SIDE // 2, SIDE // 2) < density).float()
    specks = F.interpolate(specks, size=(SIDE, SIDE))
    return torch.lerp(picture, uniform(generator, batch, 3, 1, 1), specks).contiguous()


def _line_cover(batch: int, generator: torch.Generator) -> Tensor:
    """How much of each pixel each line covers, `[B, NUM_LINES, 224, 224]`."""
    ticks = (torch.arange(SIDE, device=generator.device) + 0.5) / SIDE
    ends = uniform(generator, batch, NUM_LINES, 4, 1, 1) * 1.2 - 0.1
    x0, y0, x1, y1 = ends.unbind(2)
    dx, dy = x1 - x0, y1 - y0
    ux, uy = ticks[None, None, None, :] - x0, ticks[None, None, :, None] - y0
    at = ((ux * dx + uy * dy) / (dx * dx + dy * dy).clamp(min=1e-4)).clamp(0, 1)
    distance = torch.hypot(ux - at * dx, uy - at * dy) * SIDE
    number = torch.arange(NUM_LINES, device=generator.device)
    drawn = number < NUM_LINES * uniform(generator, batch, 1)
    return (1.2 - distance).clamp(0, 1) * (0.6 * drawn)[..., None, None]


def _paint_objects(picture: Tensor, scenes: SceneBatch, generator: torch.Generator) -> None:
    """Draws every object in place, each inside a window of its own."""
    batch = picture.shape[0]
    flat = picture.view(batch, 3, SIDE * SIDE)
    rotation = (uniform(generator, batch, MAX_OBJECTS, 1, 1) - 0.5) * 0.4
    tint = (uniform(generator, batch, MAX_OBJECTS, 3) - 0.5) * 0.10
    paint = (constant(COLOR_RGB, picture.device)[scenes.color] / 255 + tint).clamp(0, 1)
    offset = torch.arange(WINDOW, device=picture.device)
    center = scenes.center[..., None, None] * SIDE  # [B, O, 2, 1, 1]
    corner = (center - WINDOW / 2).round().long().clamp(0, SIDE - WINDOW)
    x, y = corner[:, :, 0] + offset[None, :], corner[:, :, 1] + offset[:, None]
    radius = scenes.radius[..., None, None] * SIDE
    u = (x + 0.5 - center[:, :, 0]) / radius
    v = (y + 0.5 - center[:, :, 1]) / radius
    cos, sin = rotation.cos(), rotation.sin()
    distance = shape_distance(u * cos + v * sin, v * cos - u * sin, scenes.shape)
    cover = (0.5 - distance * radius).clamp(0, 1) * scenes.present[..., None, None]
    shade = (1 - 0.06 * v.clamp(-1, 1)).expand_as(cover)
    index = (y * SIDE + x).flatten(2)[:, :, None].expand(-1, -1, 3, -1)
    color = (paint[..., None] * shade.flatten(2)[:, :, None]).clamp(0, 1)
    cover = cover.flatten(2)[:, :, None]
    for slot in range(MAX_OBJECTS):
        under = flat.gather(2, index[:, slot])
        flat.scatter_(2, index[:, slot], torch.lerp(under, color[:, slot], cover[:, slot]))


def shape_distance(x: Tensor, y: Tensor, shape: Tensor) -> Tensor:
    """Signed distance to the unit outline of each object's shape (negative inside).

    `x`, `y` are `[..., H, W]` in units of the radius, `shape` is `[...]`. Exact for circle and
    ring, a lower bound near the corners of the others, which only softens their anti-aliasing.
    """
    outlines: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (
        lambda a, b: torch.hypot(a, b) - 0.95,
        lambda a, b: torch.maximum(a.abs(), b.abs()) - 0.84,
        _triangle,
        _star,
        lambda a, b: (torch.hypot(a, b) - 0.72).abs() - 0.21,
        _cross,
    )
    kind = shape[..., None, None]
    distance = outlines[0](x, y)
    for number, outline in enumerate(outlines[1:], start=1):
        distance = torch.where(kind == number, outline(x, y), distance)
    return distance


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    """Apex at (0, -1), base at y = 0.7: the larger distance of base and slanted side."""
    half_base, height = 0.95, 1.7
    side = (x.abs() * height - (y + 1) * half_base) / math.hypot(height, half_base)
    return torch.maximum(y - 0.70, side)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    """Two bars of half width 0.27 and half length 0.95."""
    near, far = torch.minimum(x.abs(), y.abs()), torch.maximum(x.abs(), y.abs())
    return torch.maximum(near - 0.27, far - 0.95)


def _star(x: Tensor, y: Tensor) -> Tensor:
    """Five points: fold the plane into half a sector, then the distance to its one edge."""
    sector = 2 * math.pi / 5
    radius = torch.hypot(x, y)
    angle = (torch.remainder(torch.atan2(x, -y) + sector / 2, sector) - sector / 2).abs()
    notch_x, notch_y = STAR_NOTCH * math.cos(sector / 2), STAR_NOTCH * math.sin(sector / 2)
    normal_x, normal_y = notch_y, STAR_TIP - notch_x
    scale = math.hypot(normal_x, normal_y)
    along = radius * angle.cos() - STAR_TIP
    return (along * normal_x + radius * angle.sin() * normal_y) / scale


def _print_word(
    picture: Tensor, scenes: SceneBatch, glyphs: Tensor, generator: torch.Generator
) -> None:
    """Prints each scene's word in place, dark on a light ground and light on a dark one."""
    batch, width = picture.shape[0], MAX_CHARS * GLYPH_WIDTH
    flat = picture.view(batch, 3, SIDE * SIDE)
    shown = torch.arange(MAX_CHARS, device=picture.device) < scenes.word_length[:, None]
    ink = glyphs[scenes.font[:, None], scenes.word] * shown[..., None, None]
    ink = ink.permute(0, 2, 1, 3).reshape(batch, GLYPH_HEIGHT, width)
    half = torch.stack(
        [scenes.word_length * GLYPH_WIDTH, torch.full_like(scenes.word_length, GLYPH_HEIGHT)], 1
    )
    corner = (scenes.word_center * SIDE - half / 2).round().long()
    # near the right edge the strip stays inside the picture and its content moves instead
    left = corner[:, 0].clamp(0, SIDE - width)
    source = torch.arange(width, device=picture.device) - (corner[:, 0] - left)[:, None]
    ink = ink.gather(2, source.clamp(min=0)[:, None].expand(batch, GLYPH_HEIGHT, width))
    ink = ink * (source >= 0)[:, None]
    x = left[:, None, None] + torch.arange(width, device=picture.device)
    y = corner[:, 1, None, None] + torch.arange(GLYPH_HEIGHT, device=picture.device)[:, None]
    index = (y * SIDE + x).view(batch, 1, -1).expand(batch, 3, -1)
    under = flat.gather(2, index)
    cover = ink.reshape(batch, 1, -1)
    ground = (under * (cover > 0)).sum((1, 2)) / (3 * (cover > 0).sum((1, 2)).clamp(min=1))
    tone = torch.where(ground > 0.5, 0.06, 0.94)[:, None, None]
    tone = tone + 0.08 * (uniform(generator, batch, 3, 1) - 0.5)
    flat.scatter_(2, index, torch.lerp(under, tone.clamp(0, 1).expand_as(under), cover))
