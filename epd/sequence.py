"""One request in the engine: its tokens, how far they are computed, what it owns. No tensors."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from epd.errors import EPDError, InvalidRequestError
from epd.kv.blocks import BlockTable, ImageSpan
from epd.request import SamplingParams
from epd.step import KeptTokens, PrefillDone, SequenceFailure
from epd_pruning.schedule import Schedule

__all__ = [
    "Sequence", "SequenceState", "expand_images", "place_kept", "prefill_done", "sequence_failure",
]  # fmt: skip


class SequenceState(Enum):
    """Where a sequence stands. HELD waits for a decode worker, RESERVED for its KV to arrive."""

    WAITING = auto()
    RUNNING = auto()
    RESERVED = auto()
    HELD = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False, kw_only=True)
class Sequence:
    """A request being served. `tokens` is the expanded prompt followed by the output tokens.

    The first `num_computed` tokens have passed the decoder; `next_pos` is the position of the one
    after them and is carried here, because pruned layer groups hold fewer keys than positions.
    `positions` are those of the prompt where pruning left gaps, empty without; every later token
    stands `shift` positions after its place in `tokens`. Where layers prune, `schedule` says how
    much, and `dropped` how many vision tokens each layer group lacks (empty: none does).
    """

    request_id: str
    attempt: int
    tokens: list[int]
    num_prompt: int
    spans: tuple[ImageSpan, ...] = ()
    sampling: SamplingParams
    salt: str = ""
    deadline: float | None = None
    handoff: bool = False
    adopted: bool = False
    arrival: int = 0
    arrived_at: float = 0.0
    started_at: float | None = None
    state: SequenceState = SequenceState.WAITING
    table: BlockTable | None = None
    hashes: list[bytes] = field(default_factory=list)
    num_computed: int = 0
    next_pos: int = 0
    positions: list[int] = field(default_factory=list)
    shift: int = 0
    image_tokens_before: int = 0
    schedule: Schedule | None = None
    dropped: tuple[int, ...] = ()
    num_cached: int = 0
    prefilled: bool = False

    @property
    def num_remaining(self) -> int:
        """Tokens still to compute before the next one can be sampled; 1 while decoding."""
        return len(self.tokens) - self.num_computed

    @property
    def num_output(self) -> int:
        """Output tokens so far, those of earlier attempts included: the next token's index."""
        return len(self.tokens) - self.num_prompt

    @property
    def output_token_ids(self) -> list[int]:
        """A copy of the output tokens."""
        return self.tokens[self.num_prompt :]

    @property
    def image_tokens(self) -> int:
        """Prompt positions that images fill."""
        return sum(span.stop - span.start for span in self.spans)

    @property
    def end_pos(self) -> int:
        """One more than the position of the last of `tokens`."""
        return len(self.tokens) + self.shift

    @property
    def shares(self) -> bool:
        """Whether its blocks may be named as prefixes: every group holds every token, from here."""
        return not (self.adopted or self.dropped)

    @property
    def text_after_images(self) -> int:
        """Prompt tokens after the last image; 0 without images."""
        return self.num_prompt - self.spans[-1].stop if self.spans else 0

    def upcoming(self, count: int) -> list[int] | range:
        """Positions of the next `count` tokens to compute."""
        start, stop = self.num_computed, self.num_computed + count
        if start >= len(self.positions):
            return range(self.next_pos, self.next_pos + count)
        placed = self.positions[start:stop]
        return [*placed, *range(start + len(placed) + self.shift, stop + self.shift)]

    def move_to(self, num_computed: int) -> None:
        """Note that the first `num_computed` tokens have passed the decoder."""
        placed = num_computed < len(self.positions)
        self.num_computed = num_computed
        self.next_pos = self.positions[num_computed] if placed else num_computed + self.shift

    def restart(self) -> None:
        """Forget everything computed, so that all tokens are computed again."""
        self.move_to(0)
        self.state = SequenceState.WAITING


def prefill_done(sequence: Sequence, now: float) -> PrefillDone:
    """What is told of a prompt that was computed by `now`."""
    assert sequence.started_at is not None
    return PrefillDone(
        request_id=sequence.request_id, attempt=sequence.attempt,
        prompt_tokens=sequence.num_prompt, image_tokens=sequence.image_tokens,
        cached_tokens=sequence.num_cached,
        queue_seconds=sequence.started_at - sequence.arrived_at,
        prefill_seconds=now - sequence.started_at,
        image_tokens_before=sequence.image_tokens_before,
    )  # fmt: skip


def sequence_failure(sequence: Sequence, error: Exception) -> SequenceFailure:
    """What is told of a request that ended in `error`; of an unknown one nothing but that."""
    known = isinstance(error, EPDError)
    return SequenceFailure(
        sequence.request_id, sequence.attempt,
        error.code if isinstance(error, EPDError) else "internal_error",
        str(error) if known else "the model failed on this request",
    )  # fmt: skip


def expand_images(
    tokens: list[int], image_token_id: int | None, keys: list[str], lengths: list[int]
) -> tuple[list[int], tuple[ImageSpan, ...]]:
    """`tokens` with the i-th placeholder repeated `lengths[i]` times, and the spans they fill.

    Raises `InvalidRequestError` unless there is one placeholder, one key and one length per image.
    """
    slots = [i for i, token in enumerate(tokens) if token == image_token_id]
    if not len(slots) == len(keys) == len(lengths):
        raise InvalidRequestError(
            f"the prompt has {len(slots)} image placeholders for {len(lengths)} images", "messages"
        )
    expanded: list[int] = []
    spans: list[ImageSpan] = []
    done = 0
    for slot, key, length in zip(slots, keys, lengths, strict=True):
        expanded += tokens[done:slot]
        spans.append(ImageSpan(len(expanded), len(expanded) + length, key))
        expanded += [tokens[slot]] * length
        done = slot + 1
    return expanded + tokens[done:], tuple(spans)


def place_kept(
    num_prompt: int, spans: tuple[ImageSpan, ...], kept: list[KeptTokens | None]
) -> tuple[list[int], int]:
    """Positions of the prompt when every survivor stays where it stood, and the shift after it.

    `spans` are those of the pruned prompt. Without gaps the positions are empty.
    """
    positions: list[int] = []
    shift = done = 0
    for span, tokens in zip(spans, kept, strict=True):
        positions.extend(range(done + shift, span.start + shift))
        first, done = span.start + shift, span.stop
        if tokens is None:
            positions.extend(range(first, done + shift))
        else:
            positions.extend(first + index for index in tokens.keep_indices)
            shift += tokens.num_tokens - len(tokens.keep_indices)
    positions.extend(range(done + shift, num_prompt + shift))
    return (positions, shift) if shift else ([], 0)
