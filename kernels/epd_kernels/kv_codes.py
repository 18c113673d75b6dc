"""Keys and values as four- or eight-bit codes, with one scale per token and KV head.

    INT4   s = (max - min) / 15 over a range that holds 0,  z = round(-min / s),
           u = clamp(round(x / s) + z, 0, 15),              x ~ (u - z) * s
    FP8    s = absmax / 448,  c = e4m3(x / s),              x ~ c * s

Rounding is half to even. An INT4 scale is an fp32 number whose lowest four mantissa bits are the
zero z: it is rounded up to a multiple of 16 units in the last place before it is used, so nothing
is lost, and a token and head costs D / 2 + 4 bytes. Byte d of a row carries channel d in its low
and channel d + D/2 in its high nibble: the pair that rotary embedding turns together is written
together. Rows of zeros have a floored scale and code zero.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch

from .errors import FormatError

__all__ = ["INT4_FLOOR", "KVFormat", "QuantKV", "dequantize_kv", "quantize_kv"]

INT4_FLOOR = 1e-8
_FP8_FLOOR = 1e-12


class KVFormat(Enum):
    """How keys and values are coded."""

    INT4 = "int4"
    FP8 = "fp8"

    @property
    def dtype(self) -> torch.dtype:
        """Of the codes."""
        return torch.uint8 if self is KVFormat.INT4 else torch.float8_e4m3fn

    def width(self, head_dim: int) -> int:
        """Codes of one token and head, in bytes; raises `FormatError` for an odd `head_dim`."""
        if head_dim % 2:
            raise FormatError(f"head_dim must be even to hold coded KV, found {head_dim}")
        return head_dim // 2 if self is KVFormat.INT4 else head_dim


class QuantKV(NamedTuple):
    """`codes [..., Hkv, W]`, uint8 (INT4, W = D / 2) or e4m3 (W = D); `scales` fp32 `[..., Hkv]`.

    Keys or values of packed tokens `[T, ...]`, or a paged cache `[num_blocks, block_size, ...]`.
    """

    codes: torch.Tensor
    scales: torch.Tensor

    @property
    def format(self) -> KVFormat:
        """As the dtype of the codes tells."""
        return KVFormat.INT4 if self.codes.dtype == torch.uint8 else KVFormat.FP8

    @property
    def head_dim(self) -> int:
        """Channels of a head."""
        return self.codes.shape[-1] * (2 if self.format is KVFormat.INT4 else 1)


def quantize_kv(x: torch.Tensor, target: KVFormat) -> QuantKV:
    """Keys or values `x [..., Hkv, D]` in codes; raises `FormatError` for an odd D."""
    target.width(x.shape[-1])
    wide = x.float()
    if target is KVFormat.FP8:
        scales = (wide.abs().amax(-1) / 448).clamp(min=_FP8_FLOOR)
        codes = (wide / scales[..., None]).clamp(-448, 448)
        return QuantKV(codes.to(torch.float8_e4m3fn), scales)
    low, high = wide.amin(-1).clamp(max=0), wide.amax(-1).clamp(min=0)
    steps = ((high - low) / 15).clamp(min=INT4_FLOOR)
    bits = (steps.view(torch.int32) + 15) & -16
    steps = bits.view(torch.float32)
    zeros = (-low / steps).round()
    codes = ((wide / steps[..., None]).round() + zeros[..., None]).clamp(0, 15)
    first, second = codes.to(torch.uint8).chunk(2, dim=-1)
    scales = (bits | zeros.to(torch.int32)).view(torch.float32)
    return QuantKV(first | second << 4, scales)


def dequantize_kv(packed: QuantKV) -> torch.Tensor:
    """fp32 `[..., Hkv, D]`."""
    if packed.format is KVFormat.FP8:
        return packed.codes.float() * packed.scales[..., None]
    codes = torch.cat((packed.codes & 15, packed.codes >> 4), dim=-1).float()
    bits = packed.scales.view(torch.int32)
    steps, zeros = (bits & -16).view(torch.float32), (bits & 15).float()
    return (codes - zeros[..., None]) * steps[..., None]
