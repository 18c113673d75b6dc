"""Our own layout, format versions 1 and 2.

    weight_codes   uint8 [N, K / 2]   byte j: code of k = 2j in the low, of k = 2j + 1 in the high
                                      nibble, two's complement
    weight_scales  fp32  [N, K / g]
    weight_zeros   int8  [N, K / g]   only when asymmetric

FP8 weights are stored as compressed-tensors stores them: `weight` e4m3, `weight_scale` `[N, 1]`.
Version 2 stores a layer of the vision side, or in FP8 the head, in the same way.
"""

from __future__ import annotations

import torch

from epd.models.layouts.source import LayerSource
from epd_kernels import Fp8Weight, QuantWeight

__all__ = ["read", "tensors_of"]


def read(source: LayerSource) -> QuantWeight:
    """The canonical weight of a layer in this layout."""
    if source.width % 2:
        source.refuse("weight_codes", "an even K", f"K = {source.width}")
    shape = (source.rows, source.width // 2)
    data = source.get("weight_codes", (torch.uint8,), shape).to(torch.int8)
    codes = torch.stack(((data << 4) >> 4, data >> 4), dim=-1).flatten(1)
    scales = source.get("weight_scales", (torch.float32,))
    if scales.ndim != 2 or scales.shape[0] != source.rows:
        source.refuse("weight_scales", f"shape [{source.rows}, groups]", f"{list(scales.shape)}")
    groups = source.groups("weight_scales", scales.shape[1])
    zeros = None
    if source.has("weight_zeros"):
        zeros = source.get("weight_zeros", (torch.int8,), (source.rows, groups)).float()
    return QuantWeight(codes, scales, zeros)


def tensors_of(weight: QuantWeight | Fp8Weight) -> dict[str, torch.Tensor]:
    """The tensors, by suffix, that store `weight`; `read_linear` gives it back bit for bit."""
    if isinstance(weight, Fp8Weight):
        return {"weight": weight.codes, "weight_scale": weight.scales[:, None].contiguous()}
    low, high = weight.codes[:, ::2].int() & 15, weight.codes[:, 1::2].int() & 15
    stored = {
        "weight_codes": (low | high << 4).to(torch.uint8),
        "weight_scales": weight.scales.contiguous(),
    }
    if weight.zeros is not None:
        stored["weight_zeros"] = weight.zeros.to(torch.int8)
    return stored
