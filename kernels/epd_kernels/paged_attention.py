"""Causal attention of packed queries over a paged KV cache, grouped-query heads.

Sequence s owns queries cu_seqlens_q[s] : cu_seqlens_q[s + 1] (q_len of them, packed) and KV
positions 0 .. seq_lens[s] - 1, position p living in row p % block_size of block
block_tables[s, p // block_size]. The queries are the last q_len positions, so query i sees

    p <= seq_len - q_len + i          (nothing when that is negative: the output row is zero)

or, where `limits` are given, the positions p < limits[i] of its sequence: blocks of queries that
see one another, or a prefix that is seen whole. With head h reading KV head
h // (num_heads / num_kv_heads),

    out_i = sum_p softmax_p(scale * q_i . k_p) v_p

The kernels keep the running maximum m, sum l and unnormalised output of the online softmax
(Milakov and Gimelshein, arXiv 1805.02867; FlashAttention, arXiv 2205.14135) in fp32. A tile's rows
are (query, head) pairs of one KV head, so each key is read once per head group. Decoding splits
the positions of a sequence over several programs and merges their (m, l, out) afterwards
(flash-decoding): with M = max_j m_j,

    out = sum_j 2^(m_j - M) out_j / sum_j 2^(m_j - M) l_j
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .attention_reference import paged_attention_ref
from .launch import attention_config, attention_splits, jit, next_power_of_2, tl
from .position_splits import combine_splits, split_span, split_workspace

if TYPE_CHECKING:
    from .launch import AttentionConfig

__all__ = ["paged_attention", "paged_attention_ref"]

_LOG2_E = 1.4426950408889634


def paged_attention(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *,
    block_tables: torch.Tensor, cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor,
    scale: float, max_seqlen_q: int, max_seqlen_k: int, limits: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Attention output `[T, num_heads, head_dim]` of `q` of the same shape.

    Caches are `[num_blocks, block_size, num_kv_heads, head_dim]`; `block_tables` int32
    `[S, max_blocks]` (entries past a sequence's length are never followed), `cu_seqlens_q` int32
    `[S + 1]` ending in T, `seq_lens` int32 `[S]` counting this step's queries. `max_seqlen_q` and
    `max_seqlen_k` are upper bounds known to the host, which fix the launch: nothing else about
    the lengths is read there. A padding row of a fixed-size batch is a sequence of `seq_len` 0.
    `limits` int32 `[T]` replaces the causal bound: row i sees positions p < limits[i], and no more
    than there are; a row that sees none is zero.
    """
    run = paged_attention_triton if q.is_cuda else paged_attention_ref
    return run(
        q, k_cache, v_cache, block_tables=block_tables, cu_seqlens_q=cu_seqlens_q,
        seq_lens=seq_lens, scale=scale, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        limits=limits,
    )  # fmt: skip


@jit
def _attend_tiles(
    b_m: tl.tensor, b_l: tl.tensor, b_o: tl.tensor, b_q: tl.tensor, o_limit: tl.tensor,
    table: tl.tensor, k_cache: tl.tensor, v_cache: tl.tensor, stride_block: tl.tensor,
    stride_row: tl.tensor, scale_log2: tl.tensor, start: tl.tensor, end: tl.tensor,
    BLOCK_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(m, l, out) after positions [start, end); not MASKED, whole tiles that every row sees."""
    o_d = tl.arange(0, BLOCK_D)
    for i_n in range(start, end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        if MASKED:
            block = tl.load(table + o_n // BLOCK_SIZE, mask=m_n, other=0).to(tl.int64)
        else:
            block = tl.load(table + o_n // BLOCK_SIZE).to(tl.int64)
        o_kv = (block * stride_block + (o_n % BLOCK_SIZE) * stride_row)[:, None] + o_d[None, :]
        if MASKED or D < BLOCK_D:
            m_kv = m_n[:, None] & (o_d < D)[None, :]
            b_k = tl.load(k_cache + o_kv, mask=m_kv, other=0.0)
            b_v = tl.load(v_cache + o_kv, mask=m_kv, other=0.0)
        else:
            b_k = tl.load(k_cache + o_kv)
            b_v = tl.load(v_cache + o_kv)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")
        if MASKED:
            b_s = tl.where(m_n[None, :] & (o_n[None, :] <= o_limit[:, None]), b_s, float("-inf"))
        b_m_next = tl.maximum(b_m, tl.max(b_s, axis=1) * scale_log2)
        b_base = b_m_next
        if MASKED:
            b_base = tl.where(b_m_next == float("-inf"), 0.0, b_m_next)  # -inf - -inf is NaN
        b_p = tl.exp2(b_s * scale_log2 - b_base[:, None])
        b_decay = tl.exp2(b_m - b_base)
        b_l = b_l * b_decay + tl.sum(b_p, axis=1)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_decay[:, None], input_precision="ieee")
        b_m = b_m_next
    return b_m, b_l, b_o


@jit
def visible_rows(
    limits: tl.tensor, o_q: tl.tensor, m_r: tl.tensor, i_q: tl.tensor, q_len: tl.tensor,
    seq_len: tl.tensor, TILE: tl.constexpr, LIMITED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The last position each row sees, the count that all see, and the end of what any sees.

    Rows are queries `o_q` of a sequence, whose `limits` start at the pointer.
    """
    if LIMITED:
        b_limit = tl.minimum(tl.load(limits + o_q, mask=m_r, other=0), seq_len)
        end = tl.maximum(tl.max(b_limit, axis=0), 0)
        seen_by_all = tl.min(tl.where(m_r, b_limit, end), axis=0)
        o_limit = b_limit - 1
    else:
        first = seq_len - q_len
        o_limit, seen_by_all = first + o_q, first + i_q + 1
        end = tl.minimum(first + i_q + TILE, seq_len)
    return o_limit, seen_by_all, end


@jit
def _attend(
    b_q: tl.tensor, o_limit: tl.tensor, seen_by_all: tl.tensor, table: tl.tensor,
    k_cache: tl.tensor, v_cache: tl.tensor, stride_block: tl.tensor, stride_row: tl.tensor,
    scale_log2: tl.tensor, start: tl.tensor, end: tl.tensor, BLOCK_SIZE: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(m, l, out) of rows `b_q` over positions [start, end), row r seeing p <= o_limit[r].

    Positions below `seen_by_all` need no mask. m is in base-2 units; a row that saw nothing has
    m = -inf, l = 0, out = 0.
    """
    b_m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_l = tl.zeros((BLOCK_M,), tl.float32)
    b_o = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    open_tiles = tl.maximum(tl.minimum(seen_by_all, end) - start, 0) // BLOCK_N
    middle = start + open_tiles * BLOCK_N
    b_m, b_l, b_o = _attend_tiles(
        b_m, b_l, b_o, b_q, o_limit, table, k_cache, v_cache, stride_block, stride_row,
        scale_log2, start, middle, BLOCK_SIZE, D, BLOCK_N, BLOCK_D, False,
    )  # fmt: skip
    return _attend_tiles(
        b_m, b_l, b_o, b_q, o_limit, table, k_cache, v_cache, stride_block, stride_row,
        scale_log2, middle, end, BLOCK_SIZE, D, BLOCK_N, BLOCK_D, True,
    )  # fmt: skip


@jit
def _prefill_kernel(
    q: tl.tensor, k_cache: tl.tensor, v_cache: tl.tensor, out: tl.tensor, partial: tl.tensor,
    stats: tl.tensor, block_tables: tl.tensor, cu_seqlens_q: tl.tensor, seq_lens: tl.tensor,
    limits: tl.tensor, scale_log2: tl.tensor, q_stride_t: tl.tensor, q_stride_h: tl.tensor,
    stride_block: tl.tensor, stride_row: tl.tensor, stride_head: tl.tensor,
    table_stride: tl.tensor, num_splits: tl.tensor, least_queries: tl.tensor,
    BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, LIMITED: tl.constexpr, SPLIT: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK_M // GROUP queries of one sequence and KV head; row r is query r // GROUP.

    One of `num_splits` spans of the positions they see, written as `_decode_kernel` does, by token.
    Sequences of fewer than `least_queries` are left to another kernel.
    """
    TILE: tl.constexpr = BLOCK_M // GROUP
    # the last queries see most: start them first
    i_q = (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE
    i_h, i_s = tl.program_id(1), tl.program_id(2)
    if SPLIT:
        i_s = i_s // num_splits
    q_start = tl.load(cu_seqlens_q + i_s)
    q_len = tl.load(cu_seqlens_q + i_s + 1) - q_start
    if (i_q < q_len) & (q_len >= least_queries):
        seq_len = tl.load(seq_lens + i_s)
        o_r, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        o_q = i_q + o_r // GROUP
        m_r = (o_q < q_len) & (o_r < TILE * GROUP)
        m_q = m_r[:, None] & (o_d < D)[None, :]
        o_t = (q_start + o_q).to(tl.int64)[:, None]
        o_h = (i_h * GROUP + o_r % GROUP)[:, None]
        b_q = tl.load(q + o_t * q_stride_t + o_h * q_stride_h + o_d[None, :], mask=m_q, other=0.0)
        o_limit, seen_by_all, end = visible_rows(
            limits + q_start, o_q, m_r, i_q, q_len, seq_len, TILE, LIMITED
        )
        start = 0
        if SPLIT:
            i_split = tl.program_id(2) % num_splits
            start, end = split_span(end, i_split, num_splits, BLOCK_N)
        b_m, b_l, b_o = _attend(
            b_q, o_limit, seen_by_all, block_tables + i_s.to(tl.int64) * table_stride,
            k_cache + i_h * stride_head, v_cache + i_h * stride_head, stride_block, stride_row,
            scale_log2, start, end, BLOCK_SIZE, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        heads = tl.num_programs(1) * GROUP
        o_row = o_t * heads + o_h
        if SPLIT:
            o_row = o_row * num_splits + i_split
            tl.store(partial + o_row * D + o_d[None, :], b_o, mask=m_q)
            tl.store(stats + o_row * 2, b_m[:, None], mask=m_r[:, None])
            tl.store(stats + o_row * 2 + 1, b_l[:, None], mask=m_r[:, None])
        else:
            b_o = b_o / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
            tl.store(out + o_row * D + o_d[None, :], b_o.to(out.dtype.element_ty), mask=m_q)


@jit
def _decode_kernel(
    q: tl.tensor, k_cache: tl.tensor, v_cache: tl.tensor, out: tl.tensor, partial: tl.tensor,
    stats: tl.tensor, block_tables: tl.tensor, cu_seqlens_q: tl.tensor, seq_lens: tl.tensor,
    limits: tl.tensor, scale_log2: tl.tensor, q_stride_t: tl.tensor, q_stride_h: tl.tensor,
    stride_block: tl.tensor, stride_row: tl.tensor, stride_head: tl.tensor,
    table_stride: tl.tensor, num_splits: tl.tensor, BLOCK_SIZE: tl.constexpr, GROUP: tl.constexpr,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    LIMITED: tl.constexpr,
) -> None:  # fmt: skip
    """One split of one sequence of one query and KV head; row r is query head r of the group.

    A single split writes `out`; several write unnormalised `partial [S, H, num_splits, D]` and
    `stats [S, H, num_splits, 2]` = (m, l).
    """
    i_s, i_h, i_split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_t = tl.load(cu_seqlens_q + i_s).to(tl.int64)
    if tl.load(cu_seqlens_q + i_s + 1) == i_t + 1:
        seq_len = tl.load(seq_lens + i_s)
        if LIMITED:
            seq_len = tl.maximum(tl.minimum(tl.load(limits + i_t), seq_len), 0)
        start, end = split_span(seq_len, i_split, num_splits, BLOCK_N)
        o_r, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        m_q = (o_r < GROUP)[:, None] & (o_d < D)[None, :]
        o_h = i_h * GROUP + o_r
        o_q = i_t * q_stride_t + o_h[:, None] * q_stride_h + o_d[None, :]
        b_m, b_l, b_o = _attend(
            tl.load(q + o_q, mask=m_q, other=0.0), tl.zeros((BLOCK_M,), tl.int32) + (seq_len - 1),
            seq_len, block_tables + i_s.to(tl.int64) * table_stride, k_cache + i_h * stride_head,
            v_cache + i_h * stride_head, stride_block, stride_row, scale_log2, start, end,
            BLOCK_SIZE, D, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
        heads = tl.num_programs(1) * GROUP
        o_row = (i_s.to(tl.int64) * heads + o_h) * num_splits + i_split
        if num_splits == 1:
            b_o = b_o / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
            p_out = out + (i_t * heads + o_h)[:, None] * D + o_d[None, :]
            tl.store(p_out, b_o.to(out.dtype.element_ty), mask=m_q)
        else:
            tl.store(partial + o_row[:, None] * D + o_d[None, :], b_o, mask=m_q)
            tl.store(stats + o_row * 2, b_m, mask=o_r < GROUP)
            tl.store(stats + o_row * 2 + 1, b_l, mask=o_r < GROUP)


def paged_attention_triton(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *,
    block_tables: torch.Tensor, cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor,
    scale: float, max_seqlen_q: int, max_seqlen_k: int, limits: torch.Tensor | None = None,
    config: AttentionConfig | None = None,
) -> torch.Tensor:  # fmt: skip
    """`paged_attention` on the device of `q`; `config` replaces the built-in choice."""
    tokens, heads, dim = q.shape
    block_size, kv_heads = k_cache.shape[1], k_cache.shape[2]
    assert heads % kv_heads == 0 and k_cache.shape == v_cache.shape and dim == k_cache.shape[3]
    assert k_cache.stride() == v_cache.stride() and q.stride(-1) == k_cache.stride(-1) == 1
    assert block_tables.stride(-1) == 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    strides = (q.stride(0), q.stride(1), *k_cache.stride()[:3], block_tables.stride(0))
    lengths = (
        block_tables, cu_seqlens_q, seq_lens, seq_lens if limits is None else limits,
        scale * _LOG2_E, *strides,
    )  # fmt: skip
    group, num_seqs = heads // kv_heads, len(seq_lens)
    many = max_seqlen_q > 1
    # a step may hold sequences of one query beside longer ones: each kind has its kernel, and
    # the second overwrites what merging the first one's splits left in its rows
    for decode in [*[False] * many, *[True] * (not many or num_seqs > 1)]:
        chosen = config or attention_config(q.device, head_dim=dim, rows=group, decode=decode)
        tiles = 1 if decode else -(-max_seqlen_q // (chosen.block_m // group))
        splits = attention_splits(
            q.device, programs=tiles * num_seqs * kv_heads, max_seqlen_k=max_seqlen_k,
            occupancy=chosen.occupancy, num_warps=chosen.num_warps, most=1024 if decode else 16,
        )  # fmt: skip
        partial, stats = split_workspace(out, num_seqs if decode else tokens, splits)
        arguments = (q, k_cache, v_cache, out, partial, stats, *lengths, splits)
        options: dict[str, Any] = {
            "BLOCK_SIZE": block_size, "GROUP": group, "D": dim, "BLOCK_M": chosen.block_m,
            "BLOCK_N": chosen.block_n, "BLOCK_D": max(16, next_power_of_2(dim)),
            "LIMITED": limits is not None, "num_warps": chosen.num_warps,
            "num_stages": chosen.num_stages,
        }  # fmt: skip
        if decode:
            _decode_kernel[(num_seqs, kv_heads, splits)](*arguments, **options)
        else:
            grid = (tiles, kv_heads, num_seqs * splits)
            least = 2 if num_seqs > 1 else 1
            _prefill_kernel[grid](*arguments, least, SPLIT=splits > 1, **options)
        if splits > 1:
            combine_splits(partial, stats, out, splits, cu_seqlens_q, by_token=not decode)
    return out
