"""Ops whose result is wanted only in eight bits: the row never returns to memory in full width.

    add_rms_norm_quant:  r' = round(x + r);  codes, scale = quantize(rms_norm(r'))
    silu_mul_quant:      codes, scale = quantize(silu(gate) * up)

Every rounding of the separate ops is kept, so that fusing changes no code; compiled, the sum of a
norm may run in another order than the norm's own, which moves the last bit of some rows. Per token
of width h in bf16 the first moves 7h bytes where add, norm and quantise apart move 13h or more.
"""

from __future__ import annotations

import torch

from .activations import (
    EightBitTarget,
    quantize_fp8_ref,
    quantize_int8_ref,
    quantize_row,
)
from .launch import jit, tl
from .norm import add_rms_norm_ref, rms_norm_ref
from .silu_mul import silu_mul_ref

__all__ = [
    "add_rms_norm_quant",
    "add_rms_norm_quant_ref",
    "silu_mul_quant",
    "silu_mul_quant_ref",
]

_QUANTIZE = {torch.float8_e4m3fn: quantize_fp8_ref, torch.int8: quantize_int8_ref}


def add_rms_norm_quant(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """(codes `[T, D]` of `dtype`, scales `[T]`, new residual) of `x [T, D]`; e4m3 or int8.

    Without a residual `x` starts the stream, and is itself the new residual.
    """
    run = add_rms_norm_quant_triton if x.is_cuda else add_rms_norm_quant_ref
    return run(x, residual, weight, eps, dtype=dtype)


def silu_mul_quant(
    gate_up: torch.Tensor, *, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes `[T, I]` of `dtype`, scales `[T]`) of the SwiGLU product of `gate_up [T, 2I]`."""
    run = silu_mul_quant_triton if gate_up.is_cuda else silu_mul_quant_ref
    return run(gate_up, dtype=dtype)


def add_rms_norm_quant_ref(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`add_rms_norm_quant` in torch."""
    if residual is None:
        normed, total = rms_norm_ref(x, weight, eps), x
    else:
        normed, total = add_rms_norm_ref(x, residual, weight, eps)
    return *_QUANTIZE[dtype](normed), total


def silu_mul_quant_ref(
    gate_up: torch.Tensor, *, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`silu_mul_quant` in torch."""
    return _QUANTIZE[dtype](silu_mul_ref(gate_up))


@jit
def _norm_quant_kernel(
    x: tl.tensor, residual: tl.tensor, weight: tl.tensor, total: tl.tensor, codes: tl.tensor,
    scales: tl.tensor, stride_x: tl.tensor, stride_r: tl.tensor, eps: tl.tensor, K: tl.constexpr,
    LARGEST: tl.constexpr, FLOOR: tl.constexpr, BLOCK_K: tl.constexpr, ENCODE: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> None:  # fmt: skip
    """One token per program."""
    i_m = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    b_x = tl.load(x + i_m * stride_x + o_k, mask=m_k, other=0.0)
    if HAS_RESIDUAL:
        b_x += tl.load(residual + i_m * stride_r + o_k, mask=m_k, other=0.0)
        tl.store(total + i_m * K + o_k, b_x, mask=m_k)
    b_wide = b_x.to(tl.float32)
    b_unit = (b_wide * tl.rsqrt(tl.sum(b_wide * b_wide, axis=0) / K + eps)).to(b_x.dtype)
    b_y = (tl.load(weight + o_k, mask=m_k, other=0.0) * b_unit).to(tl.float32)
    quantize_row(b_y, codes, scales, i_m, o_k, m_k, K, LARGEST, FLOOR, ENCODE)


@jit
def _silu_quant_kernel(
    gate_up: tl.tensor, codes: tl.tensor, scales: tl.tensor, stride_x: tl.tensor, K: tl.constexpr,
    LARGEST: tl.constexpr, FLOOR: tl.constexpr, BLOCK_K: tl.constexpr, ENCODE: tl.constexpr,
) -> None:  # fmt: skip
    """One token per program; K is the width of the product."""
    i_m = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    p_gate = gate_up + i_m * stride_x + o_k
    b_gate = tl.load(p_gate, mask=m_k, other=0.0).to(tl.float32)
    b_up = tl.load(p_gate + K, mask=m_k, other=0.0)
    b_y = (b_gate / (1.0 + tl.exp(-b_gate))).to(b_up.dtype) * b_up
    quantize_row(b_y.to(tl.float32), codes, scales, i_m, o_k, m_k, K, LARGEST, FLOOR, ENCODE)


def add_rms_norm_quant_triton(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """`add_rms_norm_quant` on the device of `x`."""
    tokens, width = x.shape
    assert x.stride(1) == 1 and (residual is None or residual.stride(1) == 1)
    target = EightBitTarget(tokens, width, dtype, x.device)
    total = x
    if residual is not None:
        total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if tokens:
        stride = 0 if residual is None else residual.stride(0)
        _norm_quant_kernel[(tokens,)](
            x, residual, weight, total, *target.pointers, x.stride(0), stride, eps,
            HAS_RESIDUAL=residual is not None, **target.options,
        )  # fmt: skip
    return target.codes, target.scales, total


def silu_mul_quant_triton(
    gate_up: torch.Tensor, *, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """`silu_mul_quant` on the device of `gate_up`."""
    tokens, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.shape[1] % 2 == 0 and gate_up.stride(1) == 1
    target = EightBitTarget(tokens, width, dtype, gate_up.device)
    if tokens:
        _silu_quant_kernel[(tokens,)](
            gate_up, *target.pointers, gate_up.stride(0), **target.options
        )
    return target.codes, target.scales
