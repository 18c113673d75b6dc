"""Large batches in 16 bits: four-bit weights widened once, then the vendor's product.

    w[n, k] = round((u[n, k] - z[g, n]) * s[g, n])        y[m, n] = sum_k x[m, k] w[n, k] + bias[n]

The four-bit GEMM decodes every weight again for each tile of tokens, at a price that grows with
their count; this one writes 2.5 bytes per weight once. The weight is rounded to the dtype of x,
which adds 2^-9 per weight in bf16.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from .errors import FormatError
from .launch import jit, tl
from .packing import TILE_K, Format, PackedWeight

__all__ = ["dequantize_wide", "dequantize_wide_ref", "w4a16_large"]

_BLOCK_N = 64


def w4a16_large(
    x: torch.Tensor, weight: PackedWeight, *, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x [M, K] W^T + bias` in the dtype of `x`; N * K elements of it live for this call only."""
    bias = None if bias is None else bias.to(x.dtype)
    return functional.linear(x, dequantize_wide(weight, x.dtype), bias)


def dequantize_wide(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The weight `[N, K]` in `dtype`, rounded once from fp32. Raises `FormatError` unless U4."""
    if weight.format is not Format.U4:
        raise FormatError(f"{weight.format.name} weights meet eight-bit activations")
    run = dequantize_wide_triton if weight.data.is_cuda else dequantize_wide_ref
    return run(weight, dtype)


def dequantize_wide_ref(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """`dequantize_wide` in torch."""
    return weight.unpack().dequantize().to(dtype)


@jit
def _widen_kernel(
    data: tl.tensor, scales: tl.tensor, zeros: tl.tensor, out: tl.tensor, N: tl.tensor,
    K: tl.constexpr, WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK_N: tl.constexpr,
    TILED: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK_N rows of one tile of 128 inputs; K counts padded inputs, WIDTH those stored."""
    i_tile = tl.program_id(0)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_j = tl.arange(0, 64)[None, :]
    m_n = (o_n < N)[:, None]
    o_row = tl.minimum(o_n, N - 1)[:, None]
    if TILED:
        o_data = (o_row // 64).to(tl.int64) * (32 * K) + (o_row % 64) * 64 + i_tile * 4096
    else:
        o_data = o_row.to(tl.int64) * (K // 2) + i_tile * 64
    b_q = tl.load(data + o_data + o_j)
    for half in tl.static_range(2):
        o_k = i_tile * 128 + half * 64 + o_j
        o_scale = (
            (o_k // GROUP) * N + o_row
            if GROUP < 64
            else ((i_tile * 128 + half * 64) // GROUP) * N + o_row
        )
        b_u = ((b_q >> (4 * half)) & 15).to(tl.float32) - tl.load(zeros + o_scale)
        b_w = (b_u * tl.load(scales + o_scale)).to(out.dtype.element_ty)
        tl.store(out + o_row.to(tl.int64) * WIDTH + o_k, b_w, mask=m_n & (o_k < WIDTH))


def dequantize_wide_triton(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """`dequantize_wide` on the device of `weight`."""
    rows, tiled = weight.out_features, weight.data.ndim == 4
    width = weight.data.shape[1] * (TILE_K if tiled else 2)
    per_channel = weight.group_size == weight.in_features
    out = torch.empty(rows, weight.in_features, dtype=dtype, device=weight.data.device)
    _widen_kernel[(width // TILE_K, -(-rows // _BLOCK_N))](
        weight.data, weight.scales, weight.zeros, out, rows, K=width, WIDTH=weight.in_features,
        GROUP=width if per_channel else weight.group_size, BLOCK_N=_BLOCK_N, TILED=tiled,
        num_warps=4,
    )  # fmt: skip
    return out
