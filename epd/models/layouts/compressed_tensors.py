"""The layouts of compressed-tensors.

    pack-quantized    weight_packed int32 [N, ceil(K / 8)], nibble i of word c is k = 8c + i,
                      plus 8;
                      weight_zero_point int32 [ceil(N / 8), K / g], packed along N, plus 8
    int-quantized     weight int8 [N, K], one code per byte; weight_zero_point int8 [N, K / g]
    float-quantized   weight e4m3 [N, K]

with `weight_scale` `[N, K / g]`, `[N, 1]` or, for FP8, a single number.
"""

from __future__ import annotations

import torch

from epd.models.layouts.source import LayerSource, nibbles, to_signed
from epd_kernels import Fp8Weight, QuantWeight

__all__ = ["read"]

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


def read(source: LayerSource) -> QuantWeight | Fp8Weight:
    """The canonical weight of a layer in one of these layouts."""
    source.natural_order_of("weight_g_idx")
    if source.has("weight_packed"):
        return _packed(source)
    weight = source.get("weight", (torch.int8, torch.float8_e4m3fn), (source.rows, source.width))
    if weight.dtype == torch.int8:
        return _integers(source, weight)
    return _floats(source, weight)


def _packed(source: LayerSource) -> QuantWeight:
    words = -(-source.width // 8)
    if source.has("weight_shape"):
        said = source.get("weight_shape", (torch.int64, torch.int32), (2,)).tolist()
        if said != [source.rows, source.width]:
            source.refuse("weight_shape", f"{[source.rows, source.width]}", f"{said}")
    packed = source.get("weight_packed", (torch.int32,), (source.rows, words))
    codes = to_signed(nibbles(packed, 1))[:, : source.width].contiguous()
    scales = _scales(source)
    zeros = None
    if source.has("weight_zero_point"):
        shape = (-(-source.rows // 8), scales.shape[1])
        stored = source.get("weight_zero_point", (torch.int32,), shape)
        zeros = to_signed(nibbles(stored, 0))[: source.rows].float()
    return QuantWeight(codes, scales, zeros)


def _integers(source: LayerSource, codes: torch.Tensor) -> QuantWeight:
    if bool(((codes < -8) | (codes > 7)).any()):
        source.refuse("weight", "codes in -8..7", "eight-bit integers")
    scales, zeros = _scales(source), None
    if source.has("weight_zero_point"):
        shape = (source.rows, scales.shape[1])
        zeros = source.get("weight_zero_point", (torch.int8,), shape).float()
    return QuantWeight(codes, scales, zeros)


def _floats(source: LayerSource, codes: torch.Tensor) -> Fp8Weight:
    scales = source.get("weight_scale", _FLOATS).float()
    if scales.numel() == 1:
        scales = scales.view(1).expand(source.rows).contiguous()
    elif scales.shape != (source.rows, 1):
        source.refuse("weight_scale", f"[{source.rows}, 1] or one number", f"{list(scales.shape)}")
    if bool(((codes.view(torch.uint8) & 127) == 127).any()):
        source.refuse("weight", "finite numbers", "NaN")
    return Fp8Weight(codes, scales.view(-1))


def _scales(source: LayerSource) -> torch.Tensor:
    scales = source.get("weight_scale", _FLOATS).float()
    if scales.ndim != 2 or scales.shape[0] != source.rows:
        source.refuse("weight_scale", f"shape [{source.rows}, groups]", f"{list(scales.shape)}")
    source.groups("weight_scale", scales.shape[1])
    return scales
