"""What lies between the qkv product and attention over coded KV, in one kernel.

Per token and head: RMSNorm of q and k where the model has it, rotary embedding, smoothing, coding
of keys and values, and the store into the paged cache. With factors f per KV head and channel

    k' = f * rope(k),    q' = rope(q) / f

so scores stay what they were while outlying channels of k shrink before four bits are put over
them (post-RoPE scaling of FireQ, arXiv 2505.20839). Everything after the norm is fp32 until it is
coded; q' is rounded to the dtype of q once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .kv_codes import INT4_FLOOR, KVFormat, QuantKV, quantize_kv
from .launch import INTERPRETED, jit, next_power_of_2, row_warps, tl
from .norm import rms_norm_ref
from .rope import apply_rope_ref
from .row_codes import e4m3_bits

__all__ = ["HeadNorms", "rope_store_kv", "rope_store_kv_ref"]


class HeadNorms(NamedTuple):
    """RMSNorm weights `[D]` of query and key heads, and their epsilon."""

    q: torch.Tensor
    k: torch.Tensor
    eps: float


def rope_store_kv(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cos: torch.Tensor, sin: torch.Tensor,
    k_cache: QuantKV, v_cache: QuantKV, slot_mapping: torch.Tensor,
    norms: HeadNorms | None = None, factors: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Queries `[T, H, D]`, normed, rotated and divided by the factors; writes the coded k and v.

    `q [T, H, D]`, `k`, `v` `[T, Hkv, D]` come from the projection; `cos`, `sin` are `[T, D]`;
    `factors` fp32 `[Hkv, D]`, None for ones. `slot_mapping` int64 `[T]` as of `store_kv`.
    """
    run = rope_store_kv_triton if q.is_cuda else rope_store_kv_ref
    return run(q, k, v, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache,
               slot_mapping=slot_mapping, norms=norms, factors=factors)  # fmt: skip


def rope_store_kv_ref(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cos: torch.Tensor, sin: torch.Tensor,
    k_cache: QuantKV, v_cache: QuantKV, slot_mapping: torch.Tensor,
    norms: HeadNorms | None = None, factors: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`rope_store_kv` in torch."""
    dtype = q.dtype
    if norms is not None:
        q, k = rms_norm_ref(q, norms.q, norms.eps), rms_norm_ref(k, norms.k, norms.eps)
    q, k = apply_rope_ref(q.float(), k.float(), cos.float(), sin.float())
    if factors is not None:
        group = q.shape[1] // k.shape[1]
        q, k = q / factors.repeat_interleave(group, dim=0), k * factors
    kept = slot_mapping >= 0
    slots, block_size = slot_mapping[kept], k_cache.codes.shape[1]
    block, row = slots // block_size, slots % block_size
    for source, cache in ((k, k_cache), (v, v_cache)):
        coded = quantize_kv(source[kept], cache.format)
        # a store through bytes: not every index op takes e4m3
        cache.codes.view(torch.uint8)[block, row] = coded.codes.view(torch.uint8)
        cache.scales[block, row] = coded.scales
    return q.to(dtype)


@jit
def _rotated(
    x: tl.tensor, weight: tl.tensor, o_x: tl.tensor, o_d: tl.tensor, mask: tl.tensor,
    b_cos1: tl.tensor, b_cos2: tl.tensor, b_sin1: tl.tensor, b_sin2: tl.tensor, eps: tl.tensor,
    HALF: tl.constexpr, NORMED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Both halves of the heads of one token, normed if asked and rotated, fp32."""
    b_1 = tl.load(x + o_x, mask=mask, other=0.0)
    b_2 = tl.load(x + o_x + HALF, mask=mask, other=0.0)
    if NORMED:
        dtype = b_1.dtype
        m_d = o_d < HALF
        b_w1 = tl.load(weight + o_d, mask=m_d, other=0.0)
        b_w2 = tl.load(weight + o_d + HALF, mask=m_d, other=0.0)
        b_1, b_2 = b_1.to(tl.float32), b_2.to(tl.float32)
        b_mean = (tl.sum(b_1 * b_1, axis=1) + tl.sum(b_2 * b_2, axis=1)) / (2 * HALF)
        b_r = tl.rsqrt(b_mean + eps)[:, None]
        b_1, b_2 = b_w1 * (b_1 * b_r).to(dtype), b_w2 * (b_2 * b_r).to(dtype)
    b_1, b_2 = b_1.to(tl.float32), b_2.to(tl.float32)
    return b_1 * b_cos1 - b_2 * b_sin1, b_2 * b_cos2 + b_1 * b_sin2


@jit
def _rounded(b_x: tl.tensor) -> tl.tensor:
    """Half to even, for |x| < 2^22."""
    return b_x + 12582912.0 - 12582912.0


@jit
def _store_coded(
    b_1: tl.tensor, b_2: tl.tensor, codes: tl.tensor, scales: tl.tensor, o_codes: tl.tensor,
    o_scales: tl.tensor, mask: tl.tensor, m_h: tl.tensor, BITS: tl.constexpr, FLOOR: tl.constexpr,
    HALF: tl.constexpr, ENCODE: tl.constexpr,
) -> None:  # fmt: skip
    """Code the rows whose halves are `b_1` and `b_2`, zero where masked, and store them."""
    if BITS == 4:
        b_low = tl.minimum(tl.minimum(tl.min(b_1, axis=1), tl.min(b_2, axis=1)), 0.0)
        b_high = tl.maximum(tl.maximum(tl.max(b_1, axis=1), tl.max(b_2, axis=1)), 0.0)
        b_range = b_high - b_low
        b_step = tl.maximum(tl.div_rn(b_range, 15.0 + tl.zeros_like(b_range)), FLOOR)
        b_bits = (b_step.to(tl.int32, bitcast=True) + 15) & -16
        b_step = b_bits.to(tl.float32, bitcast=True)
        b_zero = _rounded(tl.div_rn(-b_low, b_step))
        tl.store(scales + o_scales, b_bits | b_zero.to(tl.int32), mask=m_h)
        b_step, b_zero = b_step[:, None] + tl.zeros_like(b_1), b_zero[:, None]
        b_1 = tl.minimum(tl.maximum(_rounded(tl.div_rn(b_1, b_step)) + b_zero, 0.0), 15.0)
        b_2 = tl.minimum(tl.maximum(_rounded(tl.div_rn(b_2, b_step)) + b_zero, 0.0), 15.0)
        b_code = b_1.to(tl.uint8) | (b_2.to(tl.uint8) << 4)
        tl.store(codes + o_codes, b_code, mask=mask)
    else:
        b_top = tl.maximum(tl.max(tl.abs(b_1), axis=1), tl.max(tl.abs(b_2), axis=1))
        b_step = tl.maximum(tl.div_rn(b_top, 448.0 + tl.zeros_like(b_top)), 1e-12)
        tl.store(scales + o_scales, b_step.to(tl.int32, bitcast=True), mask=m_h)
        b_step = b_step[:, None] + tl.zeros_like(b_1)
        b_1 = tl.minimum(tl.maximum(tl.div_rn(b_1, b_step), -448.0), 448.0)
        b_2 = tl.minimum(tl.maximum(tl.div_rn(b_2, b_step), -448.0), 448.0)
        if ENCODE:
            b_1, b_2 = e4m3_bits(b_1), e4m3_bits(b_2)
        tl.store(codes + o_codes, b_1.to(codes.dtype.element_ty), mask=mask)
        tl.store(codes + o_codes + HALF, b_2.to(codes.dtype.element_ty), mask=mask)


@jit
def _rope_store_kernel(
    q: tl.tensor, k: tl.tensor, v: tl.tensor, cos: tl.tensor, sin: tl.tensor, q_norm: tl.tensor,
    k_norm: tl.tensor, factors: tl.tensor, q_out: tl.tensor, k_codes: tl.tensor,
    v_codes: tl.tensor, k_scales: tl.tensor, v_scales: tl.tensor, slot_mapping: tl.tensor,
    q_stride_t: tl.tensor, q_stride_h: tl.tensor, k_stride_t: tl.tensor, k_stride_h: tl.tensor,
    v_stride_t: tl.tensor, v_stride_h: tl.tensor, stride_block: tl.tensor, stride_row: tl.tensor,
    stride_head: tl.tensor, scale_stride_block: tl.tensor, scale_stride_row: tl.tensor,
    scale_stride_head: tl.tensor, eps: tl.tensor, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr, HALF: tl.constexpr, BITS: tl.constexpr, FLOOR: tl.constexpr,
    NORMED: tl.constexpr, SMOOTHED: tl.constexpr, ENCODE: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """One token per program: its angles are loaded once for all heads."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < HALF
    o_angle = i_t * (2 * HALF) + o_d
    b_cos1 = tl.load(cos + o_angle, mask=m_d, other=0.0).to(tl.float32)
    b_cos2 = tl.load(cos + o_angle + HALF, mask=m_d, other=0.0).to(tl.float32)
    b_sin1 = tl.load(sin + o_angle, mask=m_d, other=0.0).to(tl.float32)
    b_sin2 = tl.load(sin + o_angle + HALF, mask=m_d, other=0.0).to(tl.float32)
    o_h = tl.arange(0, BLOCK_H)[:, None]
    m_q = (o_h < HEADS) & m_d
    b_1, b_2 = _rotated(q, q_norm, i_t * q_stride_t + o_h * q_stride_h + o_d, o_d, m_q,
                        b_cos1, b_cos2, b_sin1, b_sin2, eps, HALF, NORMED)  # fmt: skip
    if SMOOTHED:
        o_f = (o_h // GROUP) * (2 * HALF) + o_d
        b_1 = tl.div_rn(b_1, tl.load(factors + o_f, mask=m_q, other=1.0))
        b_2 = tl.div_rn(b_2, tl.load(factors + o_f + HALF, mask=m_q, other=1.0))
    p_out = q_out + (i_t * HEADS + o_h) * (2 * HALF) + o_d
    tl.store(p_out, b_1.to(q_out.dtype.element_ty), mask=m_q)
    tl.store(p_out + HALF, b_2.to(q_out.dtype.element_ty), mask=m_q)
    slot = tl.load(slot_mapping + i_t)
    if slot >= 0:
        o_n = tl.arange(0, BLOCK_KV)
        o_kv = o_n[:, None]
        m_kv = (o_kv < KV_HEADS) & m_d
        block, row = slot // BLOCK_SIZE, slot % BLOCK_SIZE
        o_codes = block * stride_block + row * stride_row + o_kv * stride_head + o_d
        o_scales = block * scale_stride_block + row * scale_stride_row + o_n * scale_stride_head
        b_k1, b_k2 = _rotated(k, k_norm, i_t * k_stride_t + o_kv * k_stride_h + o_d, o_d, m_kv,
                            b_cos1, b_cos2, b_sin1, b_sin2, eps, HALF, NORMED)  # fmt: skip
        if SMOOTHED:
            o_fk = o_kv * (2 * HALF) + o_d
            b_k1 *= tl.load(factors + o_fk, mask=m_kv, other=1.0)
            b_k2 *= tl.load(factors + o_fk + HALF, mask=m_kv, other=1.0)
        _store_coded(b_k1, b_k2, k_codes, k_scales, o_codes, o_scales, m_kv, o_n < KV_HEADS,
                     BITS, FLOOR, HALF, ENCODE)  # fmt: skip
        o_v = i_t * v_stride_t + o_kv * v_stride_h + o_d
        b_v1 = tl.load(v + o_v, mask=m_kv, other=0.0).to(tl.float32)
        b_v2 = tl.load(v + o_v + HALF, mask=m_kv, other=0.0).to(tl.float32)
        _store_coded(b_v1, b_v2, v_codes, v_scales, o_codes, o_scales, m_kv, o_n < KV_HEADS,
                     BITS, FLOOR, HALF, ENCODE)  # fmt: skip


def rope_store_kv_triton(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, cos: torch.Tensor, sin: torch.Tensor,
    k_cache: QuantKV, v_cache: QuantKV, slot_mapping: torch.Tensor,
    norms: HeadNorms | None = None, factors: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`rope_store_kv` on the device of `q`; q, k and v may be views into one qkv tensor."""
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == k_cache.codes.stride(-1) == 1
    assert cos.shape == sin.shape == (tokens, dim) and k_cache.head_dim == dim
    for a, b in zip(k_cache, v_cache, strict=True):
        assert a.stride() == b.stride() and a.dtype == b.dtype
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not tokens:
        return out
    int4 = k_cache.format is KVFormat.INT4
    encode = INTERPRETED and not int4
    codes = [c.codes.view(torch.uint8) if encode else c.codes for c in (k_cache, v_cache)]
    scales = [c.scales.view(torch.int32) for c in (k_cache, v_cache)]
    weights = (q, q) if norms is None else (norms.q, norms.k)
    options: dict[str, Any] = {
        "BLOCK_SIZE": k_cache.codes.shape[1], "HEADS": heads, "KV_HEADS": kv_heads,
        "HALF": dim // 2, "BITS": 4 if int4 else 8, "FLOOR": INT4_FLOOR,
        "NORMED": norms is not None, "SMOOTHED": factors is not None, "ENCODE": encode,
        "BLOCK_H": next_power_of_2(heads), "BLOCK_KV": next_power_of_2(kv_heads),
        "BLOCK_D": next_power_of_2(dim // 2), "num_warps": row_warps(heads * dim),
    }  # fmt: skip
    _rope_store_kernel[(tokens,)](
        q, k, v, cos.contiguous(), sin.contiguous(), *weights, q if factors is None else factors,
        out, *codes, *scales, slot_mapping, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        v.stride(0), v.stride(1), *k_cache.codes.stride()[:3], *k_cache.scales.stride(),
        0.0 if norms is None else norms.eps, **options,
    )  # fmt: skip
    return out
