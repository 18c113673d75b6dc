"""What goes into an engine core and what one step brings, without tensors."""

from __future__ import annotations

from dataclasses import dataclass, field

from epd.request import FinishReason, SamplingParams, TokenOutput

__all__ = [
    "CoreStats",
    "KeptTokens",
    "NewSequence",
    "PrefillDone",
    "SequenceFailure",
    "SequenceToken",
    "StepResult",
]


@dataclass(frozen=True, slots=True)
class KeptTokens:
    """What is left of an image of `num_tokens`: `keep_indices`, increasing.

    `digest` names how they were made, where that changes the tokens themselves; with the indices it
    enters the names of prefix blocks.
    """

    num_tokens: int
    keep_indices: list[int]
    digest: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewSequence:
    """A request to compute: one placeholder in the prompt and one content key per image.

    `output_token_ids` is what an earlier attempt produced: generation continues after it with the
    same token indices. With `handoff` the core stops after the first new token and holds the KV.
    `deadline` is on the core's clock; work that still waits then never starts.

    `kept` says per image what pruning left of it (None: everything); empty, nothing was pruned.
    `positions` "keep" leaves every survivor and all text where it stood, "renumber" closes the
    gaps. `layer_keep` prunes inside the decoder as well: vision tokens per image that a layer
    processes on average, a count or a share of the image.
    """

    request_id: str
    attempt: int
    prompt_token_ids: list[int]
    image_token_id: int | None
    mm_keys: list[str]
    sampling: SamplingParams
    output_token_ids: list[int] = field(default_factory=list)
    salt: str = ""
    deadline: float | None = None
    handoff: bool = False
    kept: list[KeptTokens | None] = field(default_factory=list)
    positions: str = "keep"
    layer_keep: int | float | None = None


@dataclass(frozen=True, slots=True)
class SequenceToken:
    """One new token; `finish_reason` is set on the last one."""

    request_id: str
    attempt: int
    output: TokenOutput
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class SequenceFailure:
    """A request that ended in an error; everything it owned is freed."""

    request_id: str
    attempt: int
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class PrefillDone:
    """A prompt was computed. Token counts cover the expanded prompt; times are in seconds.

    `image_tokens` entered the decoder, out of `image_tokens_before` that the encoder made.
    """

    request_id: str
    attempt: int
    prompt_tokens: int
    image_tokens: int
    cached_tokens: int
    queue_seconds: float
    prefill_seconds: float
    image_tokens_before: int = 0


@dataclass(slots=True)
class StepResult:
    """What one step brought. `handoffs` are held for `offer`; `evicted` must run elsewhere."""

    tokens: list[SequenceToken] = field(default_factory=list)
    handoffs: list[str] = field(default_factory=list)
    evicted: list[str] = field(default_factory=list)
    failed: list[SequenceFailure] = field(default_factory=list)
    prefilled: list[PrefillDone] = field(default_factory=list)
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class CoreStats:
    """Sequences per state, blocks, and running totals. Prefix counts are in tokens.

    `kv_fallbacks` layers hold KV less coarsely than was asked for.
    """

    waiting: int
    running: int
    reserved: int
    held: int
    blocks_total: int
    blocks_free: int
    prefix_hits: int
    prefix_queries: int
    preemptions: int
    kv_fallbacks: int = 0
