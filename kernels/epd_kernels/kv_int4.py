"""INT4 keys and values with one scale per token and KV head.

    asymmetric: s = (max - min) / 15 over a range that holds 0,  z = round(-min / s),
                u = clamp(round(x / s) + z, 0, 15),              x ~ (u - z) * s
    symmetric:  s = absmax / 7,  z = 8,  u = clamp(round(x / s), -7, 7) + 8

Byte d of a row carries channel d in its low and channel d + D/2 in its high nibble: the pair that
rotary embedding turns together is written together. The symmetric form is FireQ's
(arXiv 2505.20839), with a floor under the scale where a row is all zeros.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from .errors import FormatError

__all__ = ["QuantKV", "dequantize_kv", "quantize_kv"]

_FLOOR = 1e-8


class QuantKV(NamedTuple):
    """`data` uint8 `[T, Hkv, D / 2]`; `scales`, `zeros` fp32 `[T, Hkv]`."""

    data: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor


def quantize_kv(x: torch.Tensor, *, symmetric: bool = False) -> QuantKV:
    """Keys or values `x [T, Hkv, D]` in four bits; raises `FormatError` for an odd D."""
    if x.shape[-1] % 2:
        raise FormatError(f"head_dim must be even to pack two codes per byte, found {x.shape[-1]}")
    wide = x.float()
    if symmetric:
        scales = (wide.abs().amax(-1) / 7).clamp(min=_FLOOR)
        zeros = torch.full_like(scales, 8)
        codes = (wide / scales[..., None]).round().clamp(-7, 7) + 8
    else:
        low, high = wide.amin(-1).clamp(max=0), wide.amax(-1).clamp(min=0)
        scales = ((high - low) / 15).clamp(min=_FLOOR)
        zeros = (-low / scales).round()
        codes = ((wide / scales[..., None]).round() + zeros[..., None]).clamp(0, 15)
    first, second = codes.to(torch.uint8).chunk(2, dim=-1)
    return QuantKV(first | second << 4, scales, zeros)


def dequantize_kv(packed: QuantKV) -> torch.Tensor:
    """fp32 `[T, Hkv, D]`."""
    codes = torch.cat((packed.data & 15, packed.data >> 4), dim=-1).float()
    return (codes - packed.zeros[..., None]) * packed.scales[..., None]
