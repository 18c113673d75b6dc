"""Attention that text pays to text and to vision, from row log-sum-exps: no L×L map is ever stored.

With lse_j = log Σ_l exp(scale·q_j·k_l) over the keys that row j sees, A[j, l] = exp(scale·q_j·k_l −
lse_j) can be made again, tile by tile, for the few rows and columns that matter. Query head h reads
key head h // (H / H_kv). Everything is fp32. Rows and columns are places in the sequence of keys.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from epd_pruning.selection import at_least_fp32

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["attention_lse", "received_and_given", "weighted_attention"]

# rows or columns of the map that exist at one time
TILE = 128


def attention_lse(queries: Tensor, keys: Tensor, rows: Tensor, scale: float) -> Tensor:
    """Causal row log-sum-exp [H, T] of `queries` [H, T, d] at `rows` [T] of `keys` [H_kv, L, d].

    What a fused attention kernel hands out for free; this is for layers that ran without one.
    """
    places = torch.arange(keys.shape[1], device=keys.device)
    parts = [
        _logits(queries[:, tile], keys, scale)
        .masked_fill(places > rows[tile, None], -math.inf)
        .logsumexp(-1)
        for tile in _tiles(rows.shape[0])
    ]
    return torch.cat(parts, 1) if parts else queries.new_empty(queries.shape[0], 0).float()


def received_and_given(
    queries: Tensor, keys: Tensor, rows: Tensor, lse: Tensor, scale: float
) -> Tensor:
    """w [H, T], the column sums of the symmetrised text-to-text map B + Bᵀ − diag(B).

    w_j is what text row j receives from the rows, plus what it gives to them, itself counted once.
    """
    own = keys[:, rows]
    weights = torch.zeros_like(lse)
    for tile in _tiles(rows.shape[0]):
        attention = torch.exp(_logits(queries[:, tile], own, scale) - lse[:, tile, None])
        attention = attention.masked_fill(rows > rows[tile, None], 0.0)
        weights += attention.sum(1)
        weights[:, tile] += attention.sum(2) - attention[:, :, tile].diagonal(dim1=1, dim2=2)
    return weights


def weighted_attention(
    queries: Tensor, keys: Tensor, columns: Tensor, lse: Tensor, weights: Tensor, scale: float
) -> Tensor:
    """s [V] = Σ_h Σ_j w[h, j]·A[h, j, v] over text rows j, for the vision columns v of `columns`.

    Every row must come after every column, as text after an image does.
    """
    parts = [
        (torch.exp(_logits(queries, keys[:, columns[tile]], scale) - lse[:, :, None])
         * weights[:, :, None]).sum((0, 1))
        for tile in _tiles(columns.shape[0])
    ]  # fmt: skip
    return torch.cat(parts) if parts else lse.new_empty(0)


def _logits(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Logits [H, T, L] of grouped-query heads."""
    heads, rows, width = queries.shape
    grouped = at_least_fp32(queries).reshape(keys.shape[0], -1, width)
    return (grouped @ at_least_fp32(keys).mT).reshape(heads, rows, -1) * scale


def _tiles(length: int) -> Iterator[slice]:
    return (slice(start, start + TILE) for start in range(0, length, TILE))
