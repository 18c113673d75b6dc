"""Four-bit weights: the canonical form, how to get there, and every packed format.

Canonical: integer codes in -8..7 with one scale (and optionally one zero) per row and group of
`group_size` input features,

    w[n, k] = (code[n, k] - zero[n, k // g]) * scale[n, k // g]

Packed: two codes per byte, in tiles of 128 input features. Byte j of a tile carries k = j as "A"
and k = j + 64 as "B", so that one masked word feeds one matrix product and its other nibbles
another, with no shuffle between. K is padded to whole tiles with code 0; the padding has scale 0
unless one group spans all of K.

    format  byte, from bit 7 down                     decoded                        codes
    U4      B + 8 (4), A + 8 (4)                      0000uuuu = u, as e4m3 u/512    -8..7, zeros
    SM7     sign A, abs B (3), sign B, abs A (3)      s0000mmm, as e4m3 code/512     -7..7
    HI4     A & 15 (4), B & 15 (4)                    cccc0000, as int8 16 * code    -8..7

e4m3 has 3 mantissa bits and subnormals in steps of 2^-9, so its first sixteen bytes are exactly
u * 2^-9. The 16 * code form is QQQ's (arXiv 2406.09904); the scale absmax / 7 is FireQ's
(arXiv 2505.20839). Rounding is half to even.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch.nn import functional

from .errors import FormatError

__all__ = ["TILE_K", "Format", "PackedWeight", "QuantWeight", "pack", "quantize_weight"]

TILE_K = 128
_HALF = TILE_K // 2
_GROUP_SIZES = (32, 64, 128)


class Format(Enum):
    """How two codes share a byte."""

    U4 = "u4"
    SM7 = "sm7"
    HI4 = "hi4"


@dataclass(frozen=True, slots=True, eq=False)
class QuantWeight:
    """The canonical form: `codes` int8 `[N, K]`, `scales` (and `zeros`) fp32 `[N, K / g]`."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None = None

    def __post_init__(self) -> None:
        rows, width = self.codes.shape
        groups = self.scales.shape[1] if self.scales.ndim == 2 else 0
        if not groups or width % groups or self.scales.shape[0] != rows:
            raise FormatError(
                f"scales of shape {tuple(self.scales.shape)} do not divide codes [{rows}, {width}]"
            )
        if self.group_size != width and self.group_size not in _GROUP_SIZES:
            raise FormatError(
                f"group size {self.group_size} is not one of 32, 64, 128 or K = {width}"
            )
        if self.zeros is not None and self.zeros.shape != self.scales.shape:
            raise FormatError(f"zeros of shape {tuple(self.zeros.shape)} do not match the scales")
        if self.codes.dtype != torch.int8 or bool(((self.codes < -8) | (self.codes > 7)).any()):
            raise FormatError(f"codes must be int8 in -8..7, found {self.codes.dtype}")
        if not bool(self.scales.isfinite().all()):
            raise FormatError("scales must be finite")

    @property
    def group_size(self) -> int:
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantize(self) -> torch.Tensor:
        """`w` fp32 `[N, K]`, straight from the definition."""
        grouped = self.codes.float().view(*self.scales.shape, self.group_size)
        if self.zeros is not None:
            grouped = grouped - self.zeros[:, :, None]
        return (grouped * self.scales[:, :, None]).flatten(1)


def quantize_weight(
    weight: torch.Tensor, *, group_size: int, symmetric: bool = True
) -> QuantWeight:
    """`weight [N, K]` rounded to the nearest code, group by group.

    Symmetric: scale = absmax / 7, codes -7..7. Otherwise the range, widened to hold 0, is cut in 15
    steps with an integer zero. Raises `FormatError` for a group size that does not divide K.
    """
    rows, width = weight.shape
    if group_size < 1 or width % group_size:
        raise FormatError(f"group size {group_size} does not divide K = {width}")
    grouped = weight.float().view(rows, width // group_size, group_size)
    if symmetric:
        scales = _nonzero(grouped.abs().amax(-1) / 7)
        codes = (grouped / scales[:, :, None]).round().clamp(-7, 7)
        return QuantWeight(codes.to(torch.int8).flatten(1), scales)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scales = _nonzero((high - low) / 15)
    zeros = (-low / scales).round() - 8
    codes = ((grouped / scales[:, :, None]).round() + zeros[:, :, None]).clamp(-8, 7)
    return QuantWeight(codes.to(torch.int8).flatten(1), scales, zeros)


def _nonzero(scales: torch.Tensor) -> torch.Tensor:
    """A group of zeros has no scale of its own; any positive one keeps its codes at zero."""
    return torch.where(scales == 0, torch.ones_like(scales), scales)


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """`data` uint8 `[N, Kp / 2]` with Kp = K rounded up to 128; `scales`, `zeros` fp32 `[Gp, N]`.

    Or, by `tiled`, `data [ceil(N / 64), Kp / 128, 64, 64]`: what a tile of 64 rows reads of 128
    inputs lies together.

    Scales lie group-major, so that one K step of a kernel reads one contiguous row. `zeros` is
    held in the units of the unsigned code u = code + 8 and always present in U4, never otherwise.
    A `centred` weight has no zeros of its own: where U4 holds them, all are 8.
    """

    format: Format
    data: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    in_features: int
    group_size: int
    centred: bool

    @property
    def out_features(self) -> int:
        return self.scales.shape[1]

    def tiled(self) -> PackedWeight:
        """The same weight with `data` in tiles of 64 rows by 128 inputs; rows are padded."""
        if self.data.ndim == 4:
            return self
        rows = functional.pad(self.data, (0, 0, 0, -self.out_features % _HALF))
        tiles = rows.view(-1, _HALF, rows.shape[1] // _HALF, _HALF).transpose(1, 2).contiguous()
        return replace(self, data=tiles)

    def row_major(self) -> PackedWeight:
        """The same weight with `data [N, Kp / 2]`, whatever its order was."""
        if self.data.ndim == 2:
            return self
        rows = self.data.transpose(1, 2).flatten(2).flatten(0, 1)[: self.out_features]
        return replace(self, data=rows.contiguous())

    def to(self, device: torch.device) -> PackedWeight:
        """The same weight with its tensors on `device`."""
        zeros = None if self.zeros is None else self.zeros.to(device)
        return replace(self, data=self.data.to(device), scales=self.scales.to(device), zeros=zeros)

    def unpack(self) -> QuantWeight:
        """The canonical form this was packed from, bit for bit."""
        data = self.row_major().data
        low, high = _decode(data.view(self.out_features, -1, _HALF), self.format)
        codes = torch.cat((low, high), dim=-1).flatten(1)[:, : self.in_features]
        groups = self.in_features // self.group_size
        scales = self.scales[:groups].t().contiguous()
        zeros = None if self.zeros is None else self.zeros[:groups].t().contiguous() - 8
        return QuantWeight(codes.contiguous(), scales, zeros)


def pack(weight: QuantWeight, target: Format) -> PackedWeight:
    """`weight` in format `target`; raises `FormatError` for codes or zeros it cannot hold."""
    if target is not Format.U4 and weight.zeros is not None:
        raise FormatError(f"{target.name} holds no zeros; use U4")
    if target is Format.SM7 and bool((weight.codes == -8).any()):
        raise FormatError("SM7 holds codes -7..7, found -8; use U4")
    rows, width = weight.codes.shape
    padding = -width % TILE_K
    tiles = functional.pad(weight.codes, (0, padding)).view(rows, -1, 2, _HALF)
    data = _encode(tiles[:, :, 0], tiles[:, :, 1], target).flatten(1)
    group_padding = 0 if weight.group_size == width else padding // weight.group_size
    zeros = weight.zeros
    if target is Format.U4:
        zeros = torch.zeros_like(weight.scales) if zeros is None else zeros
        zeros = functional.pad(zeros + 8, (0, group_padding)).t().contiguous()
    scales = functional.pad(weight.scales.float(), (0, group_padding)).t().contiguous()
    return PackedWeight(target, data, scales, zeros, width, weight.group_size, weight.zeros is None)


def _encode(a: torch.Tensor, b: torch.Tensor, target: Format) -> torch.Tensor:
    """One byte per pair of int8 codes."""
    a, b = a.int(), b.int()
    if target is Format.U4:
        byte = (a + 8) | (b + 8) << 4
    elif target is Format.HI4:
        byte = (a & 15) << 4 | (b & 15)
    else:
        byte = (a < 0).int() << 7 | a.abs() | (b < 0).int() << 3 | b.abs() << 4
    return byte.to(torch.uint8)


def _decode(data: torch.Tensor, source: Format) -> tuple[torch.Tensor, torch.Tensor]:
    """The int8 codes (A, B) of each byte."""
    byte = data.int()
    if source is Format.U4:
        a, b = (byte & 15) - 8, (byte >> 4) - 8
    elif source is Format.HI4:
        a, b = ((byte >> 4) ^ 8) - 8, ((byte & 15) ^ 8) - 8
    else:
        a, b = byte & 7, byte >> 4 & 7
        a, b = torch.where(byte >= 128, -a, a), torch.where((byte & 8) > 0, -b, b)
    return a.to(torch.int8), b.to(torch.int8)
