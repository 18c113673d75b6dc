"""What one forward pass needs to know besides its tokens: where each sequence's KV lies.

Layers are grouped, because in-prefill pruning leaves different KV lengths in different layer
ranges; with nothing pruned there is one group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from epd_kernels import QuantKV

__all__ = ["AttentionBatch", "ForwardContext", "LayerCaches", "Tap"]


class LayerCaches(Protocol):
    """A paged KV pool, as the decoder sees it."""

    def layer(self, index: int) -> tuple[torch.Tensor | QuantKV, torch.Tensor | QuantKV]:
        """K and V caches of one layer, each `[num_blocks, block_size, num_kv_heads, head_dim]`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBatch:
    """S sequences with T packed tokens, as one layer group sees them.

    `cu_seqlens_q` int32 `[S + 1]`; `seq_lens` int32 `[S]`, the KV length including this step's
    tokens; `block_tables` int32 `[S, B]`; `slot_mapping` int64 `[T]`, where each token's KV goes.
    """

    cu_seqlens_q: torch.Tensor
    seq_lens: torch.Tensor
    block_tables: torch.Tensor
    slot_mapping: torch.Tensor
    max_seqlen_q: int
    max_seqlen_k: int


@dataclass(slots=True)
class Tap:
    """Where `layer` leaves its queries `[T, heads, d]` and keys `[T, kv_heads, d]`, after RoPE."""

    layer: int
    queries: torch.Tensor | None = None
    keys: torch.Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardContext:
    """Layer i attends through `groups[layer_group[i]]` and writes `kv.layer(i)`."""

    groups: tuple[AttentionBatch, ...]
    layer_group: tuple[int, ...]
    kv: LayerCaches
    tap: Tap | None = None
