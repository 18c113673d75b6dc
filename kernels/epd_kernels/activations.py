"""Activations as eight-bit codes with one scale per token, rounded half to even.

    FP8 (e4m3):  scale = absmax / 448,  x ~ code * scale
    INT8:        scale = absmax / 127,  x ~ code * scale

Scales are floored at 1e-12: a row of zeros, such as padding, has code 0 and not NaN.
"""

from __future__ import annotations

import torch

__all__ = ["group_sums", "quantize_fp8", "quantize_int8"]

_FLOOR = 1e-12


def quantize_fp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes e4m3 `[M, K]`, scales fp32 `[M]`) of `x [M, K]`."""
    wide = x.float()
    scales = (wide.abs().amax(-1) / 448).clamp(min=_FLOOR)
    # dividing can round a row's largest value past 448, which e4m3 would turn into NaN
    return (wide / scales[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn), scales


def quantize_int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes int8 `[M, K]` in -127..127, scales fp32 `[M]`) of `x [M, K]`."""
    wide = x.float()
    scales = (wide.abs().amax(-1) / 127).clamp(min=_FLOOR)
    return (wide / scales[:, None]).round().clamp(-127, 127).to(torch.int8), scales


def group_sums(x: torch.Tensor, group_size: int) -> torch.Tensor:
    """fp32 `[M, K / group_size]`: sums of `x [M, K]`, after its rounding, over each group.

    With weights (u - z) * s the zero leaves the matrix product: s * (sum x u - z * sum x).
    """
    return x.float().view(len(x), -1, group_size).sum(-1)
