"""Activations as eight-bit codes with one scale per token, rounded half to even.

    FP8 (e4m3):  scale = absmax / 448,  x ~ code * scale
    INT8:        scale = absmax / 127,  x ~ code * scale

Scales are floored at 1e-12: a row of zeros, such as padding, has code 0 and not NaN.

The kernel keeps a row in registers, so x is read once. Where fp32 cannot be cast to e4m3 (Triton's
interpreter drops the carry and does not saturate) it encodes by integer arithmetic instead. For
|x| >= 2^-6 the exponent is rebased by 120 and 20 mantissa bits are rounded away; below, adding
1.5 * 2^23 to 512 |x| leaves the rounded subnormal in the low bits of the sum.
"""

from __future__ import annotations

from typing import Any

import torch

from .launch import (
    INTERPRETED,
    jit,
    next_power_of_2,
    row_warps,
    tl,
)

__all__ = [
    "EightBitTarget",
    "e4m3_bits",
    "group_sums",
    "quantize_fp8",
    "quantize_fp8_ref",
    "quantize_int8",
    "quantize_int8_ref",
    "quantize_row",
]

_FLOOR = 1e-12
_LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


def quantize_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes e4m3 `[M, K]`, scales fp32 `[M]`) of `x [M, K]`."""
    return quantize_fp8_triton(x) if x.is_cuda else quantize_fp8_ref(x)


def quantize_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 `[M, K]` in -127..127, scales fp32 `[M]`) of `x [M, K]`."""
    return quantize_int8_triton(x) if x.is_cuda else quantize_int8_ref(x)


def quantize_fp8_ref(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_fp8` in torch."""
    wide = x.float()
    scales = (wide.abs().amax(-1) / 448).clamp(min=_FLOOR)
    # dividing can round a row's largest value past 448, which e4m3 would turn into NaN
    return (wide / scales[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn), scales


def quantize_int8_ref(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_int8` in torch."""
    wide = x.float()
    scales = (wide.abs().amax(-1) / 127).clamp(min=_FLOOR)
    return (wide / scales[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def group_sums(x: torch.Tensor, group_size: int, *, unit: float = 1.0) -> torch.Tensor:
    """fp32 `[M, K / group_size]`: `unit` times the sums of `x [M, K]` as rounded, over each group.

    With weights (u - z) * s the zero leaves the matrix product: s * (sum x u - z * sum x).
    """
    if not x.is_cuda:
        return x.float().view(len(x), -1, group_size).sum(-1) * unit
    return group_sums_triton(x, group_size, unit=unit)


@jit
def _group_sums_kernel(
    x: tl.tensor, sums: tl.tensor, stride_x: tl.tensor, unit: tl.tensor, K: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_G: tl.constexpr,
) -> None:  # fmt: skip
    """One token per program."""
    i_m = tl.program_id(0).to(tl.int64)
    o_g = tl.arange(0, BLOCK_G)
    m_g = o_g < K // GROUP
    o_x = o_g[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    b_x = tl.load(x + i_m * stride_x + o_x, mask=m_g[:, None], other=0.0).to(tl.float32)
    tl.store(sums + i_m * (K // GROUP) + o_g, tl.sum(b_x, axis=1) * unit, mask=m_g)


def group_sums_triton(x: torch.Tensor, group_size: int, *, unit: float = 1.0) -> torch.Tensor:
    """`group_sums` on the device of `x`."""
    tokens, width = x.shape
    groups = width // group_size
    sums = torch.empty(tokens, groups, dtype=torch.float32, device=x.device)
    _group_sums_kernel[(tokens,)](
        x, sums, x.stride(0), unit, K=width, GROUP=group_size, BLOCK_G=next_power_of_2(groups),
        num_warps=row_warps(width),
    )  # fmt: skip
    return sums


@jit
def e4m3_bits(b_x: tl.tensor) -> tl.tensor:
    """The byte of each fp32 in -448..448, by integer arithmetic."""
    sign = (b_x.to(tl.uint32, bitcast=True) >> 24) & 0x80
    b_abs = tl.abs(b_x)
    bits = b_abs.to(tl.uint32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960
    small = (b_abs * 512.0 + 12582912.0).to(tl.uint32, bitcast=True) & 15
    return (tl.where(b_abs >= 0.015625, normal, small) | sign).to(tl.uint8)


@jit
def quantize_row(
    b_x: tl.tensor, codes: tl.tensor, scales: tl.tensor, i_m: tl.tensor, o_k: tl.tensor,
    m_k: tl.tensor, K: tl.constexpr, LARGEST: tl.constexpr, FLOOR: tl.constexpr,
    ENCODE: tl.constexpr,
) -> None:  # fmt: skip
    """Store the codes and the scale of row `i_m`, fp32 in registers and 0 where masked.

    `codes` is viewed as bytes where they are encoded by hand.
    """
    b_scale = tl.maximum(tl.div_rn(tl.max(tl.abs(b_x), axis=0), LARGEST), FLOOR)
    tl.store(scales + i_m, b_scale)
    b_x = tl.div_rn(b_x, b_scale + tl.zeros_like(b_x))
    b_x = tl.minimum(tl.maximum(b_x, -LARGEST), LARGEST)
    if ENCODE:
        b_code = e4m3_bits(b_x)
    elif LARGEST == 448.0:
        b_code = b_x.to(codes.dtype.element_ty)
    else:
        b_code = (b_x + 12582912.0 - 12582912.0).to(tl.int8)  # half to even
    tl.store(codes + i_m * K + o_k, b_code, mask=m_k)


@jit
def _quantize_kernel(
    x: tl.tensor, codes: tl.tensor, scales: tl.tensor, stride_x: tl.tensor, K: tl.constexpr,
    LARGEST: tl.constexpr, FLOOR: tl.constexpr, BLOCK_K: tl.constexpr, ENCODE: tl.constexpr,
) -> None:  # fmt: skip
    """One token per program."""
    i_m = tl.program_id(0).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    b_x = tl.load(x + i_m * stride_x + o_k, mask=m_k, other=0.0).to(tl.float32)
    quantize_row(b_x, codes, scales, i_m, o_k, m_k, K, LARGEST, FLOOR, ENCODE)


def quantize_fp8_triton(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_fp8` on the device of `x`."""
    return _launch(x, torch.float8_e4m3fn)


def quantize_int8_triton(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`quantize_int8` on the device of `x`."""
    return _launch(x, torch.int8)


def _launch(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    x = x if x.stride(1) == 1 else x.contiguous()
    target = EightBitTarget(x.shape[0], x.shape[1], dtype, x.device)
    if len(x):
        _quantize_kernel[(len(x),)](x, *target.pointers, x.stride(0), **target.options)
    return target.codes, target.scales


class EightBitTarget:
    """The outputs of a kernel that ends in `quantize_row`, and the arguments they imply."""

    def __init__(self, rows: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        encode = INTERPRETED and dtype == torch.float8_e4m3fn
        held = torch.uint8 if encode else dtype
        codes = torch.empty(rows, width, dtype=held, device=device)
        self.codes = codes.view(dtype)
        self.scales = torch.empty(rows, dtype=torch.float32, device=device)
        self.pointers = (codes, self.scales)
        self.options: dict[str, Any] = {
            "K": width, "LARGEST": _LARGEST[dtype], "FLOOR": _FLOOR, "ENCODE": encode,
            "BLOCK_K": next_power_of_2(width), "num_warps": row_warps(width),
        }  # fmt: skip
