"""Attention of many queries over FP8 KV, with scores from the FP8 matrix unit.

Queries are rounded to e4m3 with one scale per token and head, and meet the codes of the keys as
they lie in the cache. With codes a and c of query and key, and their scales r and s,

    scale * q.k  ~  scale * r * s * (a.c)

Values come from a scratch that is widened once per call (see `widened_kv`), the scales of keys from
one where they lie in order, which spares every thread the way through the table. Keys are exact;
what is lost is the rounding of the queries, which attention over FP8 keys does not have otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .launch import INTERPRETED, attention_config, jit, next_power_of_2, tl
from .paged_attention import visible_rows
from .row_codes import e4m3_bits
from .widened_kv import widen_kv

if TYPE_CHECKING:
    from .kv_codes import QuantKV
    from .launch import AttentionConfig

__all__ = ["FP8_QUERIES", "attend_fp8_scores", "rounded_queries"]

FP8_QUERIES = 256
"""Least queries per sequence on average: the positions of fewer are split, which is faster."""

_LOG2_E = 1.4426950408889634
_ROWS = 256


def rounded_queries(q: torch.Tensor) -> torch.Tensor:
    """`q [T, H, D]` as its e4m3 codes hold it, one scale per token and head, fp32."""
    wide = q.float()
    scales = (wide.abs().amax(-1, keepdim=True) / 448).clamp(min=1e-12)
    return (wide / scales).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scales


@jit
def _attend_tiles(
    b_m: tl.tensor, b_l: tl.tensor, b_o: tl.tensor, b_q: tl.tensor, b_unit: tl.tensor,
    o_limit: tl.tensor, table: tl.tensor, codes: tl.tensor, scales: tl.tensor, values: tl.tensor,
    stride_block: tl.tensor, stride_row: tl.tensor, value_stride: tl.tensor, start: tl.tensor,
    end: tl.tensor, BLOCK_SIZE: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, MASKED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(m, l, out) after positions [start, end); not MASKED, whole tiles that every row sees."""
    o_d = tl.arange(0, BLOCK_D)
    o_v = tl.arange(0, BLOCK_N)[:, None] * value_stride + o_d[None, :]
    for i_n in range(start, end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = o_n < end if MASKED else tl.full((BLOCK_N,), True, tl.int1)
        m_kv = m_n[:, None] & (o_d < D)[None, :]
        block = tl.load(table + o_n // BLOCK_SIZE, mask=m_n, other=0).to(tl.int64)
        o_row = block * stride_block + (o_n % BLOCK_SIZE) * stride_row
        b_k = tl.load(codes + o_row[:, None] + o_d[None, :], mask=m_kv, other=0.0)
        b_scale = tl.load(scales + o_n, mask=m_n, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k)) * b_scale[None, :]
        if MASKED:
            b_s = tl.where(m_n[None, :] & (o_n[None, :] <= o_limit[:, None]), b_s, float("-inf"))
        b_m_next = tl.maximum(b_m, tl.max(b_s, axis=1) * b_unit)
        b_base = b_m_next
        if MASKED:
            b_base = tl.where(b_m_next == float("-inf"), 0.0, b_m_next)  # -inf - -inf is NaN
        b_p = tl.exp2(b_s * b_unit[:, None] - b_base[:, None])
        b_decay = tl.exp2(b_m - b_base)
        b_l = b_l * b_decay + tl.sum(b_p, axis=1)
        # the scratch is bounded, so 32 bits hold an offset in it
        b_v = tl.load(values + i_n * value_stride + o_v, mask=m_kv, other=0.0)
        b_o = tl.dot(b_p.to(b_v.dtype), b_v, b_o * b_decay[:, None], input_precision="ieee")
        b_m = b_m_next
    return b_m, b_l, b_o


@jit
def _prefill_fp8_kernel(
    q: tl.tensor, codes: tl.tensor, scales: tl.tensor, values: tl.tensor, out: tl.tensor,
    block_tables: tl.tensor, cu_seqlens_q: tl.tensor, seq_lens: tl.tensor, limits: tl.tensor,
    scale_log2: tl.tensor, q_stride_t: tl.tensor, q_stride_h: tl.tensor, stride_block: tl.tensor,
    stride_row: tl.tensor, stride_head: tl.tensor, scale_stride_seq: tl.tensor,
    scale_stride_head: tl.tensor, value_stride_seq: tl.tensor, value_stride: tl.tensor,
    table_stride: tl.tensor, BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, LIMITED: tl.constexpr, ENCODE: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK_M // GROUP queries of one sequence and KV head; row r is query r // GROUP."""
    TILE: tl.constexpr = BLOCK_M // GROUP
    # the last queries see most: start them first
    i_q = (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE
    i_h, i_s = tl.program_id(1), tl.program_id(2)
    q_start = tl.load(cu_seqlens_q + i_s)
    q_len = tl.load(cu_seqlens_q + i_s + 1) - q_start
    if i_q < q_len:
        seq_len = tl.load(seq_lens + i_s)
        o_r, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
        o_q = i_q + o_r // GROUP
        m_r = (o_q < q_len) & (o_r < TILE * GROUP)
        m_q = m_r[:, None] & (o_d < D)[None, :]
        o_t = (q_start + o_q).to(tl.int64)[:, None]
        o_h = (i_h * GROUP + o_r % GROUP)[:, None]
        p_q = q + o_t * q_stride_t + o_h * q_stride_h + o_d[None, :]
        b_q = tl.load(p_q, mask=m_q, other=0.0).to(tl.float32)
        b_unit = tl.maximum(tl.max(tl.abs(b_q), axis=1) / 448.0, 1e-12)
        b_q = tl.minimum(tl.maximum(b_q / b_unit[:, None], -448.0), 448.0)
        if ENCODE:
            b_a = e4m3_bits(b_q).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        else:
            b_a = b_q.to(tl.float8e4nv)
        b_unit *= scale_log2
        o_limit, seen_by_all, end = visible_rows(
            limits + q_start, o_q, m_r, i_q, q_len, seq_len, TILE, LIMITED
        )
        middle = tl.maximum(tl.minimum(seen_by_all, end), 0) // BLOCK_N * BLOCK_N
        table = block_tables + i_s.to(tl.int64) * table_stride
        p_values = values + i_s.to(tl.int64) * value_stride_seq + i_h * D
        p_scales = scales + i_s.to(tl.int64) * scale_stride_seq + i_h * scale_stride_head
        p_codes = codes + i_h * stride_head
        b_m = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        b_l = tl.zeros((BLOCK_M,), tl.float32)
        b_o = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        b_m, b_l, b_o = _attend_tiles(
            b_m, b_l, b_o, b_a, b_unit, o_limit, table, p_codes, p_scales, p_values, stride_block,
            stride_row, value_stride, 0, middle, BLOCK_SIZE, D, BLOCK_N, BLOCK_D, False,
        )  # fmt: skip
        b_m, b_l, b_o = _attend_tiles(
            b_m, b_l, b_o, b_a, b_unit, o_limit, table, p_codes, p_scales, p_values, stride_block,
            stride_row, value_stride, middle, end, BLOCK_SIZE, D, BLOCK_N, BLOCK_D, True,
        )  # fmt: skip
        b_o = b_o / tl.where(b_l == 0.0, 1.0, b_l)[:, None]
        heads = tl.num_programs(1) * GROUP
        p_out = out + (o_t * heads + o_h) * D + o_d[None, :]
        tl.store(p_out, b_o.to(out.dtype.element_ty), mask=m_q)


@jit
def _order_kernel(
    scales: tl.tensor, out: tl.tensor, block_tables: tl.tensor, seq_lens: tl.tensor,
    stride_block: tl.tensor, stride_row: tl.tensor, stride_head: tl.tensor,
    out_stride_seq: tl.tensor, out_stride_head: tl.tensor, table_stride: tl.tensor,
    BLOCK_SIZE: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    """ROWS positions of one sequence and KV head."""
    i_s, i_h = tl.program_id(1), tl.program_id(2)
    o_n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_n = o_n < tl.load(seq_lens + i_s)
    p_table = block_tables + i_s.to(tl.int64) * table_stride + o_n // BLOCK_SIZE
    block = tl.load(p_table, mask=m_n, other=0).to(tl.int64)
    p_scale = scales + block * stride_block + (o_n % BLOCK_SIZE) * stride_row + i_h * stride_head
    p_out = out + i_s.to(tl.int64) * out_stride_seq + i_h * out_stride_head + o_n
    tl.store(p_out, tl.load(p_scale, mask=m_n, other=0.0), mask=m_n)


def _ordered_scales(
    scales: torch.Tensor, tables: torch.Tensor, seq_lens: torch.Tensor
) -> torch.Tensor:
    """`[S, Hkv, positions]` of `[num_blocks, block_size, Hkv]`; past a sequence anything."""
    block_size, kv_heads = scales.shape[1:]
    num_seqs, width = tables.shape
    # rows of whole sixteens, so that they are loaded in fours
    length = -(-width * block_size // 16) * 16
    out = torch.empty(num_seqs, kv_heads, length, dtype=torch.float32, device=scales.device)
    _order_kernel[(-(-width * block_size // _ROWS), num_seqs, kv_heads)](
        scales, out, tables, seq_lens, *scales.stride(), out.stride(0), out.stride(1),
        tables.stride(0), BLOCK_SIZE=block_size, ROWS=_ROWS, num_warps=4,
    )  # fmt: skip
    return out


def attend_fp8_scores(
    q: torch.Tensor, k_cache: QuantKV, v_cache: QuantKV, *,
    block_tables: torch.Tensor, cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor,
    scale: float, max_seqlen_q: int, max_seqlen_k: int, limits: torch.Tensor | None = None,
    config: AttentionConfig | None = None,
) -> torch.Tensor:  # fmt: skip
    """`quantized_attention` over FP8 codes on the device of `q`, queries rounded to e4m3."""
    tokens, heads, dim = q.shape
    block_size, kv_heads = k_cache.codes.shape[1:3]
    assert q.stride(-1) == k_cache.codes.stride(-1) == block_tables.stride(-1) == 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    group, num_seqs = heads // kv_heads, len(seq_lens)
    config = config or attention_config(q.device, head_dim=dim, rows=group, decode=False)
    width = min(-(-max_seqlen_k // block_size), block_tables.shape[1])
    tables = block_tables[:, :width]
    values = widen_kv(v_cache, block_tables=tables, seq_lens=seq_lens, dtype=q.dtype)[0]
    scales = _ordered_scales(k_cache.scales, tables, seq_lens)
    tiles = -(-max_seqlen_q // (config.block_m // group))
    _prefill_fp8_kernel[(tiles, kv_heads, num_seqs)](
        q, k_cache.codes, scales, values, out, block_tables, cu_seqlens_q, seq_lens,
        seq_lens if limits is None else limits, scale * _LOG2_E, q.stride(0), q.stride(1),
        *k_cache.codes.stride()[:3], *scales.stride()[:2], width * values.stride(0),
        values.stride(1), block_tables.stride(0), BLOCK_SIZE=block_size, GROUP=group, D=dim,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_D=max(32, next_power_of_2(dim)),
        LIMITED=limits is not None, ENCODE=INTERPRETED, num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip
    return out
