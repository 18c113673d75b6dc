"""The `gemm` layout of AWQ checkpoints: packed along N in an interleaved order.

qweight int32 [K, N / 8]   nibble i of word c is column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i]
qzeros  int32 [G, N / 8]   the same order
scales  fp16  [G, N]       w[k, n] = (u - z) * scales[g, n]
"""

from __future__ import annotations

import torch

from epd.models.layouts.source import LayerSource, nibbles, to_signed
from epd_kernels import QuantWeight

__all__ = ["ORDER", "read"]

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read(source: LayerSource) -> QuantWeight:
    """The canonical weight of a layer in this layout."""
    rows, width = source.rows, source.width
    if rows % 8:
        source.refuse("qweight", "N divisible by 8", f"N = {rows}")
    packed = source.get("qweight", (torch.int32,), (width, rows // 8))
    codes = to_signed(nibbles(packed, 1, ORDER)).t().contiguous()
    scales = source.get("scales", (torch.float16, torch.bfloat16, torch.float32)).float()
    if scales.ndim != 2 or scales.shape[1] != rows:
        source.refuse("scales", f"shape [groups, {rows}]", f"{list(scales.shape)}")
    groups = source.groups("scales", scales.shape[0])
    stored = source.get("qzeros", (torch.int32,), (groups, rows // 8))
    zeros = to_signed(nibbles(stored, 1, ORDER)).t().float().contiguous()
    return QuantWeight(codes, scales.t().contiguous(), zeros)
