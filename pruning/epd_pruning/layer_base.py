"""What every method that prunes inside the decoder shares: stages, ties, raster order, one hole."""

from __future__ import annotations

from abc import ABC
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from epd_kernels.row_keep import keep_rows
from epd_kernels.text_votes import Span, Spans, row_lse, weighted_columns
from epd_pruning.errors import PruningError
from epd_pruning.schedule import Schedule
from epd_pruning.selection import stable_top_k

__all__ = ["LayerBatch", "LayerInputs", "LayerPruner", "LayerSelection"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInputs:
    """One request at one layer boundary, L rows long.

    `vision` [V] and `text` [T] int64 are rows, increasing: the vision tokens left, and the text
    after the last of them (question and template, no padding), which are the last T rows.
    `queries` [H, T, d] are those of the `text` rows, `keys` [H_kv, L, d] all keys, both after RoPE.
    `hidden` [L, D] is the layer's output. `raters` [T] bool is what `LayerPruner.choose_raters`
    said at the start. `seed` serves seeded methods.
    """

    queries: Tensor
    keys: Tensor
    vision: Tensor
    text: Tensor
    scale: float
    hidden: Tensor | None = None
    raters: Tensor | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        heads, num_text, _ = self.queries.shape
        if num_text != self.text.shape[0]:
            raise PruningError("queries", f"{self.text.shape[0]} text rows", num_text)
        if heads % self.keys.shape[0]:
            raise PruningError("keys", f"of a head count that divides {heads}", self.keys.shape[0])


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerBatch:
    """Requests at one layer boundary, packed: T rows, and Q that have a query.

    `queries` [Q, H, d] and `keys` [T, H_kv, d] are after RoPE, `is_vision` [T] bool, `hidden`
    [T, D]. `raters` [Q] fp32 is 1 / (their number) at the raters of a request. A span's voting rows
    are as many as `LayerPruner.num_voters` says; `num_vision` counts the vision rows of each.
    """

    queries: Tensor
    keys: Tensor
    is_vision: Tensor
    spans: Spans
    num_vision: tuple[int, ...]
    scale: float
    hidden: Tensor | None = None
    raters: Tensor | None = None

    @classmethod
    def of(cls, inputs: LayerInputs, num_voters: int) -> LayerBatch:
        """A batch of one, the last `num_voters` of whose text rows vote."""
        length, num_text = inputs.keys.shape[1], inputs.text.shape[0]
        is_vision = torch.zeros(length, dtype=torch.bool, device=inputs.keys.device)
        is_vision[inputs.vision] = True
        span = Span(num_text - num_voters, num_voters, 0, length)
        return cls(
            queries=inputs.queries.transpose(0, 1), keys=inputs.keys.transpose(0, 1),
            is_vision=is_vision, spans=Spans.of((span,), inputs.keys.device),
            num_vision=(inputs.vision.shape[0],), scale=inputs.scale, hidden=inputs.hidden,
            raters=None if inputs.raters is None else rater_shares(inputs.raters),
        )  # fmt: skip

    def vision_rows(self) -> Iterator[tuple[Span, Tensor]]:
        """Of each request that is to lose some: its span and its vision rows [V] in the batch."""
        for span, count in zip(self.spans.spans, self.num_vision, strict=True):
            if span.votes and span.keep < count:
                order = stable_top_k(self.is_vision[span.start : span.stop].int(), count)
                yield span, span.start + order


def rater_shares(raters: Tensor) -> Tensor:
    """The vote [T] fp32 of each text row, from whether it is a rater: they sum to one."""
    return raters.float() / raters.sum()


@dataclass(frozen=True, slots=True)
class LayerSelection:
    """`vision` [k] rows that stay, increasing; `recycled` [R, D] rows made of the dropped, if any.

    Text rows always stay. Recycled rows stand after the kept vision tokens.
    """

    vision: Tensor
    recycled: Tensor | None = None


@dataclass(frozen=True)
class LayerPruner(ABC):
    """At each stage of `schedule`: score the vision tokens by attention, keep the best.

    A subclass fills `num_voters` and `weigh` (which text rows vote, and how much), or `rate`. The
    default is the last text row, heads averaged. `reads` says whether queries and keys are those
    of the layer just run ("own") or of the one about to run ("next"), `reads_hidden` whether the
    method needs `hidden`, `has_raters` whether it chooses raters at the embeddings.
    """

    name: ClassVar[str]
    reads: ClassVar[Literal["own", "next"]] = "own"
    reads_hidden: ClassVar[bool] = False
    has_raters: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Schedule]] = {}

    schedule: Schedule

    def num_voters(self, num_text: int) -> int:
        """How many of `num_text` text rows vote: the last ones."""
        return min(num_text, 1)

    def weigh(self, batch: LayerBatch, lse: Tensor) -> Tensor:
        """Votes [H, Q] of each head and voting row; equal ones by default."""
        return torch.full((1, 1), 1 / lse.shape[0], device=lse.device).expand(lse.shape)

    def rate(self, batch: LayerBatch) -> Tensor:
        """Importance of the vision rows as parts [P, T], fp32, to be added: weighted attention."""
        lse = row_lse(batch.queries, batch.keys, batch.spans, scale=batch.scale)
        weights = self.weigh(batch, lse)
        return weighted_columns(
            batch.queries, batch.keys, lse, weights, batch.spans, scale=batch.scale
        )

    def keep_rows(self, batch: LayerBatch, num_rows: int) -> tuple[Tensor, Tensor]:
        """The rows [num_rows] of `batch` that stay, as its spans tell, and which are vision."""
        return keep_rows(self.rate(batch), batch.is_vision, batch.spans, num_rows=num_rows)

    def score(self, inputs: LayerInputs) -> Tensor:
        """Importance [V] of the vision tokens of one request."""
        batch = LayerBatch.of(inputs, self.num_voters(inputs.text.shape[0]))
        return self.rate(batch).sum(0)[inputs.vision]

    def order(self, inputs: LayerInputs, num_kept: int) -> Tensor:
        """Indices [≥ num_kept] into `inputs.vision`, best first."""
        return stable_top_k(self.score(inputs), num_kept)

    def choose_raters(self, vision: Tensor, text: Tensor) -> Tensor | None:
        """Which text tokens vote, [T] bool, from embeddings [V, D] and [T, D]; None: not asked."""
        return None

    def select(self, inputs: LayerInputs, stage: int, num_tokens: int) -> LayerSelection:
        """What stays after `stage`, of an image part that entered the decoder with `num_tokens`.

        Without text, or with no more tokens than the stage keeps, everything stays.
        """
        num_kept = self.schedule.kept(num_tokens)[stage]
        if num_kept >= inputs.vision.shape[0] or inputs.text.shape[0] == 0:
            return LayerSelection(inputs.vision)
        return self.finish(inputs, self.order(inputs, num_kept), num_kept)

    def finish(self, inputs: LayerInputs, order: Tensor, num_kept: int) -> LayerSelection:
        """The first `num_kept` of `order`; a recycling method makes its rows of the others."""
        return LayerSelection(inputs.vision[order[:num_kept].sort().values])

    def macs(self, *, num_text: int, num_vision: int, num_heads: int, head_dim: int) -> int:
        """Multiply-accumulates of one stage on top of an attention kernel that gives the lse."""
        return num_heads * head_dim * num_vision
