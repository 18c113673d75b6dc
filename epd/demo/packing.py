"""Writes questions as token rows and packs many of them behind one shared image prefix.

A training row is `<s>USER: ` + vision tokens (+ a newline and the next image's) followed by slots.
A slot holds one question with its answer; it sees the prefix and itself, never another slot, and
its positions continue the prefix, so each slot is exactly a prompt of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from epd.demo.questions import WORD, Questions
from epd.demo.scenes import constant
from epd.demo.wording import ANSWERS, MULTI, PROPERTIES, SINGLE, TYPES, prompts_of
from epd.demo.world import CHARS, COLORS, MAX_CAPTION_OBJECTS, MAX_CHARS, SHAPES, with_article

if TYPE_CHECKING:
    from epd.demo.scenes import SceneBatch

IGNORED = -100
PROMPT_START, IMAGE_BREAK, PROMPT_END = "USER: ", "\n", " ASSISTANT:"


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of a packed row, in tokens. The tail is the caption slot, or unused padding."""

    num_images: int
    image_tokens: int
    start_tokens: int
    num_slots: int
    slot_length: int
    tail_length: int

    @property
    def prefix_length(self) -> int:
        """Tokens before the first slot: the start, the images and one break between images."""
        return self.start_tokens + self.num_images * (self.image_tokens + 1) - 1

    @property
    def length(self) -> int:
        """Tokens of the whole row."""
        return self.prefix_length + self.num_slots * self.slot_length + self.tail_length

    def image_span(self, image: int) -> slice:
        """Where the vision tokens of one image lie."""
        first = self.start_tokens + image * (self.image_tokens + 1)
        return slice(first, first + self.image_tokens)

    def positions(self) -> Tensor:
        """Position ids `[length]`: every slot continues the prefix."""
        slots = torch.arange(self.slot_length).repeat(self.num_slots)
        after = torch.cat([slots, torch.arange(self.tail_length)])
        return torch.cat([torch.arange(self.prefix_length), after + self.prefix_length])

    def mask(self) -> Tensor:
        """Who may attend to whom, bool `[length, length]`: causal, and slots apart."""
        slots = torch.arange(self.num_slots).repeat_interleave(self.slot_length) + 1
        tail = torch.full((self.tail_length,), self.num_slots + 1)
        segment = torch.cat([torch.zeros(self.prefix_length, dtype=torch.long), slots, tail])
        causal = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        return causal & ((segment == 0) | (segment[:, None] == segment))


ALIGNMENT = 16
"""Row lengths are a multiple of this: masked attention kernels are fast only then."""


class TokenTables:
    """Every prompt and fixed answer, tokenised once, on the device."""

    def __init__(self, tokenizer: Any, device: torch.device | str) -> None:
        self.tokenizer, self.device = tokenizer, torch.device(device)
        self.bos, self.eos = int(tokenizer.bos_token_id), int(tokenizer.eos_token_id)
        self.pad = int(tokenizer.pad_token_id)
        self.start = [self.bos, *self.encode(PROMPT_START)]
        self.image_break = self.encode(IMAGE_BREAK)
        self.prompts: list[str] = []
        offsets, wordings = [], []
        by_name = {kind.name: kind for kind in SINGLE + MULTI}
        for name in TYPES:
            rows = prompts_of(by_name[name])
            offsets.append(len(self.prompts))
            wordings.append(len(rows[0]))
            self.prompts += [prompt for row in rows for prompt in row]
        self.offsets = torch.tensor(offsets, device=self.device)
        self.wordings = torch.tensor(wordings, device=self.device)
        self.prompt, self.prompt_length = self._table(
            [self.encode(IMAGE_BREAK + prompt + PROMPT_END) for prompt in self.prompts]
        )
        self.answer, self.answer_length = self._table(
            [[*self.encode(" " + answer), self.eos] for answer in ANSWERS], MAX_CHARS + 2
        )
        self.query, _ = self._table(
            [[self.bos, *self.encode(text), self.eos] for text in (*self.prompts, *PROPERTIES)]
        )
        self.chars = torch.tensor([self._single(char) for char in CHARS], device=self.device)
        self.objects = torch.tensor(
            [
                [self._single(" " + word) for word in with_article(f"{color} {shape}").split()]
                for color in COLORS
                for shape in SHAPES
            ],
            device=self.device,
        )
        self.word_start = self._single(" ")
        self.comma, self.conjunction, self.dot = map(self._single, (",", " and", "."))
        self.text_intro = [self._single(" the"), self._single(" text")]
        self.slot_length = int(self.prompt_length.max()) + MAX_CHARS + 2
        caption = TYPES.index("caption")
        captions = self.prompt_length[offsets[caption] : offsets[caption] + wordings[caption]]
        self.caption_length = int(captions.max()) + 4 * MAX_CAPTION_OBJECTS + 3 + MAX_CHARS + 3

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _single(self, text: str) -> int:
        ids = self.encode(text)
        if len(ids) != 1:
            raise ValueError(f"the tokenizer splits {text!r} into {len(ids)} tokens; one is needed")
        return ids[0]

    def _table(self, rows: list[list[int]], width: int = 0) -> tuple[Tensor, Tensor]:
        """Rows padded on the right, and their lengths."""
        width = max(width, *map(len, rows))
        table = torch.tensor([row + [self.pad] * (width - len(row)) for row in rows])
        lengths = torch.tensor([len(row) for row in rows])
        return table.to(self.device), lengths.to(self.device)

    def layout(self, num_images: int, image_tokens: int, num_slots: int) -> Layout:
        """The packed row for so many images; only single images have a caption slot."""
        tail = self.caption_length if num_images == 1 else 0
        layout = Layout(
            num_images, image_tokens, len(self.start), num_slots, self.slot_length, tail
        )
        return replace(layout, tail_length=tail + -layout.length % ALIGNMENT)

    def draw_prompts(self, kinds: Tensor, fills: Tensor, generator: torch.Generator) -> Tensor:
        """Rows of `prompts`: a wording drawn for each question."""
        share = torch.rand(kinds.shape, generator=generator, device=self.device)
        wording = (share * self.wordings[kinds]).long()
        return self.offsets[kinds] + fills * self.wordings[kinds] + wording

    def words(self, scenes: SceneBatch) -> tuple[Tensor, Tensor]:
        """Answer tokens `[B, MAX_CHARS + 2]` that spell each word, and their number."""
        at = torch.arange(MAX_CHARS + 2, device=self.device)[None]
        length = scenes.word_length[:, None]
        spelled = self.chars[scenes.word].gather(
            1, (at - 1).clamp(0, MAX_CHARS - 1).expand(len(scenes.word), -1)
        )
        after = torch.where(at == length + 1, self.eos, self.pad)
        tokens = torch.where(at <= length, spelled, after)
        tokens[:, 0] = self.word_start
        return tokens, scenes.word_length + 2

    def answers(self, questions: Questions, scenes: SceneBatch) -> tuple[Tensor, Tensor]:
        """Answer tokens `[R, K, MAX_CHARS + 2]` with the end token, and their number."""
        num_rows, num_images = questions.about.shape[0], questions.about.shape[2]
        row = torch.arange(num_rows, device=self.device)[:, None]
        words, word_length = self.words(scenes)
        flat = row * num_images + questions.image
        fixed = questions.answer.clamp(max=len(ANSWERS) - 1)
        spelled = questions.answer == WORD
        tokens = torch.where(spelled[..., None], words[flat], self.answer[fixed])
        return tokens, torch.where(spelled, word_length[flat], self.answer_length[fixed])

    def captions(self, scenes: SceneBatch) -> tuple[Tensor, Tensor]:
        """Caption tokens `[B, L]` with the end token, and their number; objects from left to right.

        Every item has a fixed place in a long row; a stable sort of the places in use closes gaps.
        """
        batch, most = len(scenes.shape), scenes.shape.shape[1]
        x = torch.where(scenes.present, scenes.center[..., 0], 9.0)
        order = x.argsort(1)
        pair = (scenes.color * len(SHAPES) + scenes.shape).gather(1, order)
        item = self.objects[pair]  # [B, O, 3]
        count, printed = scenes.present.sum(1), scenes.has_word()
        last = count + printed.long() - 1
        number = torch.arange(most, device=self.device)
        separator = torch.where(number == last[:, None], self.conjunction, self.comma)
        listed = torch.cat([separator[..., None], item], 2).flatten(1)
        shown = (number < count[:, None])[..., None].expand(-1, -1, 4).clone()
        shown[:, 0, 0] = False
        words, word_length = self.words(scenes)
        fixed = constant((self.conjunction, *self.text_intro), self.device)
        tail = constant((self.dot, self.eos), self.device).expand(batch, -1)
        spelled = words[:, : MAX_CHARS + 1]
        at = torch.arange(MAX_CHARS + 1, device=self.device)
        tokens = torch.cat([listed, fixed.expand(batch, -1), spelled, tail], 1)
        used = torch.cat(
            [
                shown.flatten(1),
                printed[:, None].expand(-1, 3),
                printed[:, None] & (at < (word_length - 1)[:, None]),
                torch.ones_like(tail, dtype=torch.bool),
            ],
            1,
        )
        packed = tokens.gather(1, (~used).long().argsort(dim=1, stable=True))
        length = used.sum(1)
        inside = torch.arange(packed.shape[1], device=self.device) < length[:, None]
        return torch.where(inside, packed, self.pad), length

    def segments(
        self, prompt: Tensor, answer: Tensor, answer_length: Tensor, *, width: int
    ) -> tuple[Tensor, Tensor]:
        """Tokens of prompt and answer `[..., width]`, and labels: the answer's tokens only."""
        tokens, start = self.prompt[prompt], self.prompt_length[prompt][..., None]
        at = torch.arange(width, device=self.device).expand(*prompt.shape, width)
        asked = tokens.gather(-1, at.clamp(max=tokens.shape[-1] - 1))
        told = answer.gather(-1, (at - start).clamp(0, answer.shape[-1] - 1))
        end = start + answer_length[..., None]
        tokens = torch.where(at < start, asked, torch.where(at < end, told, self.pad))
        return tokens, torch.where((at >= start) & (at < end), tokens, IGNORED)
