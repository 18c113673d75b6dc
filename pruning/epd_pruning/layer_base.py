"""What every method that prunes inside the decoder shares: stages, ties, raster order, one hole."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from epd_pruning.attention import attention_lse, weighted_attention
from epd_pruning.errors import PruningError
from epd_pruning.schedule import Schedule
from epd_pruning.selection import stable_top_k

__all__ = ["LayerInputs", "LayerPruner", "LayerSelection"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerInputs:
    """One request at one layer boundary, L rows long.

    `vision` [V] and `text` [T] int64 are rows, increasing: the vision tokens left, and every text
    token after the last of them (question and template, no padding). `queries` [H, T, d] are those
    of the `text` rows, `keys` [H_kv, L, d] all keys, both after RoPE; `lse` [H, T] if the attention
    kernel gave it. `hidden` [L, D] is the layer's output. `raters` [T] bool is what
    `LayerPruner.choose_raters` said at the start. `seed` serves seeded methods.
    """

    queries: Tensor
    keys: Tensor
    vision: Tensor
    text: Tensor
    scale: float
    lse: Tensor | None = None
    hidden: Tensor | None = None
    raters: Tensor | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        heads, num_text, _ = self.queries.shape
        if num_text != self.text.shape[0]:
            raise PruningError("queries", f"{self.text.shape[0]} text rows", num_text)
        if heads % self.keys.shape[0]:
            raise PruningError("keys", f"of a head count that divides {heads}", self.keys.shape[0])

    def row_lse(self) -> Tensor:
        """The log-sum-exp [H, T] of the text rows, computed where no kernel gave it."""
        if self.lse is not None:
            return self.lse
        return attention_lse(self.queries, self.keys, self.text, self.scale)

    def last_text(self, count: int) -> LayerInputs:
        """The same boundary with only the last `count` text rows asking."""
        if count >= self.text.shape[0]:
            return self
        return replace(
            self,
            queries=self.queries[:, -count:],
            text=self.text[-count:],
            lse=None if self.lse is None else self.lse[:, -count:],
            raters=None if self.raters is None else self.raters[-count:],
        )


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

    A subclass fills `voters` and `weights` (which text rows vote, and how much), or `order`. The
    default is the last text row, heads averaged. `reads` says whether queries and keys are those
    of the layer just run ("own") or of the one about to run ("next"), `reads_hidden` whether the
    method needs `hidden`.
    """

    name: ClassVar[str]
    reads: ClassVar[Literal["own", "next"]] = "own"
    reads_hidden: ClassVar[bool] = False
    presets: ClassVar[Mapping[str, Schedule]] = {}

    schedule: Schedule

    def voters(self, inputs: LayerInputs) -> LayerInputs:
        """The same boundary with the text rows that vote."""
        return inputs.last_text(1)

    def weights(self, inputs: LayerInputs) -> Tensor:
        """Votes [H, T] of each head and voting row; their mean by default."""
        votes = inputs.queries.shape[:2]
        return torch.full(votes, 1 / votes.numel(), device=inputs.queries.device)

    def score(self, inputs: LayerInputs) -> Tensor:
        """Importance [V], fp32: the attention each vision token receives, weighted by the votes."""
        voting = self.voters(inputs)
        voting = replace(voting, lse=voting.row_lse())
        return weighted_attention(
            voting.queries,
            voting.keys,
            voting.vision,
            voting.row_lse(),
            self.weights(voting),
            voting.scale,
        )

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
        return self.choose_all([inputs], [self.schedule.kept(num_tokens)[stage]])[0]

    def choose_all(
        self, inputs: Sequence[LayerInputs], num_kept: Sequence[int]
    ) -> list[LayerSelection]:
        """What stays of each request at one boundary when it may keep `num_kept` of its tokens."""
        return [self._choose(one, count) for one, count in zip(inputs, num_kept, strict=True)]

    def _choose(self, inputs: LayerInputs, num_kept: int) -> LayerSelection:
        if num_kept >= inputs.vision.shape[0] or inputs.text.shape[0] == 0:
            return LayerSelection(inputs.vision)
        return self.finish(inputs, self.order(inputs, num_kept), num_kept)

    def finish(self, inputs: LayerInputs, order: Tensor, num_kept: int) -> LayerSelection:
        """The first `num_kept` of `order`; a recycling method makes its rows of the others."""
        return LayerSelection(inputs.vision[order[:num_kept].sort().values])

    def macs(self, *, num_text: int, num_vision: int, num_heads: int, head_dim: int) -> int:
        """Multiply-accumulates of one stage on top of an attention kernel that gives the lse."""
        return num_heads * head_dim * num_vision
