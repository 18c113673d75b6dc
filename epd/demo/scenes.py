"""Draws batches of scenes (what is where) as tensors; `render` turns them into pixels.

Shapes: `B` scenes, `O` = MAX_OBJECTS object slots, of which `present` says which are filled.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache

import torch
from torch import Tensor

from epd.demo.world import (
    CHAR_HEIGHT,
    CHAR_WIDTH,
    CHARS,
    COLORS,
    MAX_CHARS,
    MAX_OBJECTS,
    MIN_CHARS,
    NUM_PAIRS,
    NUM_PROPERTIES,
    RADII,
    SHAPES,
    Scene,
    SceneObject,
)

WORD_SHARE = 0.6
CANDIDATES = 24
EDGE = 0.01
OBJECT_GAP = 0.02
WORD_GAP = 0.015
CROWDED = 6


@dataclass(frozen=True, slots=True)
class SceneBatch:
    """`B` scenes. Lengths and positions are in image sides, indices follow `world`."""

    shape: Tensor  # [B, O] int64
    color: Tensor  # [B, O] int64
    size: Tensor  # [B, O] int64
    radius: Tensor  # [B, O]
    center: Tensor  # [B, O, 2]
    present: Tensor  # [B, O] bool
    word: Tensor  # [B, MAX_CHARS] int64
    word_length: Tensor  # [B] int64, 0 = no word
    word_center: Tensor  # [B, 2]
    font: Tensor  # [B] int64

    def take(self, index: Tensor | slice) -> SceneBatch:
        """The scenes at `index`."""
        return SceneBatch(*(getattr(self, field.name)[index] for field in fields(self)))

    def grouped(self, size: int) -> SceneBatch:
        """The same scenes with a leading dimension for every `size` of them."""
        values = (getattr(self, field.name) for field in fields(self))
        return SceneBatch(*(value.view(-1, size, *value.shape[1:]) for value in values))

    def has_word(self) -> Tensor:
        """bool `[B]`."""
        return self.word_length > 0

    def property_members(self) -> Tensor:
        """Which object has which property, bool `[B, NUM_PROPERTIES, O]`."""
        pairs = torch.arange(NUM_PAIRS, device=self.shape.device)
        is_shape = self.shape[:, None] == torch.arange(len(SHAPES), device=pairs.device)[:, None]
        is_color = self.color[:, None] == torch.arange(len(COLORS), device=pairs.device)[:, None]
        both = is_color[:, pairs // len(SHAPES)] & is_shape[:, pairs % len(SHAPES)]
        members = torch.cat([both, is_shape, is_color], 1) & self.present[:, None]
        assert members.shape[1] == NUM_PROPERTIES
        return members

    def to_scenes(self) -> list[Scene]:
        """The same scenes in plain Python."""
        return [self._to_scene(row) for row in range(self.shape.shape[0])]

    def _to_scene(self, row: int) -> Scene:
        objects = tuple(
            SceneObject(
                SHAPES[int(self.shape[row, slot])],
                COLORS[int(self.color[row, slot])],
                float(self.center[row, slot, 0]),
                float(self.center[row, slot, 1]),
                float(self.radius[row, slot]),
            )
            for slot in range(MAX_OBJECTS)
            if self.present[row, slot]
        )
        word = "".join(CHARS[int(char)] for char in self.word[row, : int(self.word_length[row])])
        word_x, word_y = (float(value) for value in self.word_center[row])
        return Scene(objects, word, word_x, word_y)


def uniform(generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform floats in [0, 1) on the generator's device."""
    return torch.rand(*shape, generator=generator, device=generator.device)


def integers(generator: torch.Generator, high: int, *shape: int) -> Tensor:
    """Uniform integers in [0, high) on the generator's device."""
    return torch.randint(0, high, shape, generator=generator, device=generator.device)


@cache
def constant(
    values: tuple[float, ...] | tuple[tuple[float, ...], ...], device: torch.device
) -> Tensor:
    """The values as a tensor that stays on the device: copying them each time would stall a GPU."""
    return torch.tensor(values, device=device)


def choose(weights: Tensor, generator: torch.Generator) -> Tensor:
    """An index into the last dimension, drawn by weight; 0 where nothing has weight.

    The largest of weight / Exp(1) is drawn with probability proportional to its weight, and unlike
    `torch.multinomial` this never waits for a GPU.
    """
    return (weights / torch.empty_like(weights).exponential_(generator=generator)).argmax(-1)


def draw_scenes(batch: int, generator: torch.Generator, *, num_fonts: int = 12) -> SceneBatch:
    """`batch` scenes of 1 to 10 objects that do not touch, 60 % of them with a printed word."""
    wanted = 1 + integers(generator, MAX_OBJECTS, batch)
    color, shape = _draw_kinds(batch, generator)
    size = integers(generator, len(RADII), batch, MAX_OBJECTS)
    # crowded scenes use the two smaller sizes, or the objects would not fit
    size = torch.where((wanted > CROWDED)[:, None] & (size == 2), 0, size)
    jitter = 0.93 + 0.14 * uniform(generator, batch, MAX_OBJECTS)
    radius = constant(RADII, generator.device)[size] * jitter
    length = MIN_CHARS + integers(generator, MAX_CHARS - MIN_CHARS + 1, batch)
    length = length * (uniform(generator, batch) < WORD_SHARE)
    half = torch.stack([length * CHAR_WIDTH / 2, torch.full_like(radius[:, 0], CHAR_HEIGHT / 2)], 1)
    word_center = half + EDGE + uniform(generator, batch, 2) * (1 - 2 * EDGE - 2 * half)
    center, present = _place(radius, wanted, word_center, half, length > 0, generator)
    return SceneBatch(
        shape,
        color,
        size,
        radius,
        center,
        present,
        integers(generator, len(CHARS), batch, MAX_CHARS),
        length,
        word_center,
        integers(generator, num_fonts, batch),
    )


def _draw_kinds(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Colours and shapes; half of the scenes repeat one of them, so that high counts are common."""
    color = integers(generator, len(COLORS), batch, MAX_OBJECTS)
    shape = integers(generator, len(SHAPES), batch, MAX_OBJECTS)
    which = uniform(generator, batch, 1)
    repeats = uniform(generator, batch, MAX_OBJECTS) < 0.6
    shape = torch.where((which < 0.25) & repeats, shape[:, :1], shape)
    color = torch.where((which > 0.75) & repeats, color[:, :1], color)
    return color, shape


def _place(
    radius: Tensor,
    wanted: Tensor,
    word_center: Tensor,
    word_half: Tensor,
    has_word: Tensor,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor]:
    """Centres `[B, O, 2]` and presence `[B, O]`: the first free one of 24 candidates, if any."""
    batch = radius.shape[0]
    rows = torch.arange(batch, device=radius.device)
    center = torch.full((batch, MAX_OBJECTS, 2), -9.0, device=radius.device)
    present = torch.zeros(batch, MAX_OBJECTS, dtype=torch.bool, device=radius.device)
    margin = radius[..., None, None] + EDGE
    spread = uniform(generator, batch, MAX_OBJECTS, CANDIDATES, 2)
    candidates = margin + spread * (1 - 2 * margin)
    outside = (candidates - word_center[:, None, None]).abs() - word_half[:, None, None]
    beside_word = outside.clamp(min=0).norm(dim=-1) > radius[..., None] + WORD_GAP
    beside_word |= ~has_word[:, None, None]
    for slot in range(MAX_OBJECTS):
        candidate, free = candidates[:, slot], beside_word[:, slot]
        if slot:
            distance = (candidate[:, :, None] - center[:, None, :slot]).norm(dim=-1)
            reach = radius[:, slot, None, None] + radius[:, None, :slot] + OBJECT_GAP
            free = free & ((distance > reach) | ~present[:, None, :slot]).all(-1)
        chosen = candidate[rows, free.float().argmax(1)]
        present[:, slot] = free.any(1) & (slot < wanted)
        center[:, slot] = torch.where(present[:, slot, None], chosen, center[:, slot])
    return center, present


@dataclass(frozen=True, slots=True)
class PatchLabels:
    """What lies under each of the `G * G` patches: supervision that only a renderer can give."""

    obj: Tensor  # [B, G*G] int64: object slot, MAX_OBJECTS = none
    char: Tensor  # [B, G*G] int64: index into CHARS, len(CHARS) = none


def label_patches(scenes: SceneBatch, grid: int) -> PatchLabels:
    """Labels by patch centre: inside an object (plus a fifth of a patch) or inside a character."""
    ticks = (torch.arange(grid, device=scenes.shape.device) + 0.5) / grid
    x, y = ticks.repeat(grid), ticks.repeat_interleave(grid)
    points = torch.stack([x, y], -1)
    distance = (points[None, None] - scenes.center[:, :, None]).norm(dim=-1)
    gap = torch.where(scenes.present[..., None], distance - scenes.radius[..., None], 9.0)
    nearest, slot = gap.min(1)
    obj = torch.where(nearest < 0.2 / grid, slot, MAX_OBJECTS)
    left = scenes.word_center[:, :1] - scenes.word_length[:, None] * (CHAR_WIDTH / 2)
    column = ((x[None] - left) / CHAR_WIDTH).floor().long()
    inside = (column >= 0) & (column < scenes.word_length[:, None])
    inside &= (y[None] - scenes.word_center[:, 1:]).abs() < CHAR_HEIGHT / 2
    char = scenes.word.gather(1, column.clamp(0, MAX_CHARS - 1))
    return PatchLabels(obj, torch.where(inside, char, len(CHARS)))
