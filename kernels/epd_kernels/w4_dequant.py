"""Large batches: four-bit weights widened once to FP8, then the vendor's FP8 product.

    t[n]     = max_g s[g, n] * max_u |u - z[g, n]| / 448           one scale per row
    r[n, g]  = round_fp16(s[g, n] / t[n])
    w8[n, k] = round_e4m3(round_fp16((u[n, k] - z[g, n]) * r[n, g]))
    y[m, n]  = s_x[m] * t[n] * sum_k x[m, k] w8[n, k] + bias[n]

where u runs over the codes the format can hold. The four-bit GEMM decodes every weight once per
tile of tokens; here it is decoded once, for 1.5 bytes of traffic per weight, which pays when tokens
are many. The second rounding adds about 1% to the error of rounding to four bits; passing through
fp16 lets the GPU do two weights per instruction, and changes a code only where the product lies
within 2^-11 of the middle between two. The vendor's product sums in the tensor core's own
accumulator, of about 14 bits, which is below that error by an order of magnitude.
"""

from __future__ import annotations

import torch

from .errors import FormatError
from .launch import INTERPRETED, constant, jit, tl
from .packing import TILE_K, Format, PackedWeight
from .row_codes import e4m3_bits
from .w4_gemm import padded

__all__ = ["dequantize_fp8", "dequantize_fp8_ref", "fp8_row_scales", "w4a8_fp8_large",
           "widened"]  # fmt: skip

_BLOCK_N = 64

# $2 holds four packed bytes, $3 and $4 the fp16 ratios of their A weights, $5 and $6 of their B
# weights, and for U4 $7..$10 the zeros over 512. A byte is the e4m3 number u / 512, hence the 512
# in the ratios.
_DECODE = {
    "sm7": """
    and.b32 a, $2, 0x87878787;
    shr.u32 b, $2, 4;
    and.b32 b, b, 0x07070707;
    shl.b32 sign, $2, 4;
    and.b32 sign, sign, 0x80808080;
    or.b32 b, b, sign;""",
    "u4": """
    and.b32 a, $2, 0x0F0F0F0F;
    shr.u32 b, $2, 4;
    and.b32 b, b, 0x0F0F0F0F;""",
}
_SUBTRACT = """
    sub.rn.f16x2 fa, fa, $7;
    sub.rn.f16x2 fc, fc, $8;
    sub.rn.f16x2 fb, fb, $9;
    sub.rn.f16x2 fd, fd, $10;"""
_RESCALE = """{
    .reg .b32 a, b, sign, fa, fb, fc, fd;
    .reg .b16 low, high;DECODE
    mov.b32 {low, high}, a;
    cvt.rn.f16x2.e4m3x2 fa, low;
    cvt.rn.f16x2.e4m3x2 fc, high;
    mov.b32 {low, high}, b;
    cvt.rn.f16x2.e4m3x2 fb, low;
    cvt.rn.f16x2.e4m3x2 fd, high;SUBTRACT
    mul.rn.f16x2 fa, fa, $3;
    mul.rn.f16x2 fc, fc, $4;
    mul.rn.f16x2 fb, fb, $5;
    mul.rn.f16x2 fd, fd, $6;
    cvt.rn.satfinite.e4m3x2.f16x2 low, fa;
    cvt.rn.satfinite.e4m3x2.f16x2 high, fc;
    mov.b32 $0, {low, high};
    cvt.rn.satfinite.e4m3x2.f16x2 low, fb;
    cvt.rn.satfinite.e4m3x2.f16x2 high, fd;
    mov.b32 $1, {low, high};
}"""
_SM7_PTX = constant(_RESCALE.replace("DECODE", _DECODE["sm7"]).replace("SUBTRACT", ""))
_U4_PTX = constant(_RESCALE.replace("DECODE", _DECODE["u4"]).replace("SUBTRACT", _SUBTRACT))


def w4a8_fp8_large(
    x: torch.Tensor, weight: PackedWeight, *, out_dtype: torch.dtype, x_scales: torch.Tensor,
    bias: torch.Tensor | None = None, row_scales: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """What `w4_gemm` returns for e4m3 `x [M, K]`, to within the second rounding of the weight.

    `row_scales` are the weight's `fp8_row_scales`, where the caller keeps them. The widened weight,
    N * K bytes, lives for this call only. The product is rounded to bf16 before it takes
    `out_dtype`. Raises `FormatError` unless N is a multiple of 16,
    as the vendor's product wants.
    """
    if weight.out_features % 16:
        raise FormatError(f"the FP8 product needs N % 16 == 0, found N = {weight.out_features}")
    codes, scales = dequantize_fp8(weight, row_scales)
    out = torch._scaled_mm(
        padded(x), codes.t(), x_scales[:, None], scales[None], None, None, torch.bfloat16,
        use_fast_accum=x.is_cuda,
    )  # fmt: skip
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
    # a product, because a GPU divides by a constant through its reciprocal and a CPU does not
    return (largest.amax(0) * (1 / 448)).clamp(min=1e-30)


def dequantize_fp8_ref(
    weight: PackedWeight, row_scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dequantize_fp8` in torch."""
    scales = fp8_row_scales(weight) if row_scales is None else row_scales
    canonical = weight.unpack()
    ratios = (canonical.scales / scales[:, None]).half()[:, :, None]
    codes = canonical.codes.half().view(*canonical.scales.shape, -1)
    if canonical.zeros is not None:
        codes = (codes + 8) - (canonical.zeros + 8).half()[:, :, None]
    wide = padded((codes * ratios).flatten(1)).float()
    return wide.clamp(-448, 448).to(torch.float8_e4m3fn), scales


@jit
def _ratio(
    scales: tl.tensor, o_scale: tl.tensor, b_t: tl.tensor, b_q: tl.tensor
) -> tl.tensor:  # fmt: skip
    """512 r of each byte's weight, fp16."""
    b_ratio = tl.div_rn(tl.load(scales + o_scale), b_t + tl.zeros_like(o_scale).to(tl.float32))
    return tl.broadcast_to(b_ratio.to(tl.float16) * 512.0, b_q.shape).to(tl.float16)


@jit
def _zero(zeros: tl.tensor, o_scale: tl.tensor, b_q: tl.tensor) -> tl.tensor:
    """z / 512 of each byte's weight, fp16."""
    b_zero = tl.load(zeros + o_scale).to(tl.float16) * (1 / 512)
    return tl.broadcast_to(b_zero, b_q.shape).to(tl.float16)


@jit
def widened(
    b_byte: tl.tensor, b_ratio: tl.tensor, b_zero: tl.tensor, ENCODE: tl.constexpr
) -> tl.tensor:
    """(byte as e4m3 - zero) * ratio in e4m3, without assembly; the byte where encoded by hand."""
    b_w = (b_byte.to(tl.float8e4nv, bitcast=True).to(tl.float16) - b_zero) * b_ratio
    b_w = tl.minimum(tl.maximum(b_w.to(tl.float32), -448.0), 448.0)
    return e4m3_bits(b_w) if ENCODE else b_w.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


@jit
def _dequantize_kernel(
    data: tl.tensor, scales: tl.tensor, zeros: tl.tensor, row_scales: tl.tensor, codes: tl.tensor,
    N: tl.tensor, K: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr,
    BLOCK_N: tl.constexpr, TILED: tl.constexpr, USE_PTX: tl.constexpr, ENCODE: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK_N rows of one tile of 128 inputs; `codes` are bytes."""
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
    b_t = tl.load(row_scales + o_row)
    if GROUP < 128:
        o_a = ((i_tile * 128 + o_j) // GROUP) * N + o_row
        o_b = ((i_tile * 128 + 64 + o_j) // GROUP) * N + o_row
    else:
        o_a = (i_tile * 128 // GROUP) * N + o_row
        o_b = o_a
    b_ra, b_rb = _ratio(scales, o_a, b_t, b_q), _ratio(scales, o_b, b_t, b_q)
    if FORMAT == "u4":
        b_za, b_zb = _zero(zeros, o_a, b_q), _zero(zeros, o_b, b_q)
        if USE_PTX:
            b_a, b_b = tl.inline_asm_elementwise(
                _U4_PTX, "=r,=r,r,r,r,r,r,r,r,r,r", [b_q, b_ra, b_rb, b_za, b_zb],
                (tl.uint8, tl.uint8), is_pure=True, pack=4,
            )  # fmt: skip
        else:
            b_a = widened(b_q & 0x0F, b_ra, b_za, ENCODE)
            b_b = widened(b_q >> 4, b_rb, b_zb, ENCODE)
    elif USE_PTX:
        b_a, b_b = tl.inline_asm_elementwise(
            _SM7_PTX, "=r,=r,r,r,r,r,r", [b_q, b_ra, b_rb], (tl.uint8, tl.uint8),
            is_pure=True, pack=4,
        )  # fmt: skip
    else:
        b_a = widened(b_q & 0x87, b_ra, 0.0, ENCODE)
        b_b = widened(((b_q >> 4) & 0x07) | ((b_q << 4) & 0x80), b_rb, 0.0, ENCODE)
    p_codes = codes + o_row.to(tl.int64) * K + i_tile * 128 + o_j
    tl.store(p_codes, b_a, mask=m_n)
    tl.store(p_codes + 64, b_b, mask=m_n)


def dequantize_fp8_triton(
    weight: PackedWeight, row_scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`dequantize_fp8` on the device of `weight`; raises `FormatError` for HI4."""
    if weight.format is Format.HI4:
        raise FormatError("HI4 weights meet int8 activations, not FP8")
    rows = weight.out_features
    width = weight.data.shape[1] * (TILE_K if weight.data.ndim == 4 else 2)
    per_channel = weight.group_size == weight.in_features
    scales = fp8_row_scales(weight) if row_scales is None else row_scales
    codes = torch.empty(rows, width, dtype=torch.uint8, device=weight.data.device)
    _dequantize_kernel[(width // TILE_K, -(-rows // _BLOCK_N))](
        weight.data, weight.scales, weight.scales if weight.zeros is None else weight.zeros,
        scales, codes, rows, K=width, GROUP=width if per_channel else weight.group_size,
        FORMAT=weight.format.value, BLOCK_N=_BLOCK_N, TILED=weight.data.ndim == 4,
        USE_PTX=not INTERPRETED, ENCODE=INTERPRETED, num_warps=4,
    )  # fmt: skip
    return codes.view(torch.float8_e4m3fn), scales
