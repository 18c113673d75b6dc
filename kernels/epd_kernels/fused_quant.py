"""Ops whose result is wanted only in eight bits: the row never returns to memory in full width.

    add_rms_norm_quant:  r' = round(x + r);  codes, scale = quantize(rms_norm(r'))
    silu_mul_quant:      codes, scale = quantize(silu(gate) * up)

Every rounding of the separate ops is kept, so that fusing changes no code; compiled, the sum of a
norm may run in another order than the norm's own, which moves the last bit of some rows. Per token
of width h in bf16 the first moves 7h bytes where add, norm and quantise apart move 13h or more.
"""

from __future__ import annotations

import torch

from .activations import quantize_fp8_ref, quantize_int8_ref
from .launch import (
    INTERPRETED,
    constant,
    device_facts,
    gdc_launch_dependents,
    gdc_wait,
    jit,
    tl,
)
from .norm import add_rms_norm_ref, rms_norm_ref
from .row_codes import EightBitTarget, load_row, no_chunks, quantize_row
from .silu_mul import silu_mul_ref

__all__ = [
    "add_rms_norm_quant",
    "add_rms_norm_quant_ref",
    "silu_mul_quant",
    "silu_mul_quant_ref",
]

_QUANTIZE = {torch.float8_e4m3fn: quantize_fp8_ref, torch.int8: quantize_int8_ref}
_USE_PTX = constant(not INTERPRETED)
# g / (1 + exp(-g)) by the same two approximations, without what the compiler adds for subnormal
# exponentials (lost in the sum) and for exponentials beyond 2^126 (no number that small has a code)
_SILU = constant("""{
    .reg .f32 t;
    mul.f32 t, $1, 0fBFB8AA3B;
    ex2.approx.ftz.f32 t, t;
    add.f32 t, t, 0f3F800000;
    rcp.approx.ftz.f32 t, t;
    mul.f32 $0, $1, t;
}""")


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
    HAS_RESIDUAL: tl.constexpr, EARLY: tl.constexpr, OPENS: tl.constexpr,
) -> None:  # fmt: skip
    """One token per program."""
    CHUNKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    i_m = tl.program_id(0).to(tl.int64)
    # no kernel writes weights: these may travel while the kernel ahead drains
    b_weight = load_row(weight, K, BLOCK_K)
    if EARLY:
        gdc_wait()
    if OPENS:
        gdc_launch_dependents()
    b_x = load_row(x + i_m * stride_x, K, BLOCK_K)
    if HAS_RESIDUAL:
        b_residual = load_row(residual + i_m * stride_r, K, BLOCK_K)
        b_total = no_chunks()
        for c in tl.static_range(CHUNKS):
            o_k = c * BLOCK_K + tl.arange(0, BLOCK_K)
            b_total += (b_x[c] + b_residual[c],)
            tl.store(total + i_m * K + o_k, b_total[c], mask=o_k < K)
        b_x = b_total
    b_squares = tl.zeros((BLOCK_K,), tl.float32)
    for c in tl.static_range(CHUNKS):
        b_squares += b_x[c].to(tl.float32) * b_x[c].to(tl.float32)
    b_factor = tl.rsqrt(tl.sum(b_squares, axis=0) / K + eps)
    b_y = no_chunks()
    for c in tl.static_range(CHUNKS):
        b_y += (b_weight[c] * (b_x[c].to(tl.float32) * b_factor).to(b_x[c].dtype),)
    quantize_row(b_y, codes, scales, i_m, K, LARGEST, FLOOR, BLOCK_K, ENCODE)


@jit
def _product(b_gate: tl.tensor, b_up: tl.tensor) -> tl.tensor:
    """silu(gate) * up, rounded as the separate op rounds it, or less than 1e-36 where that is."""
    b_gate = b_gate.to(tl.float32)
    if _USE_PTX:
        b_silu = tl.inline_asm_elementwise(
            _SILU, "=f,f", [b_gate], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        b_silu = b_gate / (1.0 + tl.exp(-b_gate))
    return b_silu.to(b_up.dtype) * b_up


@jit
def _silu_quant_kernel(
    gate_up: tl.tensor, codes: tl.tensor, scales: tl.tensor, stride_x: tl.tensor, K: tl.constexpr,
    LARGEST: tl.constexpr, FLOOR: tl.constexpr, BLOCK_K: tl.constexpr, ENCODE: tl.constexpr,
    EARLY: tl.constexpr, OPENS: tl.constexpr,
) -> None:  # fmt: skip
    """One token per program; K is the width of the product."""
    if EARLY:
        gdc_wait()
    if OPENS:
        gdc_launch_dependents()
    i_m = tl.program_id(0).to(tl.int64)
    p_gate = gate_up + i_m * stride_x
    b_gate, b_up = load_row(p_gate, K, BLOCK_K), load_row(p_gate + K, K, BLOCK_K)
    b_y = no_chunks()
    for c in tl.static_range((K + BLOCK_K - 1) // BLOCK_K):
        b_y += (_product(b_gate[c], b_up[c]),)
    quantize_row(b_y, codes, scales, i_m, K, LARGEST, FLOOR, BLOCK_K, ENCODE)


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
    chunk = _chunk(tokens, width, gate_up.device)
    target = EightBitTarget(tokens, width, dtype, gate_up.device, chunk=chunk)
    if tokens:
        _silu_quant_kernel[(tokens,)](
            gate_up, *target.pointers, gate_up.stride(0), **target.options
        )
    return target.codes, target.scales


def _chunk(tokens: int, width: int, device: torch.device) -> int:
    """4096, or 2048 where rows are no more than multiprocessors and that pads them less.

    Measured on an H200 with 11,008 and 14,336 columns, 1 to 2,048 tokens. No code depends on it.
    """
    few = tokens <= device_facts(device).num_sms
    return 2048 if few and 0 < width % 4096 <= 2048 else 4096
