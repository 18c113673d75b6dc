"""Attention of many queries over coded KV: the keys and values they see are widened once.

Each tile of queries that reads codes decodes them anew. With many queries per sequence it is
cheaper to write `(u - z) * s` (see `kv_codes`), rounded to the dtype of the queries, into a dense
scratch and to let the plain kernel read that:

    widening moves (W + 4 + 2 D) bytes per position and KV head, for K and V each, once per call.
"""

from __future__ import annotations

import torch

from .coded_tile import scales_zeros
from .kv_codes import KVFormat, QuantKV
from .launch import jit, next_power_of_2, tl
from .paged_attention import paged_attention_triton

__all__ = ["attend_widened", "widen_kv", "widening_pays"]

_QUERIES = 16
_SCRATCH = 256 << 20
_ROWS = 64


def widening_pays(q: torch.Tensor, k_cache: QuantKV, *, num_seqs: int, max_seqlen_k: int) -> bool:
    """Whether sequences have 16 queries on average and the scratch stays within 256 MiB."""
    kv_heads = k_cache.codes.shape[2]
    scratch = 2 * num_seqs * max_seqlen_k * kv_heads * k_cache.head_dim * q.element_size()
    return len(q) >= _QUERIES * num_seqs and scratch <= _SCRATCH


def attend_widened(
    q: torch.Tensor, k_cache: QuantKV, v_cache: QuantKV, *,
    block_tables: torch.Tensor, cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor,
    scale: float, max_seqlen_q: int, max_seqlen_k: int, limits: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`quantized_attention` on the device of `q`, through a scratch of the dtype of `q`."""
    width = min(-(-max_seqlen_k // k_cache.codes.shape[1]), block_tables.shape[1])
    tables = block_tables[:, :width]
    scratch = widen_kv(k_cache, v_cache, block_tables=tables, seq_lens=seq_lens, dtype=q.dtype)
    places = torch.arange(tables.numel(), dtype=torch.int32, device=q.device).view(-1, width)
    return paged_attention_triton(
        q, *scratch, block_tables=places, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens,
        scale=scale, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        limits=limits,
    )  # fmt: skip


@jit
def _widen_kernel(
    k_codes: tl.tensor, v_codes: tl.tensor, k_scales: tl.tensor, v_scales: tl.tensor,
    out: tl.tensor, block_tables: tl.tensor, seq_lens: tl.tensor, out_stride_kv: tl.tensor,
    out_stride_seq: tl.tensor, stride_block: tl.tensor, stride_row: tl.tensor,
    stride_head: tl.tensor, scale_stride_block: tl.tensor, scale_stride_row: tl.tensor,
    scale_stride_head: tl.tensor, table_stride: tl.tensor, BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:  # fmt: skip
    """ROWS positions of one sequence and KV head of one of PARTS caches."""
    i_s, i_h = tl.program_id(1) // PARTS, tl.program_id(2)
    seq_len = tl.load(seq_lens + i_s)
    i_n = tl.program_id(0) * ROWS
    if i_n < seq_len:
        is_value = tl.program_id(1) % PARTS
        codes, scales = k_codes, k_scales
        if is_value == 1:
            codes, scales = v_codes, v_scales
        o_n, o_c = i_n + tl.arange(0, ROWS), tl.arange(0, BLOCK_C)
        m_n = o_n < seq_len
        p_table = block_tables + i_s.to(tl.int64) * table_stride + o_n // BLOCK_SIZE
        block = tl.load(p_table, mask=m_n, other=0).to(tl.int64)
        o_row = block * stride_block + (o_n % BLOCK_SIZE) * stride_row + i_h * stride_head
        o_scale = block * scale_stride_block + (o_n % BLOCK_SIZE) * scale_stride_row
        m_kv = m_n[:, None] & (o_c < HALF)[None, :]
        b_scale, b_z = scales_zeros(scales + o_scale + i_h * scale_stride_head, m_n, BITS)
        p_codes = codes + o_row[:, None] + o_c[None, :]
        if BITS == 4:
            b_c = tl.load(p_codes, mask=m_kv, other=0)
            b_low, b_high = (b_c & 15).to(tl.float32), (b_c >> 4).to(tl.float32)
        else:
            b_low = tl.load(p_codes, mask=m_kv, other=0.0).to(tl.float32)
            b_high = tl.load(p_codes + HALF, mask=m_kv, other=0.0).to(tl.float32)
        b_low = (b_low - b_z[:, None]) * b_scale[:, None]
        b_high = (b_high - b_z[:, None]) * b_scale[:, None]
        p_out = out + is_value.to(tl.int64) * out_stride_kv + i_s.to(tl.int64) * out_stride_seq
        p_out += (o_n.to(tl.int64) * tl.num_programs(2) + i_h)[:, None] * (2 * HALF) + o_c[None, :]
        tl.store(p_out, b_low.to(out.dtype.element_ty), mask=m_kv)
        tl.store(p_out + HALF, b_high.to(out.dtype.element_ty), mask=m_kv)


def widen_kv(
    *caches: QuantKV, block_tables: torch.Tensor, seq_lens: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """`[len(caches), S * blocks, block_size, Hkv, D]`: the blocks of `block_tables [S, blocks]`.

    One or two caches, blocks in the order of the tables. Rows past the length of their sequence
    are left as they were found.
    """
    num_seqs, width = block_tables.shape
    first, last = caches[0], caches[-1]
    block_size, kv_heads = first.codes.shape[1:3]
    dim, parts = first.head_dim, len(caches)
    assert first.codes.stride() == last.codes.stride() and block_tables.stride(-1) == 1
    assert first.scales.stride() == last.scales.stride() and first.codes.stride(-1) == 1
    shape = (parts, num_seqs * width, block_size, kv_heads, dim)
    out = torch.empty(shape, dtype=dtype, device=first.codes.device)
    if out.numel():
        _widen_kernel[(-(-width * block_size // _ROWS), parts * num_seqs, kv_heads)](
            first.codes, last.codes, *(c.scales.view(torch.int32) for c in (first, last)), out,
            block_tables, seq_lens, out.stride(0), width * out.stride(1),
            *first.codes.stride()[:3], *first.scales.stride(), block_tables.stride(0),
            BLOCK_SIZE=block_size, BITS=4 if first.format is KVFormat.INT4 else 8, HALF=dim // 2,
            ROWS=_ROWS, BLOCK_C=max(16, next_power_of_2(dim // 2)), PARTS=parts, num_warps=4,
        )  # fmt: skip
    return out
