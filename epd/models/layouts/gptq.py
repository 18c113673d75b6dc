"""The layout of GPTQ checkpoints: packed along K, zeros per group and column.

    qweight int32 [K / 8, N]   nibble i of word r is row k = 8r + i
    qzeros  int32 [G, N / 8]   nibble i of word c is column n = 8c + i
    scales  fp16  [G, N]       w[k, n] = (u - z) * scales[g, n]

The first version stores z - 1, the second z; `Quantization.zero_offset` says which.
"""

from __future__ import annotations

import torch

from epd.models.layouts.source import LayerSource, nibbles, to_signed
from epd_kernels import QuantWeight

__all__ = ["read"]


def read(source: LayerSource) -> QuantWeight:
    """The canonical weight of a layer in this layout."""
    if source.quantization.act_order and not source.has("g_idx"):
        source.refuse("g_idx", "the order that desc_act declares", "none")
    source.natural_order_of("g_idx")
    rows, width = source.rows, source.width
    if width % 8 or rows % 8:
        source.refuse("qweight", "N and K divisible by 8", f"N = {rows}, K = {width}")
    packed = source.get("qweight", (torch.int32,), (width // 8, rows))
    codes = to_signed(nibbles(packed, 0)).t().contiguous()
    scales = source.get("scales", (torch.float16, torch.bfloat16, torch.float32)).float()
    if scales.ndim != 2 or scales.shape[1] != rows:
        source.refuse("scales", f"shape [groups, {rows}]", f"{list(scales.shape)}")
    groups = source.groups("scales", scales.shape[0])
    stored = source.get("qzeros", (torch.int32,), (groups, rows // 8))
    zeros = nibbles(stored, 1).t().float() + source.quantization.zero_offset - 8
    if bool((zeros == 0).all()):
        return QuantWeight(codes, scales.t().contiguous())
    return QuantWeight(codes, scales.t().contiguous(), zeros.contiguous())
