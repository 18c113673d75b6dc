"""Which rows of a packed batch go on when each prompt may keep some of its vision rows.

A vision row stays if fewer than `keep` vision rows of its prompt score higher, or as high and
earlier; all other rows stay. How many stay is known to the host, so nothing is read back: places
are counted, as `row_sort` counts them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from .launch import constant, jit, tl
from .row_sort import sort_rows_ref

if TYPE_CHECKING:
    from .text_votes import Spans

__all__ = ["keep_rows", "keep_rows_ref"]

_WIDTH = constant(8)


def keep_rows(
    parts: torch.Tensor, is_vision: torch.Tensor, spans: Spans, *, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The int64 rows `[num_rows]` that stay, prompt by prompt, increasing; which are vision.

    Scores are the sums of `parts [P, T]`, NaN the lowest of all; `is_vision` is bool `[T]`. The
    `place` of a span is where its rows go: together they fill `num_rows`.
    """
    run = keep_rows_triton if parts.is_cuda else keep_rows_ref
    return run(parts, is_vision, spans, num_rows=num_rows)


def keep_rows_ref(
    parts: torch.Tensor, is_vision: torch.Tensor, spans: Spans, *, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`keep_rows` in torch."""
    scores, rows = parts.sum(0), []
    ends = [*(span.place for span in spans.spans[1:]), num_rows]
    for span, end in zip(spans.spans, ends, strict=True):
        vision = is_vision[span.start : span.stop]
        best = sort_rows_ref(scores[None, span.start : span.stop], largest=True)[1][0]
        # vision rows first, the best of them before the others
        order = best[vision[best].int().argsort(descending=True, stable=True)]
        rank = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)).to(order))
        stay = (~vision | (rank < span.keep)).int()
        order = stay.argsort(descending=True, stable=True)
        rows.append(span.start + order[: end - span.place])
    found = torch.cat(rows)
    return found, is_vision[found]


@jit
def _load_scores(
    parts: tl.tensor, o_r: tl.tensor, m_r: tl.tensor, num_keys: tl.tensor, PARTS: tl.constexpr
) -> tl.tensor:
    """Sums of the parts, always in the same order."""
    b_x = tl.load(parts + o_r, m_r, 0.0)
    for i_p in range(1, PARTS):
        b_x += tl.load(parts + i_p * num_keys + o_r, m_r, 0.0)
    return tl.where(b_x != b_x, float("-inf"), b_x)


@jit
def _rank_kernel(
    parts: tl.tensor, vision: tl.tensor, table: tl.tensor, stay: tl.tensor, num_keys: tl.tensor,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr,
) -> None:  # fmt: skip
    """Whether BLOCK rows of one prompt stay."""
    i_s = tl.program_id(1)
    start, stop = tl.load(table + i_s * _WIDTH + 2), tl.load(table + i_s * _WIDTH + 3)
    keep = tl.load(table + i_s * _WIDTH + 4)
    first = start + tl.program_id(0) * BLOCK
    if first < stop:
        o_i = first + tl.arange(0, BLOCK)
        m_i = o_i < stop
        b_vision = tl.load(vision + o_i, m_i, 0)
        b_x = _load_scores(parts, o_i, m_i & (b_vision != 0), num_keys, PARTS)
        b_place = tl.zeros((BLOCK,), tl.int32)
        for i_j in range(start, stop, BLOCK_J):
            o_j = i_j + tl.arange(0, BLOCK_J)
            m_j = o_j < stop
            m_j = m_j & (tl.load(vision + o_j, m_j, 0) != 0)
            b_y = _load_scores(parts, o_j, m_j, num_keys, PARTS)
            b_first = b_y[:, None] > b_x[None, :]
            b_first |= (b_y[:, None] == b_x[None, :]) & (o_j[:, None] < o_i[None, :])
            b_place += tl.sum((b_first & m_j[:, None]).to(tl.int32), axis=0)
        b_stay = (b_vision == 0) | (b_place < keep)
        tl.store(stay + o_i, b_stay.to(tl.uint8), m_i)


@jit
def _gather_kernel(
    stay: tl.tensor, vision: tl.tensor, table: tl.tensor, rows: tl.tensor, kinds: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK rows of one prompt per program: those that stay, written to where they go."""
    i_s = tl.program_id(1)
    start, stop = tl.load(table + i_s * _WIDTH + 2), tl.load(table + i_s * _WIDTH + 3)
    first = start + tl.program_id(0) * BLOCK
    if first < stop:
        o_b = tl.arange(0, BLOCK)
        b_before = tl.zeros((BLOCK,), tl.int32)
        for i_r in range(start, first, BLOCK):
            b_before += tl.load(stay + i_r + o_b).to(tl.int32)
        m_r = first + o_b < stop
        b_stay = tl.load(stay + first + o_b, m_r, 0).to(tl.int32)
        place = tl.load(table + i_s * _WIDTH + 5) + tl.sum(b_before, axis=0)
        b_place = place + tl.cumsum(b_stay, axis=0) - b_stay
        m_r = b_stay != 0
        tl.store(rows + b_place, (first + o_b).to(tl.int64), m_r)
        tl.store(kinds + b_place, tl.load(vision + first + o_b, m_r, 0), m_r)


def keep_rows_triton(
    parts: torch.Tensor, is_vision: torch.Tensor, spans: Spans, *, num_rows: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`keep_rows` on the device of `parts`."""
    num_parts, num_keys = parts.shape
    rows = torch.empty(num_rows, dtype=torch.int64, device=parts.device)
    kinds = torch.empty(num_rows, dtype=torch.uint8, device=parts.device)
    stay = torch.empty(num_keys, dtype=torch.uint8, device=parts.device)
    vision, count = is_vision.view(torch.uint8), len(spans.spans)
    if num_rows:
        _rank_kernel[(math.ceil(spans.most_rows / 32), count)](
            parts, vision, spans.table, stay, num_keys, PARTS=num_parts, BLOCK=32, BLOCK_J=128,
            num_warps=4,
        )  # fmt: skip
        _gather_kernel[(math.ceil(spans.most_rows / 256), count)](
            stay, vision, spans.table, rows, kinds, BLOCK=256, num_warps=4
        )
    return rows, kinds.view(torch.bool)
