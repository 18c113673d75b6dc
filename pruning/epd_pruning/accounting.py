"""Honest counts: tokens in every layer, multiply-accumulates, bytes of keys and values.

All counts of work are MACs; published tables that print FLOPs of a prefill mean these, except
Script's figure, which prints twice as much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from epd_pruning.schedule import Schedule

__all__ = ["DecoderShape", "TokenCounts", "count_tokens", "kv_bytes", "prefill_macs"]


@dataclass(frozen=True, slots=True)
class DecoderShape:
    """A decoder's sizes; `gated` is a SwiGLU-like feed-forward of three matrices instead of two."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    gated: bool = True


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Vision tokens of one request. `actual` entered the decoder, whatever the nominal budget.

    `processed` per layer is what that layer computed and stored. `booked` counts a pruning layer at
    its length afterwards, as the published "average tokens" do; it flatters by up to a third.
    """

    actual: int
    processed: tuple[int, ...]
    booked: tuple[int, ...]

    @property
    def processed_average(self) -> float:
        return sum(self.processed) / len(self.processed)

    @property
    def booked_average(self) -> float:
        return sum(self.booked) / len(self.booked)


def count_tokens(num_tokens: int, num_layers: int, schedule: Schedule | None = None) -> TokenCounts:
    """Counts when `num_tokens` vision tokens (rows that are always kept included) enter."""
    if schedule is None:
        every_layer = (num_tokens,) * num_layers
        return TokenCounts(num_tokens, every_layer, every_layer)
    processed = schedule.lengths(num_tokens, num_layers)
    booked = schedule.lengths(num_tokens, num_layers, booked=True)
    return TokenCounts(num_tokens, processed, booked)


def prefill_macs(shape: DecoderShape, lengths: Sequence[int]) -> int:
    """MACs of a prefill whose layer ℓ runs `lengths`[ℓ] positions n; no embedding, no LM head.

    Per layer n·d·d_h·(2h + 2h_kv) for the projections, 2n²·h·d_h for the full attention map (as the
    papers count it, the causal half included) and 3n·d·m, or 2n·d·m ungated, for the feed-forward.
    """
    width, head = shape.hidden_size, shape.head_dim
    projections = width * head * 2 * (shape.num_heads + shape.num_kv_heads)
    feed_forward = (3 if shape.gated else 2) * width * shape.intermediate_size
    attention = 2 * shape.num_heads * head
    return sum(n * (projections + feed_forward) + n * n * attention for n in lengths)


def kv_bytes(shape: DecoderShape, lengths: Sequence[int], *, bytes_per_element: float = 2.0) -> int:
    """Bytes of keys and values when layer ℓ holds `lengths`[ℓ] positions."""
    per_token = 2 * shape.num_kv_heads * shape.head_dim * bytes_per_element
    return round(per_token * sum(lengths))
