"""One training batch: pictures, packed questions, and everything the losses compare with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epd.demo.dropping import draw_dpp_counts, draw_kept, draw_visible
from epd.demo.packing import IGNORED, Layout, TokenTables
from epd.demo.questions import caption_valid, draw_questions
from epd.demo.render import render
from epd.demo.scenes import PatchLabels, SceneBatch, choose, draw_scenes, label_patches
from epd.demo.wording import TYPES
from epd.demo.world import CHARS, MAX_CAPTION_OBJECTS, MAX_OBJECTS

QUERIES_PER_IMAGE = 3


@dataclass(frozen=True, slots=True)
class Mix:
    """Rows of one, two and three images in a batch, and questions in each row."""

    single_rows: int = 128
    pair_rows: int = 32
    triple_rows: int = 22
    single_slots: int = 6
    multi_slots: int = 8

    @property
    def num_images(self) -> int:
        """Images in a batch."""
        return self.single_rows + 2 * self.pair_rows + 3 * self.triple_rows

    def groups(self) -> list[tuple[int, int, int]]:
        """Images per row, rows, and questions per row of each group."""
        return [
            (1, self.single_rows, self.single_slots),
            (2, self.pair_rows, self.multi_slots),
            (3, self.triple_rows, self.multi_slots),
        ]


@dataclass(frozen=True, slots=True)
class Pack:
    """The packed rows of one layout; their images are consecutive, starting at `first_image`."""

    layout: Layout
    first_image: int
    tokens: Tensor  # [R, S] int64, everything after the prefix
    labels: Tensor  # [R, S] int64
    kinds: Tensor  # [R, K] int64
    visible: Tensor | None  # [R, K, N] bool


@dataclass(frozen=True, slots=True)
class Batch:
    """`M` images with all that is asked of them."""

    images: Tensor  # [M, 3, H, W] uint8
    packs: tuple[Pack, ...]
    scenes: SceneBatch
    patches: PatchLabels
    dropping: bool
    kept: Tensor  # [M, N] bool
    dpp_counts: Tensor  # [ceil(M / DPP_STRIDE)] int64
    queries: Tensor  # [M, 3] rows of TokenTables.query: two questions and one phrase
    query_patches: Tensor  # [M, 3, N] bool: the patches each query is about
    phrase_seen: Tensor  # [M, M] float: does image m contain phrase n?


@torch.no_grad()
def draw_batch(
    mix: Mix,
    tables: TokenTables,
    *,
    glyphs: Tensor,
    grid: int,
    drop_share: float,
    generator: torch.Generator,
) -> Batch:
    """A batch that depends on nothing but its arguments and the generator's state."""
    scenes = draw_scenes(mix.num_images, generator, num_fonts=glyphs.shape[0])
    images = render(scenes, glyphs, generator)
    patches = label_patches(scenes, grid)
    kept, complete = draw_kept(patches, drop_share, generator)
    packs, queries, abouts = [], [], []
    first = 0
    for num_images, num_rows, num_slots in mix.groups():
        if num_rows == 0:
            continue
        last = first + num_images * num_rows
        part = scenes.take(slice(first, last))
        layout = tables.layout(num_images, grid * grid, num_slots)
        pack, prompts, about = _draw_pack(part, layout, tables, generator)
        if num_images == 1:
            labels = type(patches)(patches.obj[first:last], patches.char[first:last])
            shown = draw_visible(
                labels, about[:, :, 0], complete=complete[first:last], generator=generator
            )
            pack = Pack(layout, first, pack.tokens, pack.labels, pack.kinds, shown)
        else:
            pack = Pack(layout, first, pack.tokens, pack.labels, pack.kinds, None)
        packs.append(pack)
        queries.append(prompts[:, :2].repeat_interleave(num_images, 0))
        abouts.append(about[:, :2].transpose(1, 2).flatten(0, 1))
        first = last
    phrase, members, seen = _draw_phrases(scenes, generator)
    about = torch.cat([torch.cat(abouts), members[:, None]], 1)
    return Batch(
        images,
        tuple(packs),
        scenes,
        patches,
        drop_share > 0,
        kept,
        draw_dpp_counts(complete, generator),
        torch.cat([torch.cat(queries), phrase[:, None] + len(tables.prompts)], 1),
        _about_patches(about, patches),
        seen,
    )


def _draw_pack(
    scenes: SceneBatch, layout: Layout, tables: TokenTables, generator: torch.Generator
) -> tuple[Pack, Tensor, Tensor]:
    """The rows of one layout, their prompts `[R, K]` and what they are about `[R, K, I, O + 1]`."""
    questions = draw_questions(scenes, layout.num_images, layout.num_slots, generator=generator)
    prompts = tables.draw_prompts(questions.type, questions.fill, generator)
    answer, length = tables.answers(questions, scenes)
    tokens, labels = tables.segments(prompts, answer, length, width=layout.slot_length)
    labels = torch.where(questions.valid[..., None], labels, IGNORED)
    num_rows = tokens.shape[0]
    if layout.num_images == 1:
        kind = torch.full((num_rows,), TYPES.index("caption"), device=tables.device)
        asked = tables.draw_prompts(kind, torch.zeros_like(kind), generator)
        caption, length = tables.captions(scenes)
        tail, told = tables.segments(asked, caption, length, width=layout.tail_length)
        told = torch.where(caption_valid(scenes, MAX_CAPTION_OBJECTS)[:, None], told, IGNORED)
    else:
        tail = torch.full((num_rows, layout.tail_length), tables.pad, device=tables.device)
        told = torch.full_like(tail, IGNORED)
    pack = Pack(
        layout,
        0,
        torch.cat([tokens.flatten(1), tail], 1),
        torch.cat([labels.flatten(1), told], 1),
        questions.type,
        None,
    )
    return pack, prompts, questions.about


def _draw_phrases(scenes: SceneBatch, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """A property of each image, its objects `[M, O + 1]`, and which images have it `[M, M]`."""
    members = scenes.property_members()
    counts = members.sum(-1)
    phrase = choose((counts > 0).float(), generator)
    rows = torch.arange(len(phrase), device=counts.device)
    about = members[rows, phrase]
    about = torch.cat([about, torch.zeros_like(about[:, :1])], 1)
    return phrase, about, (counts[:, phrase] > 0).float()


def _about_patches(about: Tensor, patches: PatchLabels) -> Tensor:
    """`about` `[M, Q, O + 1]` spread over the patches, bool `[M, Q, N]`."""
    extended = torch.cat([about, torch.zeros_like(about[..., :1])], -1)
    owner = torch.where(patches.obj < MAX_OBJECTS, patches.obj, MAX_OBJECTS + 1)
    owner = torch.where(patches.char < len(CHARS), MAX_OBJECTS, owner)
    return extended.gather(2, owner[:, None].expand(-1, about.shape[1], -1))
