"""Large batches: four-bit weights widened once to FP8, then the vendor's FP8 product.

    t[n]     = max_g s[g, n] * max_u |u - z[g, n]| / 448           one scale per row
    w8[n, k] = round_e4m3((u[n, k] - z[g, n]) * (s[g, n] / t[n]))
    y[m, n]  = s_x[m] * t[n] * sum_k x[m, k] w8[n, k] + bias[n]

where u runs over the codes the format can hold. The four-bit GEMM decodes every weight once per
tile of tokens; here it is decoded once, for 1.5 bytes of traffic per weight, which can only pay
when tokens are many. The second rounding adds about 1% to the error of rounding to four bits.
"""

from __future__ import annotations

import torch

from .activations import e4m3_bits
from .errors import FormatError
from .launch import INTERPRETED, jit, tl
from .packing import TILE_K, Format, PackedWeight, QuantWeight
from .w4_gemm import padded

__all__ = ["dequantize_fp8", "dequantize_fp8_ref", "fp8_row_scales", "w4a8_fp8_large"]

_BLOCK_N = 32


def w4a8_fp8_large(
    x: torch.Tensor, weight: PackedWeight, *, out_dtype: torch.dtype, x_scales: torch.Tensor,
    bias: torch.Tensor | None = None, row_scales: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """What `w4_gemm` returns for e4m3 `x [M, K]`, to within the second rounding of the weight.

    `row_scales` are the weight's `fp8_row_scales`, where the caller keeps them. The product is
    rounded to bf16 before it takes `out_dtype`. Raises `FormatError` unless N is a multiple of 16,
    as the vendor's product wants.
    """
    if weight.out_features % 16:
        raise FormatError(f"the FP8 product needs N % 16 == 0, found N = {weight.out_features}")
    codes, scales = dequantize_fp8(weight, row_scales)
    out = torch._scaled_mm(
        padded(x), codes.t(), x_scales[:, None], scales[None], None, None, torch.bfloat16
    )
    return (out if bias is None else out + bias).to(out_dtype)


def dequantize_fp8(
    weight: PackedWeight, row_scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(codes e4m3 `[N, Kp]`, scales fp32 `[N]`), Kp being K rounded up to a multiple of 128."""
    run = dequantize_fp8_triton if weight.data.is_cuda else dequantize_fp8_ref
    return run(weight, row_scales)


def fp8_row_scales(weight: PackedWeight) -> torch.Tensor:
    """t fp32 `[N]`: the largest magnitude a row's format can hold lands on the largest e4m3."""
    if weight.zeros is None:
        largest = weight.scales * (7 if weight.format is Format.SM7 else 8)
    else:
        largest = weight.scales * weight.zeros.abs().maximum((15 - weight.zeros).abs())
    return (largest.amax(0) / 448).clamp(min=1e-30)


def dequantize_fp8_ref(
    weight: PackedWeight, row_scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dequantize_fp8` in torch."""
    scales = fp8_row_scales(weight) if row_scales is None else row_scales
    canonical = weight.unpack()
    ratios = QuantWeight(canonical.codes, canonical.scales / scales[:, None], canonical.zeros)
    codes = padded(ratios.dequantize()).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scales


@jit
def _dequantize_kernel(
    data: tl.tensor, scales: tl.tensor, zeros: tl.tensor, row_scales: tl.tensor, codes: tl.tensor,
    N: tl.tensor, K: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr, ENCODE: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK_N rows of one tile of 128 inputs; `codes` are bytes where encoded by hand."""
    WIDTH: tl.constexpr = GROUP if GROUP < 64 else 64  # bytes of a half tile under one scale
    i_k = tl.program_id(1) * 128
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_j = tl.arange(0, WIDTH)
    m_n = o_n < N
    o_row = tl.minimum(o_n, N - 1).to(tl.int64)[:, None]
    b_t = tl.load(row_scales + o_row)
    for part in tl.static_range(64 // WIDTH):
        b_q = tl.load(data + o_row * (K // 2) + i_k // 2 + part * WIDTH + o_j[None, :])
        for half in tl.static_range(2):
            o_k = i_k + 64 * half + part * WIDTH
            o_group = (o_k // GROUP) * N + o_row
            b_ratio = tl.div_rn(tl.load(scales + o_group), b_t)
            b_nibble = (b_q >> (4 * half)) & 15
            if FORMAT == "u4":
                b_u = b_nibble.to(tl.float32) - tl.load(zeros + o_group)
            else:
                # the sign of A is bit 7 and that of B bit 3, each beside the other's magnitude
                b_sign = ((b_q >> (7 - 4 * half)) & 1).to(tl.int32)
                b_u = ((b_nibble & 7).to(tl.int32) * (1 - 2 * b_sign)).to(tl.float32)
            b_w = tl.minimum(tl.maximum(b_u * b_ratio, -448.0), 448.0)
            b_code = e4m3_bits(b_w) if ENCODE else b_w.to(codes.dtype.element_ty)
            tl.store(codes + o_row * K + o_k + o_j[None, :], b_code, mask=m_n[:, None])


def dequantize_fp8_triton(
    weight: PackedWeight, row_scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dequantize_fp8` on the device of `weight`; raises `FormatError` for HI4."""
    if weight.format is Format.HI4:
        raise FormatError("HI4 weights meet int8 activations, not FP8")
    weight = weight.row_major()
    rows, width = weight.out_features, 2 * weight.data.shape[1]
    per_channel = weight.group_size == weight.in_features
    scales = fp8_row_scales(weight) if row_scales is None else row_scales
    held = torch.uint8 if INTERPRETED else torch.float8_e4m3fn
    codes = torch.empty(rows, width, dtype=held, device=weight.data.device)
    _dequantize_kernel[(-(-rows // _BLOCK_N), width // TILE_K)](
        weight.data, weight.scales, weight.scales if weight.zeros is None else weight.zeros,
        scales, codes, rows, K=width, GROUP=width if per_channel else weight.group_size,
        FORMAT=weight.format.value, BLOCK_N=_BLOCK_N, ENCODE=INTERPRETED, num_warps=4,
    )  # fmt: skip
    return codes.view(torch.float8_e4m3fn), scales
