"""Draws questions about scenes, with answers computed from what was drawn, as tensors.

Shapes: `R` rows of `I` images each, `K` questions a row, `O` object slots. A question may be
*about* some objects (and the word, the last entry): what the text tower should light up, and what
token dropping may not hide. Ambiguous questions are never drawn: uniqueness and clear margins
decide what is valid, and types are drawn among the valid ones by weight.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from epd.demo.scenes import SceneBatch, choose, constant, integers, uniform
from epd.demo.wording import (
    ANSWERS,
    COUNTED,
    IMAGE_ANSWERS,
    MULTI,
    NUMBERS,
    ORDINALS,
    PAIRS,
    QUADRANTS,
    SINGLE,
    TYPES,
)
from epd.demo.world import MAX_OBJECTS, NUM_PAIRS, NUM_PROPERTIES, SHAPES, with_article

if TYPE_CHECKING:
    from collections.abc import Callable

NUM_SHAPES = len(SHAPES)
COLOR_0, SHAPE_0, NUMBER_0 = 0, ANSWERS.index(SHAPES[0]), ANSWERS.index(NUMBERS[0])
YES, NO, NONE = ANSWERS.index("yes"), ANSWERS.index("no"), ANSWERS.index("none")
QUADRANT_0, IMAGE_0 = ANSWERS.index(QUADRANTS[0]), ANSWERS.index(IMAGE_ANSWERS[0])
PAIR_0 = ANSWERS.index(with_article(PAIRS[0]))
WORD = len(ANSWERS)
"""Stands for `the word of the image asked about` where an answer index is expected."""

NO_WORD_SHARE = 0.15
QUADRANT_MARGIN = 0.06
SIZE_RATIO = 1.25
RELATION_MIN, RELATION_CLEAR, RELATION_WIDE = 0.08, 0.8, 1.25
CAPTION_GAP = 0.012


@dataclass(frozen=True, slots=True)
class Questions:
    """`[R, K]` questions."""

    type: Tensor  # [R, K] int64 into TYPES
    fill: Tensor  # [R, K] int64 into the fills of the type
    answer: Tensor  # [R, K] int64 into ANSWERS, or WORD
    image: Tensor  # [R, K] int64: whose word answers, where answer is WORD
    valid: Tensor  # [R, K] bool
    about: Tensor  # [R, K, I, O + 1] bool


class QuestionDrawer:
    """Draws questions about one scene batch; `num_images` consecutive scenes are a row."""

    def __init__(
        self, scenes: SceneBatch, num_images: int, num_slots: int, generator: torch.Generator
    ) -> None:
        self.generator, self.num_images, self.num_slots = generator, num_images, num_slots
        self.device = scenes.shape.device
        self.num_rows = scenes.shape.shape[0] // num_images
        self.scenes = scenes.grouped(num_images)
        members = scenes.property_members()
        self.members = members.view(self.num_rows, num_images, *members.shape[1:])  # [R, I, P, O]
        self.counts = self.members.sum(-1)  # [R, I, P]
        self.has_word = scenes.has_word().view(self.num_rows, num_images)

    # -- small tools ------------------------------------------------------------------------

    def _coin(self, share: float) -> Tensor:
        return uniform(self.generator, self.num_rows, self.num_slots) < share

    def _choose(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """An index `[R, K]` drawn by weight (`[R, N]` or `[R, K, N]`), and whether any had one."""
        if weights.ndim == 2:
            weights = weights[:, None].expand(-1, self.num_slots, -1)
        index = choose(weights.float(), self.generator)
        return index, weights.gather(2, index[..., None])[..., 0] > 0

    def _of_row(self, table: Tensor, *index: Tensor) -> Tensor:
        """`table[row, index...]` for `[R, K]` indices."""
        row = torch.arange(self.num_rows, device=self.device)[:, None].expand(-1, self.num_slots)
        return table[(row, *index)]

    def _only(self, slot: Tensor) -> Tensor:
        """That one object of each question, bool `[R, K, O]`."""
        return slot[..., None] == torch.arange(MAX_OBJECTS, device=self.device)

    def _draft(
        self,
        fill: Tensor,
        answer: Tensor,
        valid: Tensor,
        *,
        members: Tensor | None = None,
        word: Tensor | None = None,
        image: Tensor | None = None,
    ) -> Questions:
        """`members` `[R, K, I, O]` and `word` `[R, K, I]` say what the question is about."""
        shape = (self.num_rows, self.num_slots)
        about = torch.zeros(
            *shape, self.num_images, MAX_OBJECTS + 1, dtype=torch.bool, device=self.device
        )
        if members is not None:
            about[..., :MAX_OBJECTS] = members
        if word is not None:
            about[..., MAX_OBJECTS] = word
        zero = torch.zeros(shape, dtype=torch.long, device=self.device)
        image = zero if image is None else image
        return Questions(zero, fill + zero, answer + zero, image, valid.expand(shape), about)

    def _about_property(self, index: Tensor) -> Tensor:
        """The objects with that property in every image, `[R, K, I, O]`."""
        return self._of_row(self.members.transpose(1, 2), index)

    # -- one image --------------------------------------------------------------------------

    def color_of_shape(self) -> Questions:
        shape, ok = self._choose((self.counts[:, 0, NUM_PAIRS:][:, :NUM_SHAPES] == 1).float())
        about = self._about_property(NUM_PAIRS + shape)
        color = self._of_row(self.scenes.color[:, 0], about[:, :, 0].int().argmax(-1))
        return self._draft(shape, COLOR_0 + color, ok, members=about)

    def shape_of_color(self) -> Questions:
        color, ok = self._choose((self.counts[:, 0, NUM_PAIRS + NUM_SHAPES :] == 1).float())
        about = self._about_property(NUM_PAIRS + NUM_SHAPES + color)
        shape = self._of_row(self.scenes.shape[:, 0], about[:, :, 0].int().argmax(-1))
        return self._draft(color, SHAPE_0 + shape, ok, members=about)

    def _count(self, first: int, last: int) -> Questions:
        counts = self.counts[:, 0, first:last]
        index, ok = self._choose(counts + 0.4)
        answer = NUMBER_0 + self._of_row(counts, index)
        return self._draft(index, answer, ok, members=self._about_property(first + index))

    def count_shape(self) -> Questions:
        return self._count(NUM_PAIRS, NUM_PAIRS + NUM_SHAPES)

    def count_color(self) -> Questions:
        return self._count(NUM_PAIRS + NUM_SHAPES, NUM_PROPERTIES)

    def count_all(self) -> Questions:
        present = self.scenes.present
        zero = torch.zeros(self.num_rows, self.num_slots, dtype=torch.long, device=self.device)
        answer = NUMBER_0 + present[:, 0].sum(-1)[:, None]
        return self._draft(zero, answer, zero == 0, members=present[:, None])

    def exist(self) -> Questions:
        counts = self.counts[:, 0]
        color_seen = counts[:, NUM_PAIRS + NUM_SHAPES :].repeat_interleave(NUM_SHAPES, 1) > 0
        shape_seen = counts[:, NUM_PAIRS:][:, :NUM_SHAPES].repeat(1, NUM_PAIRS // NUM_SHAPES) > 0
        near = torch.ones_like(counts, dtype=torch.float)
        near[:, :NUM_PAIRS] += 3.0 * (color_seen & shape_seen)  # absent, yet both halves are there
        yes = self._coin(0.5)
        present, absent = (counts > 0)[:, None], ((counts == 0) * near)[:, None]
        index, ok = self._choose(torch.where(yes[..., None], present, absent))
        about = self._about_property(index)
        return self._draft(index, torch.where(yes, YES, NO), ok, members=about)

    def relation(self) -> Questions:
        center, present = self.scenes.center[:, 0], self.scenes.present[:, 0]
        pair = self.scenes.color[:, 0] * NUM_SHAPES + self.scenes.shape[:, 0]  # [R, O]
        unique = present & (self.counts[:, 0].gather(1, pair) == 1)
        delta = center[:, None] - center[:, :, None]  # [R, anchor, other, 2]
        dx, dy = delta.unbind(-1)
        along = torch.stack([-dx, dx, -dy, dy], 2)  # [R, anchor, direction, other]
        across = torch.stack([dy, dy, dx, dx], 2).abs()
        itself = torch.eye(MAX_OBJECTS, dtype=torch.bool, device=self.device)
        other = (present[:, None] & ~itself)[:, :, None]
        clear = other & (along > RELATION_MIN) & (across < RELATION_CLEAR * along)
        wide = other & (along > 0) & (across < RELATION_WIDE * along)
        good = (clear.sum(-1) == 1) & (wide.sum(-1) == 1) & unique[..., None]  # [R, O, 4]
        index, ok = self._choose(good.flatten(1).float())
        anchor, side = index // 4, index % 4
        found = self._of_row(clear, anchor, side)  # [R, K, O]
        answer = PAIR_0 + self._of_row(pair, found.int().argmax(-1))
        about = found | self._only(anchor)
        fill = side * NUM_PAIRS + self._of_row(pair, anchor)
        return self._draft(fill, answer, ok, members=about[:, :, None])

    def text(self) -> Questions:
        printed = self.has_word[:, :1]
        valid = printed | self._coin(NO_WORD_SHARE)
        zero = torch.zeros_like(valid, dtype=torch.long)
        answer = torch.where(printed, WORD, NONE)
        return self._draft(zero, answer, valid, word=self.has_word[:, None])

    def quadrant(self) -> Questions:
        pair = self.scenes.color[:, 0] * NUM_SHAPES + self.scenes.shape[:, 0]
        offset = self.scenes.center[:, 0] - 0.5
        good = self.scenes.present[:, 0] & (self.counts[:, 0].gather(1, pair) == 1)
        good &= (offset.abs() > QUADRANT_MARGIN).all(-1)
        index, ok = self._choose(good.float())
        fill = self._of_row(pair, index)
        corner = (offset[..., 0] > 0).long() + 2 * (offset[..., 1] > 0)
        answer = QUADRANT_0 + self._of_row(corner, index)
        return self._draft(fill, answer, ok, members=self._about_property(fill))

    def size(self) -> Questions:
        present, radius = self.scenes.present[:, 0], self.scenes.radius[:, 0]
        big = torch.where(present, radius, 0.0).topk(2, -1)
        small = torch.where(present, radius, 9.0).topk(2, -1, largest=False)
        index = torch.stack([big.indices[:, 0], small.indices[:, 0]], 1)  # [R, 2]
        clear = torch.stack(
            [
                big.values[:, 0] > SIZE_RATIO * big.values[:, 1],
                small.values[:, 1] > SIZE_RATIO * small.values[:, 0],
            ],
            1,
        ) & (present.sum(-1, keepdim=True) > 1)
        which, ok = self._choose(clear.float())
        word, attribute = integers(self.generator, 4, 2, self.num_rows, self.num_slots) % 2
        found = self._of_row(index, which)
        color = COLOR_0 + self._of_row(self.scenes.color[:, 0], found)
        shape = SHAPE_0 + self._of_row(self.scenes.shape[:, 0], found)
        fill = (which * 2 + word) * 2 + attribute
        about = self._only(found)[:, :, None]
        return self._draft(fill, torch.where(attribute == 0, color, shape), ok, members=about)

    # -- several images ---------------------------------------------------------------------

    def _ordinal(self, image: Tensor) -> Tensor:
        """The fill index of an image: its number, or sometimes `last` where it is the last."""
        last = (image == self.num_images - 1) & self._coin(0.3)
        return torch.where(last, len(ORDINALS) - 1, image)

    def which_image(self) -> Questions:
        seen = self.counts > 0
        once = seen.sum(1) == 1  # [R, P]
        weight = torch.ones(NUM_PROPERTIES, device=self.device)
        weight[NUM_PAIRS:] = 2.0
        index, ok = self._choose(once * weight)
        answer = IMAGE_0 + self._of_row(seen.int().argmax(1), index)
        return self._draft(index, answer, ok, members=self._about_property(index))

    def text_in_image(self) -> Questions:
        image, ok = self._choose(torch.where(self.has_word, 1.0, NO_WORD_SHARE))
        answer = torch.where(self._of_row(self.has_word, image), WORD, NONE)
        word = self.has_word[:, None]
        return self._draft(self._ordinal(image), answer, ok, word=word, image=image)

    def count_in_image(self) -> Questions:
        everything = self.scenes.present.sum(-1, keepdim=True)
        counts = torch.cat([self.counts[..., NUM_PAIRS:], everything], -1)  # [R, I, 15]
        index, ok = self._choose(counts.flatten(1).clamp(max=5) + 0.3)
        image, counted = index // counts.shape[-1], index % counts.shape[-1]
        answer = NUMBER_0 + self._of_row(counts, image, counted)
        every = counted == len(COUNTED)
        about = self._about_property((NUM_PAIRS + counted).clamp(max=NUM_PROPERTIES - 1))
        about = torch.where(every[..., None, None], self.scenes.present[:, None], about)
        fill = self._ordinal(image) * counts.shape[-1] + counted
        return self._draft(fill, answer, ok, members=about)

    def color_in_image(self) -> Questions:
        single = self.counts[:, :, NUM_PAIRS:][:, :, :NUM_SHAPES] == 1  # [R, I, S]
        index, ok = self._choose(single.flatten(1).float())
        image, shape = index // NUM_SHAPES, index % NUM_SHAPES
        about = self._about_property(NUM_PAIRS + shape)
        slot = self._of_row(self.members, image, NUM_PAIRS + shape).int().argmax(-1)
        answer = COLOR_0 + self._of_row(self.scenes.color, image, slot)
        return self._draft(self._ordinal(image) * NUM_SHAPES + shape, answer, ok, members=about)

    def exist_in_image(self) -> Questions:
        seen = self.counts > 0  # [R, I, P]
        yes = self._coin(0.5)
        tempting = 1.0 + 4.0 * seen.any(1, keepdim=True)  # absent here, yet in another image
        absent = (~seen * tempting).flatten(1)[:, None]
        index, ok = self._choose(torch.where(yes[..., None], seen.flatten(1)[:, None], absent))
        image, which = index // NUM_PROPERTIES, index % NUM_PROPERTIES
        fill = self._ordinal(image) * NUM_PROPERTIES + which
        answer = torch.where(yes, YES, NO)
        return self._draft(fill, answer, ok, members=self._about_property(which))

    def all_images(self) -> Questions:
        seen = (self.counts > 0).float().mean(1)  # [R, P]: share of the images that have it
        yes = self._coin(0.5)
        weight = torch.ones(NUM_PROPERTIES, device=self.device)
        weight[NUM_PAIRS:] = 2.0
        some = (seen < 0.999) * (0.15 + (seen > 0).float()) * weight
        every = (seen > 0.999) * weight
        index, ok = self._choose(torch.where(yes[..., None], every[:, None], some[:, None]))
        fill = (self.num_images - 2) * NUM_PROPERTIES + index
        answer = torch.where(yes, YES, NO)
        return self._draft(fill, answer, ok, members=self._about_property(index))


def draw_type(drawer: QuestionDrawer, name: str) -> Questions:
    """Questions of one type; `valid` says for which rows and slots there is one."""
    draft: Callable[[], Questions] = getattr(drawer, name)
    questions = draft()
    return replace(questions, type=torch.full_like(questions.type, TYPES.index(name)))


@torch.no_grad()
def draw_questions(
    scenes: SceneBatch,
    num_images: int,
    num_slots: int,
    *,
    generator: torch.Generator,
) -> Questions:
    """`num_slots` questions a row, types drawn by weight among the valid ones."""
    kinds = [kind for kind in (SINGLE if num_images == 1 else MULTI) if kind.name != "caption"]
    drawer = QuestionDrawer(scenes, num_images, num_slots, generator)
    drafts = [draw_type(drawer, kind.name) for kind in kinds]
    weight = constant(tuple(kind.weight for kind in kinds), drawer.device)
    valid = torch.stack([draft.valid for draft in drafts], -1)
    picked = choose(valid * weight, generator)
    row = torch.arange(drawer.num_rows, device=drawer.device)[:, None]
    slot = torch.arange(num_slots, device=drawer.device)
    return Questions(
        *(
            torch.stack([getattr(draft, field.name) for draft in drafts])[picked, row, slot]
            for field in fields(Questions)
        )
    )


def caption_valid(scenes: SceneBatch, most: int) -> Tensor:
    """Which scenes can be captioned without doubt, bool `[B]`: few objects, clearly ordered."""
    x = torch.where(scenes.present, scenes.center[..., 0], 9.0).sort(1).values
    gap = x[:, 1:] - x[:, :-1]
    close = (x[:, 1:] < 2) & (gap < CAPTION_GAP)
    count = scenes.present.sum(1)
    return ~close.any(1) & (count <= most) & (count > 0)
