"""Causal attention over a paged cache of four- or eight-bit keys and values.

The op is `paged_attention` with coded caches (see `kv_codes`). With codes u, zeros z and scales
s of a key, and t, y those of a value's scale and zero,

    scale * q.k = s * (q.u - z * sum q),     sum p v = sum (p t) u - sum (p t) y

so codes meet the matrix unit as they are (see `coded_tile`), and everything per token is applied
to scores and weights. Decoding over INT4 runs by single warps where heads have 64 or 128 channels
(see `warp_decode`); many queries per sequence take another way (see `widened_kv`).

Everything a query sees was coded before, its own step's keys included: a prompt in one piece, in
chunks, or behind a cached prefix meets the same codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .attention_reference import paged_attention_ref
from .coded_tile import attend_codes
from .errors import FormatError
from .fp8_scores import FP8_QUERIES, attend_fp8_scores, rounded_queries
from .kv_codes import KVFormat, QuantKV, dequantize_kv
from .launch import INTERPRETED, attention_splits, jit, next_power_of_2, tl
from .paged_attention import visible_rows
from .position_splits import combine_splits, split_span, split_workspace
from .warp_decode import WarpConfig, assembly, decode_warps_kernel, fits_warps
from .widened_kv import attend_widened, widening_pays

__all__ = ["CodedConfig", "coded_config", "quantized_attention", "quantized_attention_ref"]

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class CodedConfig:
    """Tile rows, KV positions per step, warps, stages, and decode programs per multiprocessor.

    `max_registers` may bound what a thread takes, so that more programs are resident.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    occupancy: int = 2
    max_registers: int | None = None
    use_ptx: bool = not INTERPRETED


def coded_config(*, target: KVFormat, head_dim: int, rows: int, decode: bool) -> CodedConfig:
    """The launch configuration for `rows` (query, head) pairs per tile, 16 at least."""
    block_m = max(16, next_power_of_2(rows))
    if INTERPRETED:
        return CodedConfig(block_m, 32, 4, 1)
    if decode and block_m == 16 and head_dim <= 128:
        # one warp: nothing to wait for, and weights need not pass through shared memory
        int4 = target is KVFormat.INT4
        return CodedConfig(16, 32, 1, 3, 9) if int4 else CodedConfig(16, 32, 1, 2, 10)
    if decode:
        return CodedConfig(block_m, 128, 4, 3)
    return CodedConfig(max(64, block_m), 64, 4, 2)


def quantized_attention(
    q: torch.Tensor, k_cache: QuantKV, v_cache: QuantKV, *,
    block_tables: torch.Tensor, cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor,
    scale: float, max_seqlen_q: int, max_seqlen_k: int, limits: torch.Tensor | None = None,
    fp8_scores: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Attention output `[T, num_heads, head_dim]`, arguments as of `paged_attention`.

    Caches are coded: `[num_blocks, block_size, Hkv, W]`, scales `[num_blocks, block_size, Hkv]`.
    With `fp8_scores`, calls of 256 queries per sequence or more round their queries to e4m3 (see
    `fp8_scores`); raises `FormatError` for that over INT4.
    """
    if fp8_scores and k_cache.format is not KVFormat.FP8:
        raise FormatError("fp8_scores needs keys held as fp8, found int4")
    bounds = {"num_seqs": len(seq_lens), "max_seqlen_k": max_seqlen_k}
    many = widening_pays(q, k_cache, **bounds)
    fp8_scores = fp8_scores and many and len(q) >= FP8_QUERIES * len(seq_lens)
    if fp8_scores and not q.is_cuda:
        q = rounded_queries(q).to(q.dtype)
    if not q.is_cuda:
        run = quantized_attention_ref
    elif many:
        run = attend_fp8_scores if fp8_scores else attend_widened
    else:
        run = quantized_attention_triton
    return run(
        q, k_cache, v_cache, block_tables=block_tables, cu_seqlens_q=cu_seqlens_q,
        seq_lens=seq_lens, scale=scale, max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k,
        limits=limits,
    )  # fmt: skip


def quantized_attention_ref(
    q: torch.Tensor, k_cache: QuantKV, v_cache: QuantKV, *,
    block_tables: torch.Tensor, cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor,
    scale: float, max_seqlen_q: int, max_seqlen_k: int, limits: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`quantized_attention` in torch: the blocks of the batch are widened, then attended to."""
    longest = int(seq_lens.max()) if len(seq_lens) else 0
    width = -(-longest // k_cache.codes.shape[1])
    used = torch.arange(width, device=q.device) * k_cache.codes.shape[1] < seq_lens[:, None]
    blocks = (block_tables[:, :width].long() * used).flatten()
    k, v = (dequantize_kv(_taken(cache, blocks)).to(q.dtype) for cache in (k_cache, v_cache))
    tables = torch.arange(len(blocks), device=q.device).view(len(seq_lens), -1)
    return paged_attention_ref(
        q, k, v, block_tables=tables, cu_seqlens_q=cu_seqlens_q, seq_lens=seq_lens, scale=scale,
        max_seqlen_q=max_seqlen_q, max_seqlen_k=max_seqlen_k, limits=limits,
    )  # fmt: skip


def _taken(cache: QuantKV, blocks: torch.Tensor) -> QuantKV:
    """Some blocks of a cache; through bytes, because not every index op takes e4m3."""
    codes = cache.codes.view(torch.uint8)[blocks].view(cache.codes.dtype)
    return QuantKV(codes, cache.scales[blocks])


@jit
def _prefill_codes_kernel(
    q: tl.tensor, k_codes: tl.tensor, v_codes: tl.tensor, k_scales: tl.tensor,
    v_scales: tl.tensor, out: tl.tensor, block_tables: tl.tensor, cu_seqlens_q: tl.tensor,
    seq_lens: tl.tensor, limits: tl.tensor, scale_log2: tl.tensor, q_stride_t: tl.tensor,
    q_stride_h: tl.tensor, stride_block: tl.tensor, stride_row: tl.tensor, stride_head: tl.tensor,
    scale_stride_block: tl.tensor, scale_stride_row: tl.tensor, scale_stride_head: tl.tensor,
    table_stride: tl.tensor, least_queries: tl.tensor, BLOCK_SIZE: tl.constexpr,
    BITS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, USE_PTX: tl.constexpr, LIMITED: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK_M // GROUP queries of one sequence and KV head; row r is query r // GROUP.

    Sequences of fewer than `least_queries` are left to another kernel.
    """
    TILE: tl.constexpr = BLOCK_M // GROUP
    # the last queries see most: start them first
    i_q = (tl.num_programs(0) - 1 - tl.program_id(0)) * TILE
    i_h, i_s = tl.program_id(1), tl.program_id(2)
    q_start = tl.load(cu_seqlens_q + i_s)
    q_len = tl.load(cu_seqlens_q + i_s + 1) - q_start
    if (i_q < q_len) & (q_len >= least_queries):
        seq_len = tl.load(seq_lens + i_s)
        o_r, o_c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
        o_q = i_q + o_r // GROUP
        m_r = (o_q < q_len) & (o_r < TILE * GROUP)
        m_q = m_r[:, None] & (o_c < HALF)[None, :]
        o_t = (q_start + o_q).to(tl.int64)[:, None]
        o_h = (i_h * GROUP + o_r % GROUP)[:, None]
        o_limit, seen_by_all, end = visible_rows(
            limits + q_start, o_q, m_r, i_q, q_len, seq_len, TILE, LIMITED
        )
        _, b_l, b_o1, b_o2 = attend_codes(
            q + o_t * q_stride_t + o_h * q_stride_h + o_c[None, :], m_q, o_limit, seen_by_all,
            block_tables + i_s.to(tl.int64) * table_stride, k_codes + i_h * stride_head,
            v_codes + i_h * stride_head, k_scales + i_h * scale_stride_head,
            v_scales + i_h * scale_stride_head, stride_block, stride_row, scale_stride_block,
            scale_stride_row, scale_log2, 0, end, BLOCK_SIZE, BITS, HALF, BLOCK_M, BLOCK_N,
            BLOCK_C, USE_PTX,
        )  # fmt: skip
        b_l = tl.where(b_l == 0.0, 1.0, b_l)[:, None]
        heads = tl.num_programs(1) * GROUP
        p_out = out + (o_t * heads + o_h) * (2 * HALF) + o_c[None, :]
        tl.store(p_out, (b_o1 / b_l).to(out.dtype.element_ty), mask=m_q)
        tl.store(p_out + HALF, (b_o2 / b_l).to(out.dtype.element_ty), mask=m_q)


@jit
def _decode_codes_kernel(
    q: tl.tensor, k_codes: tl.tensor, v_codes: tl.tensor, k_scales: tl.tensor,
    v_scales: tl.tensor, out: tl.tensor, partial: tl.tensor, stats: tl.tensor,
    block_tables: tl.tensor, cu_seqlens_q: tl.tensor, seq_lens: tl.tensor, limits: tl.tensor,
    scale_log2: tl.tensor, q_stride_t: tl.tensor, q_stride_h: tl.tensor, stride_block: tl.tensor,
    stride_row: tl.tensor, stride_head: tl.tensor, scale_stride_block: tl.tensor,
    scale_stride_row: tl.tensor, scale_stride_head: tl.tensor, table_stride: tl.tensor,
    num_splits: tl.tensor, BLOCK_SIZE: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr,
    HALF: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    USE_PTX: tl.constexpr, LIMITED: tl.constexpr,
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
        o_r, o_c = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_C)
        m_q = (o_r < GROUP)[:, None] & (o_c < HALF)[None, :]
        o_h = i_h * GROUP + o_r
        b_m, b_l, b_o1, b_o2 = attend_codes(
            q + i_t * q_stride_t + o_h[:, None] * q_stride_h + o_c[None, :], m_q,
            tl.zeros((BLOCK_M,), tl.int32) + (seq_len - 1), seq_len,
            block_tables + i_s.to(tl.int64) * table_stride, k_codes + i_h * stride_head,
            v_codes + i_h * stride_head, k_scales + i_h * scale_stride_head,
            v_scales + i_h * scale_stride_head, stride_block, stride_row, scale_stride_block,
            scale_stride_row, scale_log2, start, end, BLOCK_SIZE, BITS, HALF, BLOCK_M, BLOCK_N,
            BLOCK_C, USE_PTX,
        )  # fmt: skip
        heads = tl.num_programs(1) * GROUP
        if num_splits == 1:
            o_out = (i_t * heads + o_h)[:, None] * (2 * HALF) + o_c[None, :]
            b_total = tl.where(b_l == 0.0, 1.0, b_l)[:, None]
            tl.store(out + o_out, (b_o1 / b_total).to(out.dtype.element_ty), mask=m_q)
            tl.store(out + o_out + HALF, (b_o2 / b_total).to(out.dtype.element_ty), mask=m_q)
        else:
            o_row = (i_s.to(tl.int64) * heads + o_h) * num_splits + i_split
            o_out = o_row[:, None] * (2 * HALF) + o_c[None, :]
            tl.store(partial + o_out, b_o1, mask=m_q)
            tl.store(partial + o_out + HALF, b_o2, mask=m_q)
            tl.store(stats + o_row * 2, b_m, mask=o_r < GROUP)
            tl.store(stats + o_row * 2 + 1, b_l, mask=o_r < GROUP)


def quantized_attention_triton(
    q: torch.Tensor, k_cache: QuantKV, v_cache: QuantKV, *,
    block_tables: torch.Tensor, cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor,
    scale: float, max_seqlen_q: int, max_seqlen_k: int, limits: torch.Tensor | None = None,
    config: CodedConfig | WarpConfig | None = None,
) -> torch.Tensor:  # fmt: skip
    """`quantized_attention` on the device of `q`; `config` replaces the built-in choice."""
    tokens, heads, dim = q.shape
    kv_heads = k_cache.codes.shape[2]
    assert heads % kv_heads == 0 and dim == k_cache.head_dim and q.stride(-1) == 1
    for a, b in zip(k_cache, v_cache, strict=True):
        assert a.stride() == b.stride() and a.shape == b.shape and a.dtype == b.dtype
    assert k_cache.codes.stride(-1) == block_tables.stride(-1) == 1
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    group, num_seqs = heads // kv_heads, len(seq_lens)
    caches = (
        k_cache.codes, v_cache.codes, *(c.scales.view(torch.int32) for c in (k_cache, v_cache))
    )  # fmt: skip
    lengths = (
        block_tables, cu_seqlens_q, seq_lens, seq_lens if limits is None else limits,
        scale * _LOG2_E, q.stride(0), q.stride(1), *k_cache.codes.stride()[:3],
        *k_cache.scales.stride(), block_tables.stride(0),
    )  # fmt: skip
    many = max_seqlen_q > 1
    if many:
        tiled = config or coded_config(
            target=k_cache.format, head_dim=dim, rows=group, decode=False
        )
        assert isinstance(tiled, CodedConfig)
        options = _options(tiled, k_cache, group) | {"LIMITED": limits is not None}
        grid = (-(-max_seqlen_q // (tiled.block_m // group)), kv_heads, num_seqs)
        least = 2 if num_seqs > 1 else 1
        _prefill_codes_kernel[grid](q, *caches, out, *lengths, least, **options)
    if not many or num_seqs > 1:
        chosen = config or _decode_config(k_cache, group)
        splits = attention_splits(
            q.device, programs=num_seqs * kv_heads, max_seqlen_k=max_seqlen_k,
            occupancy=chosen.occupancy, num_warps=chosen.num_warps,
        )  # fmt: skip
        partial, stats = split_workspace(out, num_seqs, splits)
        options = _options(chosen, k_cache, group) | {"LIMITED": limits is not None}
        kernel = decode_warps_kernel if isinstance(chosen, WarpConfig) else _decode_codes_kernel
        kernel[(num_seqs, kv_heads, splits)](
            q, *caches, out, partial, stats, *lengths, splits, **options
        )
        if splits > 1:
            combine_splits(partial, stats, out, splits, cu_seqlens_q)
    return out


def _decode_config(kv: QuantKV, group: int) -> CodedConfig | WarpConfig:
    if not INTERPRETED and fits_warps(kv, group):
        return WarpConfig()
    return coded_config(target=kv.format, head_dim=kv.head_dim, rows=group, decode=True)


def _options(config: CodedConfig | WarpConfig, kv: QuantKV, group: int) -> dict[str, Any]:
    """Constants and launch options of a kernel for `group` query heads per KV head."""
    half = kv.head_dim // 2
    options: dict[str, Any] = {
        "BLOCK_SIZE": kv.codes.shape[1], "GROUP": group, "HALF": half,
        "num_warps": config.num_warps, "maxnreg": config.max_registers,
    }  # fmt: skip
    if isinstance(config, WarpConfig):
        return options | assembly(half // 16) | {"GROUPS": config.groups, "num_stages": 1}
    return options | {
        "BITS": 4 if kv.format is KVFormat.INT4 else 8, "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n, "BLOCK_C": max(16, next_power_of_2(half)),
        "USE_PTX": config.use_ptx, "num_stages": config.num_stages,
    }  # fmt: skip
