"""Rotary position embedding, half-split ("NeoX") pairs.

Channel d of the first half rotates with channel d + D/2 by the angle of its position:

    out[d]       = x[d] * cos[d]             - x[d + D/2] * sin[d]
    out[d + D/2] = x[d + D/2] * cos[d + D/2] + x[d] * sin[d + D/2]

`cos` and `sin` hold one row per token, so plain positions and multi-axis (M-RoPE) positions are
the same op: the caller chooses the angles.
"""

from __future__ import annotations

import torch

from .launch import jit, next_power_of_2, row_warps, tl

__all__ = ["apply_rope", "apply_rope_ref"]


def apply_rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotated copies of `q [T, H, D]` and `k [T, Hkv, D]`; `cos`, `sin` are `[T, D]`."""
    run = apply_rope_triton if q.is_cuda else apply_rope_ref
    return run(q, k, cos, sin)


def apply_rope_ref(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_rope` in torch."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return q * cos + _swap_halves(q) * sin, k * cos + _swap_halves(k) * sin


def _swap_halves(x: torch.Tensor) -> torch.Tensor:
    low, high = x.chunk(2, dim=-1)
    return torch.cat((-high, low), dim=-1)


@jit
def _rotate(
    x: tl.tensor, out: tl.tensor, stride_t: tl.tensor, stride_h: tl.tensor, i_t: tl.tensor,
    b_cos1: tl.tensor, b_cos2: tl.tensor, b_sin1: tl.tensor, b_sin2: tl.tensor, HEADS: tl.constexpr,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """Rotate every head of one token of `x` into the contiguous `out`."""
    o_h = tl.arange(0, BLOCK_H)[:, None]
    o_d = tl.arange(0, BLOCK_D)[None, :]
    mask = (o_h < HEADS) & (o_d < HALF)
    p_x = x + i_t * stride_t + o_h * stride_h + o_d
    b_1 = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)
    b_2 = tl.load(p_x + HALF, mask=mask, other=0.0).to(tl.float32)
    p_out = out + (i_t * HEADS + o_h) * (2 * HALF) + o_d
    dtype = out.dtype.element_ty
    tl.store(p_out, (b_1 * b_cos1 - b_2 * b_sin1).to(dtype), mask=mask)
    tl.store(p_out + HALF, (b_2 * b_cos2 + b_1 * b_sin2).to(dtype), mask=mask)


@jit
def _rope_kernel(
    q: tl.tensor, k: tl.tensor, cos: tl.tensor, sin: tl.tensor, q_out: tl.tensor, k_out: tl.tensor,
    q_stride_t: tl.tensor, q_stride_h: tl.tensor, k_stride_t: tl.tensor, k_stride_h: tl.tensor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
    BLOCK_KV: tl.constexpr, BLOCK_D: tl.constexpr,
) -> None:  # fmt: skip
    """One token per program: its angles are loaded once for all heads of q and k."""
    i_t = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    m_d = o_d < HALF
    o_angle = i_t * (2 * HALF) + o_d
    b_cos1 = tl.load(cos + o_angle, mask=m_d, other=0.0).to(tl.float32)
    b_cos2 = tl.load(cos + o_angle + HALF, mask=m_d, other=0.0).to(tl.float32)
    b_sin1 = tl.load(sin + o_angle, mask=m_d, other=0.0).to(tl.float32)
    b_sin2 = tl.load(sin + o_angle + HALF, mask=m_d, other=0.0).to(tl.float32)
    _rotate(q, q_out, q_stride_t, q_stride_h, i_t, b_cos1, b_cos2, b_sin1, b_sin2,
            HEADS, HALF, BLOCK_H, BLOCK_D)  # fmt: skip
    _rotate(k, k_out, k_stride_t, k_stride_h, i_t, b_cos1, b_cos2, b_sin1, b_sin2,
            KV_HEADS, HALF, BLOCK_KV, BLOCK_D)  # fmt: skip


def apply_rope_triton(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`apply_rope` on the device of `q`; q and k may be views into one qkv tensor."""
    tokens, heads, dim = q.shape
    kv_heads = k.shape[1]
    assert dim % 2 == 0 and q.stride(-1) == 1 and k.stride(-1) == 1
    assert cos.shape == sin.shape == (tokens, dim)
    q_out, k_out = q.new_empty(q.shape), k.new_empty(k.shape)
    if tokens:
        _rope_kernel[(tokens,)](
            q, k, cos.contiguous(), sin.contiguous(), q_out, k_out,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            HEADS=heads, KV_HEADS=kv_heads, HALF=dim // 2,
            BLOCK_H=next_power_of_2(heads), BLOCK_KV=next_power_of_2(kv_heads),
            BLOCK_D=next_power_of_2(dim // 2), num_warps=row_warps(heads * dim),
        )  # fmt: skip
    return q_out, k_out
