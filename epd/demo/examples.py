"""Pictures the demo model has never seen, with questions and answers: for people, tests, benches.

    for example in held_out(8):
        print(example.question, "->", example.answer)

Each example depends on its number and the set's seed alone, so a longer list starts with a shorter
one. Rendering runs on the CPU; pictures are uint8 RGB, and PNG keeps them exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch
from PIL import Image

from epd.demo.glyphs import load_glyphs
from epd.demo.questions import WORD, QuestionDrawer, caption_valid, draw_type
from epd.demo.render import render
from epd.demo.scenes import draw_scenes
from epd.demo.seeds import held_out_seed
from epd.demo.wording import ANSWERS, MULTI, SINGLE, TYPES, caption, prompts_of
from epd.demo.world import MAX_CAPTION_OBJECTS, Scene

if TYPE_CHECKING:
    from torch import Tensor

    from epd.demo.scenes import SceneBatch

ROWS_AT_ONCE = 16
SINGLE_TYPES = tuple(kind.name for kind in SINGLE)
MULTI_TYPES = tuple(kind.name for kind in MULTI)
_BY_NAME = {kind.name: kind for kind in SINGLE + MULTI}


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one to three pictures; `scenes` and `fill` say what is in them."""

    images: tuple[Image.Image, ...]
    question: str
    answer: str
    type: str
    scenes: tuple[Scene, ...]
    fill: dict[str, str]


def held_out(count: int, seed: int = 0, *, types: tuple[str, ...] = TYPES) -> list[Example]:
    """`count` examples that take turns through `types` (default: all of them).

    Deterministic for a seed (0 to 2047). Types about several images alternate two and three.
    """
    return [
        held_out_example(number, seed, kind=types[number % len(types)]) for number in range(count)
    ]


@torch.no_grad()
def held_out_example(number: int, seed: int = 0, *, kind: str) -> Example:
    """Example `number` of a held-out set, of the type `kind`."""
    generator = torch.Generator().manual_seed(held_out_seed(seed, number))
    num_images = 1 if kind in SINGLE_TYPES else 2 + number // len(TYPES) % 2
    glyphs = _glyphs()
    while True:
        scenes = draw_scenes(ROWS_AT_ONCE * num_images, generator, num_fonts=glyphs.shape[0])
        found = _draw(scenes, kind, num_images, generator)
        if found is not None:
            break
    row, fill, answer = found
    scenes = scenes.take(slice(row * num_images, (row + 1) * num_images))
    prompts = prompts_of(_BY_NAME[kind])[fill]
    wording = int(torch.randint(len(prompts), (1,), generator=generator))
    pictures = render(scenes, glyphs, generator).permute(0, 2, 3, 1).numpy()
    return Example(
        tuple(Image.fromarray(picture) for picture in pictures),
        prompts[wording],
        answer,
        kind,
        tuple(scenes.to_scenes()),
        _BY_NAME[kind].fills[fill],
    )


def _draw(
    scenes: SceneBatch, kind: str, num_images: int, generator: torch.Generator
) -> tuple[int, int, str] | None:
    """Row, fill and answer of the first row that allows the type, if any does."""
    if kind == "caption":
        rows = caption_valid(scenes, MAX_CAPTION_OBJECTS).nonzero()
        if len(rows) == 0:
            return None
        row = int(rows[0])
        return row, 0, caption(scenes.take(slice(row, row + 1)).to_scenes()[0])
    questions = draw_type(QuestionDrawer(scenes, num_images, 1, generator), kind)
    rows = questions.valid[:, 0].nonzero()
    if len(rows) == 0:
        return None
    row = int(rows[0])
    answer = int(questions.answer[row, 0])
    if answer < WORD:
        return row, int(questions.fill[row, 0]), ANSWERS[answer]
    asked = row * num_images + int(questions.image[row, 0])
    word = scenes.take(slice(asked, asked + 1)).to_scenes()[0].word
    return row, int(questions.fill[row, 0]), word


@cache
def _glyphs() -> Tensor:
    return load_glyphs()
