"""Activations as eight-bit codes with one scale per token, rounded half to even.

    FP8 (e4m3):  scale = absmax / 448,  x ~ code * scale
    INT8:        scale = absmax / 127,  x ~ code * scale

Scales are floored at 1e-12: a row of zeros, such as padding, has code 0 and not NaN.

The kernel keeps a row in registers, so x is read once (see `row_codes`).
"""

from __future__ import annotations

import torch

from .launch import gdc_launch_dependents, gdc_wait, jit, next_power_of_2, row_warps, tl
from .row_codes import EightBitTarget, load_row, quantize_row

__all__ = [
    "group_sums",
    "quantize_fp8",
    "quantize_fp8_ref",
    "quantize_int8",
    "quantize_int8_ref",
]

_FLOOR = 1e-12


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
def _quantize_kernel(
    x: tl.tensor, codes: tl.tensor, scales: tl.tensor, stride_x: tl.tensor, K: tl.constexpr,
    LARGEST: tl.constexpr, FLOOR: tl.constexpr, BLOCK_K: tl.constexpr, ENCODE: tl.constexpr,
    EARLY: tl.constexpr, OPENS: tl.constexpr,
) -> None:  # fmt: skip
    """One token per program."""
    if EARLY:
        gdc_wait()
    if OPENS:
        gdc_launch_dependents()
    i_m = tl.program_id(0).to(tl.int64)
    b_x = load_row(x + i_m * stride_x, K, BLOCK_K)
    quantize_row(b_x, codes, scales, i_m, K, LARGEST, FLOOR, BLOCK_K, ENCODE)


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
