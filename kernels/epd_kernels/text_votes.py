"""What a few voting rows of a prompt say about the rows before them: no L x L map is ever stored.

S prompts lie packed in the rows of `k [T, Hkv, d]`; the last rows of each vote, with queries in
`q [Q, H, d]`. `Spans` says where. With lse_j = log sum_l exp(scale q_j . k_l) over the keys of its
own prompt that row j sees, A^h[j, l] = exp(scale q_j . k_l - lse_j) can be made again, tile by
tile, wherever it is asked for:

    row_lse             lse^h_j
    received_and_given  w^h_j = sum_i (B + B' - diag B)^h[i, j], B = A between voting rows
    weighted_columns    s_l = sum_h sum_j w^h_j A^h[j, l]

Query head h reads key head h // (H / Hkv). Products are of the inputs as they are, sums in fp32, in
an order that does not depend on who else is in the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from .launch import INTERPRETED, constant, jit, next_power_of_2, tl

__all__ = ["Span", "Spans", "received_and_given", "received_and_given_ref", "row_lse",
           "row_lse_ref", "weighted_columns", "weighted_columns_ref"]  # fmt: skip

_LOG2_E = constant(1.4426950408889634)
_LN_2 = constant(0.6931471805599453)
_WIDTH = constant(8)
# rows and columns of a tile of A, and its warps: one shape for all, so no batch changes rounding
TILE = (16, 16, 4) if INTERPRETED else (64, 64, 4)
_PARTS = 8


class Span(NamedTuple):
    """A prompt: keys [start, stop), of which the last `votes` vote; their queries begin at `query`.

    `keep` of its vision rows are to stay; what stays goes to rows `place` and on.
    """

    query: int
    votes: int
    start: int
    stop: int
    keep: int = 0
    place: int = 0


@dataclass(frozen=True)
class Spans:
    """The prompts of a batch, known to the host, and the same as an int32 table [S, 8].

    The table's last two columns mean nothing: with them every table begins at a multiple of 32.
    """

    spans: tuple[Span, ...]
    table: torch.Tensor

    @classmethod
    def of(cls, spans: tuple[Span, ...], device: torch.device | str) -> Spans:
        """`spans` with their table on `device`."""
        table = torch.tensor([(*span, 0, 0) for span in spans], dtype=torch.int32)
        return cls(spans, table.to(device))

    @cached_property
    def most_votes(self) -> int:
        """Votes of the prompt that has most."""
        return max((span.votes for span in self.spans), default=0)

    @cached_property
    def most_rows(self) -> int:
        """Rows of the longest prompt."""
        return max((span.stop - span.start for span in self.spans), default=0)


def row_lse(q: torch.Tensor, k: torch.Tensor, spans: Spans, *, scale: float) -> torch.Tensor:
    """lse `[H, Q]` in fp32; what stands at queries that do not vote means nothing."""
    run = row_lse_triton if q.is_cuda else row_lse_ref
    return run(q, k, spans, scale=scale)


def received_and_given(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, spans: Spans, *, scale: float
) -> torch.Tensor:
    """w `[H, Q]` in fp32: what a voting row receives from them, and gives to them."""
    run = received_and_given_triton if q.is_cuda else received_and_given_ref
    return run(q, k, lse, spans, scale=scale)


def weighted_columns(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, weights: torch.Tensor, spans: Spans, *,
    scale: float,
) -> torch.Tensor:  # fmt: skip
    """s as parts `[P, T]` in fp32, one per group of heads, that are to be added.

    `weights [H, Q]` may be expanded. Rows that vote, or have no voter behind them, hold anything.
    """
    run = weighted_columns_triton if q.is_cuda else weighted_columns_ref
    return run(q, k, lse, weights, spans, scale=scale)


def row_lse_ref(q: torch.Tensor, k: torch.Tensor, spans: Spans, *, scale: float) -> torch.Tensor:
    """`row_lse` in torch."""
    lse = torch.zeros(q.shape[1], q.shape[0], dtype=_wide(q), device=q.device)
    for span in spans.spans:
        for rows in _tiles(span.votes):
            logits = _logits(q, k, span, rows, span.start, scale)
            lse[:, span.query + rows.start : span.query + rows.stop] = logits.logsumexp(2)
    return lse


def received_and_given_ref(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, spans: Spans, *, scale: float
) -> torch.Tensor:
    """`received_and_given` in torch."""
    weights = torch.zeros_like(lse)
    for span in spans.spans:
        own = weights[:, span.query : span.query + span.votes]
        for rows in _tiles(span.votes):
            there = slice(span.query + rows.start, span.query + rows.stop)
            logits = _logits(q, k, span, rows, span.stop - span.votes, scale)
            attention = torch.exp(logits - lse[:, there, None])
            own += attention.sum(1)
            own[:, rows] += attention.sum(2) - attention[:, :, rows].diagonal(dim1=1, dim2=2)
    return weights


def weighted_columns_ref(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, weights: torch.Tensor, spans: Spans, *,
    scale: float,
) -> torch.Tensor:  # fmt: skip
    """`weighted_columns` in torch, as one part."""
    out = torch.zeros(1, k.shape[0], dtype=lse.dtype, device=k.device)
    for span in spans.spans:
        for rows in _tiles(span.votes):
            there = slice(span.query + rows.start, span.query + rows.stop)
            logits = _logits(q, k, span, rows, span.start, scale)
            attention = torch.exp(logits - lse[:, there, None]) * weights[:, there, None]
            out[0, span.start : span.stop] += attention.sum((0, 1))
    return out


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _tiles(length: int) -> list[slice]:
    """Voting rows that exist against all keys at one time."""
    return [slice(low, min(low + 128, length)) for low in range(0, length, 128)]


def _logits(
    q: torch.Tensor, k: torch.Tensor, span: Span, rows: slice, first: int, scale: float
) -> torch.Tensor:
    """Causal logits `[H, rows, keys]` of voting `rows` against the keys from `first` on."""
    mine = q[span.query + rows.start : span.query + rows.stop].to(_wide(q)).transpose(0, 1)
    keys = k[first : span.stop].to(mine.dtype).permute(1, 2, 0)
    heads, count, width = mine.shape
    logits = (mine.reshape(len(keys), -1, width) @ keys).view(heads, count, -1) * scale
    seen = span.stop - span.votes - first + torch.arange(rows.start, rows.stop, device=q.device)
    places = torch.arange(logits.shape[2], device=q.device)
    return logits.masked_fill(places > seen[:, None], -math.inf)


@jit
def _load_rows(
    x: tl.tensor, o_r: tl.tensor, m_r: tl.tensor, stride: tl.tensor, D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Rows `o_r` of a head."""
    o_d = tl.arange(0, BLOCK_D)
    o_x = o_r.to(tl.int64)[:, None] * stride + o_d[None, :]
    return tl.load(x + o_x, mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)


@jit
def _map_tile(b_q: tl.tensor, b_k: tl.tensor, b_lse: tl.tensor, scale_log2: tl.tensor) -> tl.tensor:
    """A of rows `b_q`, whose lse is `b_lse`, and columns `b_k`."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
    return tl.exp2(b_s - (b_lse * _LOG2_E)[:, None])


@jit
def _lse_kernel(
    q: tl.tensor, k: tl.tensor, table: tl.tensor, lse: tl.tensor, scale_log2: tl.tensor,
    q_stride_t: tl.tensor, q_stride_h: tl.tensor, k_stride_t: tl.tensor, k_stride_h: tl.tensor,
    num_queries: tl.tensor, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK_M voting rows of one prompt and head per program."""
    i_m, i_h, i_s = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2)
    query = tl.load(table + i_s * _WIDTH)
    votes = tl.load(table + i_s * _WIDTH + 1)
    start, stop = tl.load(table + i_s * _WIDTH + 2), tl.load(table + i_s * _WIDTH + 3)
    if i_m < votes:
        o_m = i_m + tl.arange(0, BLOCK_M)
        m_m = o_m < votes
        b_q = _load_rows(q + i_h * q_stride_h, query + o_m, m_m, q_stride_t, D, BLOCK_D)
        b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        b_sum = tl.zeros((BLOCK_M,), tl.float32)
        end = tl.minimum(stop - votes + i_m + BLOCK_M, stop)
        for i_n in range(start, end, BLOCK_N):
            o_n = i_n + tl.arange(0, BLOCK_N)
            p_k = k + (i_h // GROUP) * k_stride_h
            b_k = _load_rows(p_k, o_n, o_n < end, k_stride_t, D, BLOCK_D)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale_log2
            # every row sees the first key, so the maximum is finite from the first tile on
            m_s = o_n[None, :] <= (stop - votes + o_m)[:, None]
            b_s = tl.where(m_s & (o_n < end)[None, :], b_s, float("-inf"))
            b_next = tl.maximum(b_max, tl.max(b_s, axis=1))
            b_sum = b_sum * tl.exp2(b_max - b_next)
            b_sum += tl.sum(tl.exp2(b_s - b_next[:, None]), axis=1)
            b_max = b_next
        o_l = i_h.to(tl.int64) * num_queries + query + o_m
        tl.store(lse + o_l, (b_max + tl.log2(b_sum)) * _LN_2, m_m)


@jit
def _prior_kernel(
    q: tl.tensor, k: tl.tensor, table: tl.tensor, lse: tl.tensor, weights: tl.tensor,
    scale_log2: tl.tensor, q_stride_t: tl.tensor, q_stride_h: tl.tensor, k_stride_t: tl.tensor,
    k_stride_h: tl.tensor, num_queries: tl.tensor, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """w of BLOCK_M voting rows of one prompt and head per program."""
    i_m, i_h, i_s = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2)
    query = tl.load(table + i_s * _WIDTH)
    votes = tl.load(table + i_s * _WIDTH + 1)
    first = tl.load(table + i_s * _WIDTH + 3) - votes
    if i_m < votes:
        p_q, p_k = q + i_h * q_stride_h, k + (i_h // GROUP) * k_stride_h
        p_lse = lse + i_h.to(tl.int64) * num_queries + query
        o_m = i_m + tl.arange(0, BLOCK_M)
        m_m = o_m < votes
        b_q = _load_rows(p_q, query + o_m, m_m, q_stride_t, D, BLOCK_D)
        b_k = _load_rows(p_k, first + o_m, m_m, k_stride_t, D, BLOCK_D)
        b_lse = tl.load(p_lse + o_m, m_m, 0.0)
        b_w = tl.zeros((BLOCK_M,), tl.float32)
        # given to itself and to earlier rows
        for i_n in range(0, tl.minimum(i_m + BLOCK_M, votes), BLOCK_M):
            o_n = i_n + tl.arange(0, BLOCK_M)
            b_n = _load_rows(p_k, first + o_n, o_n < votes, k_stride_t, D, BLOCK_D)
            b_a = _map_tile(b_q, b_n, b_lse, scale_log2)
            b_w += tl.sum(tl.where(o_n[None, :] <= o_m[:, None], b_a, 0.0), axis=1)
        # received from later rows
        for i_n in range(i_m, votes, BLOCK_M):
            o_n = i_n + tl.arange(0, BLOCK_M)
            m_n = o_n < votes
            b_n = _load_rows(p_q, query + o_n, m_n, q_stride_t, D, BLOCK_D)
            b_a = _map_tile(b_n, b_k, tl.load(p_lse + o_n, m_n, 0.0), scale_log2)
            m_a = m_n[:, None] & (o_n[:, None] > o_m[None, :])
            b_w += tl.sum(tl.where(m_a, b_a, 0.0), axis=0)
        tl.store(weights + i_h.to(tl.int64) * num_queries + query + o_m, b_w, m_m)


@jit
def _columns_kernel(
    q: tl.tensor, k: tl.tensor, table: tl.tensor, lse: tl.tensor, weights: tl.tensor,
    parts: tl.tensor, scale_log2: tl.tensor, q_stride_t: tl.tensor, q_stride_h: tl.tensor,
    k_stride_t: tl.tensor, k_stride_h: tl.tensor, num_weights: tl.tensor, w_stride_t: tl.tensor,
    num_queries: tl.tensor, num_keys: tl.tensor, HEADS: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK_N columns of one prompt and HEADS of the heads per program.

    `num_weights` lie between the weights of two heads: none where all heads share them.
    """
    i_n, i_p, i_s = tl.program_id(0) * BLOCK_N, tl.program_id(1), tl.program_id(2)
    query = tl.load(table + i_s * _WIDTH)
    votes = tl.load(table + i_s * _WIDTH + 1)
    start, end = tl.load(table + i_s * _WIDTH + 2), tl.load(table + i_s * _WIDTH + 3) - votes
    if (votes > 0) & (start + i_n < end):
        o_n = start + i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        b_acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for i_h in range(i_p * HEADS, (i_p + 1) * HEADS):
            b_k = _load_rows(k + (i_h // GROUP) * k_stride_h, o_n, m_n, k_stride_t, D, BLOCK_D)
            for i_m in range(0, votes, BLOCK_M):
                o_m = i_m + tl.arange(0, BLOCK_M)
                m_m = o_m < votes
                o_q = query + o_m
                b_q = _load_rows(q + i_h * q_stride_h, o_q, m_m, q_stride_t, D, BLOCK_D)
                b_lse = tl.load(lse + i_h * num_queries + o_q, m_m, 0.0)
                b_w = tl.load(weights + i_h * num_weights + o_q * w_stride_t, m_m, 0.0)
                b_acc += _map_tile(b_q, b_k, b_lse, scale_log2) * b_w[:, None]
        tl.store(parts + i_p.to(tl.int64) * num_keys + o_n, tl.sum(b_acc, axis=0), m_n)


def _strides(q: torch.Tensor, k: torch.Tensor) -> tuple[int, int, int, int]:
    assert q.stride(2) == k.stride(2) == 1 and q.shape[2] == k.shape[2]
    return q.stride(0), q.stride(1), k.stride(0), k.stride(1)


def _padded(dim: int) -> int:
    return max(16, next_power_of_2(dim))  # a product sums over at least 16 channels


def row_lse_triton(q: torch.Tensor, k: torch.Tensor, spans: Spans, *, scale: float) -> torch.Tensor:
    """`row_lse` on the device of `q`."""
    size, heads, dim = q.shape
    lse = torch.empty(heads, size, dtype=torch.float32, device=q.device)
    block_m, block_n, warps = TILE
    if spans.most_votes:
        grid = (math.ceil(spans.most_votes / block_m), heads, len(spans.spans))
        _lse_kernel[grid](
            q, k, spans.table, lse, scale * math.log2(math.e), *_strides(q, k), size,
            GROUP=heads // k.shape[1], D=dim, BLOCK_M=block_m, BLOCK_N=block_n,
            BLOCK_D=_padded(dim), num_warps=warps, num_stages=3,
        )  # fmt: skip
    return lse


def received_and_given_triton(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, spans: Spans, *, scale: float
) -> torch.Tensor:
    """`received_and_given` on the device of `q`."""
    size, heads, dim = q.shape
    weights = torch.empty(heads, size, dtype=torch.float32, device=q.device)
    block_m, _, warps = TILE
    if spans.most_votes:
        grid = (math.ceil(spans.most_votes / block_m), heads, len(spans.spans))
        _prior_kernel[grid](
            q, k, spans.table, lse.contiguous(), weights, scale * math.log2(math.e),
            *_strides(q, k), size, GROUP=heads // k.shape[1], D=dim, BLOCK_M=block_m,
            BLOCK_D=_padded(dim), num_warps=warps, num_stages=2,
        )  # fmt: skip
    return weights


def weighted_columns_triton(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, weights: torch.Tensor, spans: Spans, *,
    scale: float,
) -> torch.Tensor:  # fmt: skip
    """`weighted_columns` on the device of `q`, heads in up to eight parts."""
    size, heads, dim = q.shape
    num_parts = math.gcd(heads, _PARTS)
    parts = torch.empty(num_parts, k.shape[0], dtype=torch.float32, device=q.device)
    block_m, block_n, warps = TILE
    if spans.most_votes:
        grid = (math.ceil(spans.most_rows / block_n), num_parts, len(spans.spans))
        _columns_kernel[grid](
            q, k, spans.table, lse.contiguous(), weights, parts, scale * math.log2(math.e),
            *_strides(q, k), *weights.stride(), size, k.shape[0], HEADS=heads // num_parts,
            GROUP=heads // k.shape[1], D=dim, BLOCK_M=block_m, BLOCK_N=block_n,
            BLOCK_D=_padded(dim), num_warps=warps, num_stages=2,
        )  # fmt: skip
    return parts
