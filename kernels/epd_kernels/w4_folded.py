"""Middling batches in W4A8-FP8: group scales folded into the eight-bit operand as it is decoded.

    r[n, g]  = round_fp16(s[g, n] / t[n])                       t: one scale per row, see w4_dequant
    w8[n, k] = +-T[abs(code)],   T[m] = round_e4m3(round_fp16(m * r[n, g])),   m = 0..7
    y[m, n]  = s_x[m] * t[n] * sum_k x[m, k] w8[n, k] + bias[n]

`w4_gemm` promotes every group to fp32 with its scale. That costs little while tokens are few; from
some dozens on it takes a second set of accumulators, and with it the registers of a third program
per multiprocessor. Here a group's scale is in the eight bytes T, which come as two words: four
codes find their bytes with one byte permutation, signs are or-ed in, and the whole row is summed in
one set of accumulators. The numbers are those of `w4a8_fp8_large`, which writes the same w8 to
memory, and so is the arithmetic: sums in the tensor core's own accumulator of about 14 bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .errors import FormatError
from .launch import (
    GemmConfig,
    constant,
    device_facts,
    gdc_wait,
    gemm_config,
    jit,
    tl,
)
from .packing import TILE_K, Format, PackedWeight
from .w4_dequant import dequantize_fp8_ref, fp8_row_scales
from .w4_epilogue import Spans, finish, placed, residual_stride
from .w4_gemm import padded
from .w4_operands import await_products, joined, load_tokens

__all__ = ["FoldedScales", "fold_scales", "folds", "w4a8_fp8_folded", "w4a8_fp8_folded_ref"]

_LARGEST = 448.0  # of e4m3
# $2 holds four packed bytes, $3 and $7 the words of T. The fourth bit of a permutation's selector
# would copy a sign, so only the three bits of a magnitude may select; A and B come interleaved.
_LOOK_UP = constant("""{
    .reg .b32 at, first, second, a, b;
    and.b32 at, $2, 0x77777777;
    prmt.b32 first, $3, $7, at;
    shr.u32 at, at, 16;
    prmt.b32 second, $3, $7, at;
    prmt.b32 a, first, second, 0x6420;
    prmt.b32 b, first, second, 0x7531;
    lop3.b32 $0, $2, 0x80808080, a, 0xEA;
    shl.b32 at, $2, 4;
    lop3.b32 $1, at, 0x80808080, b, 0xEA;
}""")


@dataclass(frozen=True, slots=True, eq=False)
class FoldedScales:
    """What the folded product needs of a weight's scales: `tables` `[2, Gp, N]`, `rows` `[N]`.

    The first words (int32) hold T[0..3], lowest byte first, the second T[4..7].
    """

    tables: torch.Tensor
    rows: torch.Tensor


def folds(weight: PackedWeight) -> bool:
    """Whether the scales of `weight` can be folded: SM7, with groups of 128."""
    return weight.format is Format.SM7 and weight.group_size == TILE_K


def fold_scales(weight: PackedWeight, row_scales: torch.Tensor | None = None) -> FoldedScales:
    """The folded scales of a weight in SM7 with groups of 128; `FormatError` for any other."""
    if not folds(weight):
        raise FormatError(
            f"scales fold into SM7 weights with groups of {TILE_K}, found {weight.format.name} "
            f"with groups of {weight.group_size}"
        )
    rows = fp8_row_scales(weight) if row_scales is None else row_scales
    ratios = (weight.scales / rows).half()[..., None]
    entries = ratios * torch.arange(8, dtype=torch.float16, device=ratios.device)
    codes = entries.float().clamp(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)
    words = codes.view(torch.int32).movedim(-1, 0)
    return FoldedScales(words.contiguous(), rows)


def w4a8_fp8_folded(
    x: torch.Tensor, weight: PackedWeight, *, out_dtype: torch.dtype, x_scales: torch.Tensor,
    bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
    folded: FoldedScales | None = None,
) -> torch.Tensor:  # fmt: skip
    """What `w4_gemm` returns for e4m3 `x [M, K]`, to within the second rounding of the weight.

    `folded` is `fold_scales(weight)`, where the caller keeps it. Raises `FormatError` unless the
    weight is in SM7 with groups of 128.
    """
    folded = folded or fold_scales(weight)
    run = w4a8_fp8_folded_triton if x.is_cuda else w4a8_fp8_folded_ref
    return run(
        x, weight, out_dtype=out_dtype, x_scales=x_scales, bias=bias, residual=residual,
        folded=folded,
    )  # fmt: skip


def w4a8_fp8_folded_ref(
    x: torch.Tensor, weight: PackedWeight, *, out_dtype: torch.dtype, x_scales: torch.Tensor,
    folded: FoldedScales, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`w4a8_fp8_folded` in torch, fp32."""
    codes, rows = dequantize_fp8_ref(weight, folded.rows)
    out = padded(x).float() @ codes.float().t() * x_scales[:, None] * rows
    out = (out if bias is None else out + bias.float()).to(out_dtype)
    return out if residual is None else out + residual


@jit
def _entries(b_low: tl.tensor, b_high: tl.tensor, b_m: tl.tensor) -> tl.tensor:
    """The bytes T[b_m]."""
    b_m = b_m.to(tl.int32)
    return (tl.where(b_m < 4, b_low, b_high) >> (b_m % 4 * 8)).to(tl.uint8)


@jit
def _operand(
    b_q: tl.tensor, b_low: tl.tensor, b_high: tl.tensor, USE_PTX: tl.constexpr
) -> tl.tensor:
    """The e4m3 operand of a block of SM7 bytes with the two words of T per row."""
    b_low = tl.broadcast_to(b_low[:, None], b_q.shape)
    b_high = tl.broadcast_to(b_high[:, None], b_q.shape)
    if USE_PTX:
        b_a, b_b = tl.inline_asm_elementwise(
            _LOOK_UP, "=r,=r,r,r,r,r,r,r,r,r,r", [b_q, b_low, b_high], dtype=(tl.uint8, tl.uint8),
            is_pure=True, pack=4,
        )  # fmt: skip
    else:
        b_a = _entries(b_low, b_high, b_q & 0x07) | (b_q & 0x80)
        b_b = _entries(b_low, b_high, (b_q >> 4) & 0x07) | ((b_q << 4) & 0x80)
    return joined(b_a.to(tl.float8e4nv, bitcast=True), b_b.to(tl.float8e4nv, bitcast=True))


@jit
def _folded_kernel(
    x: tl.tensor, data: tl.tensor, tables: tl.tensor, row_scales: tl.tensor, x_scales: tl.tensor,
    bias: tl.tensor, residual: tl.tensor, out: tl.tensor, partial: tl.tensor, arrivals: tl.tensor,
    M: tl.tensor, N: tl.tensor, num_whole: tl.tensor, num_splits: tl.tensor, stride_x: tl.tensor,
    stride_r: tl.tensor, K: tl.constexpr, SPLIT: tl.constexpr, TILED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr, USE_PTX: tl.constexpr,
    EARLY: tl.constexpr, UNROLL: tl.constexpr, WGMMA: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK_N weight rows by BLOCK_M tokens over one span of K, as `placed` says.

    UNROLL, one or two, steps of 128 inputs are one product, which the compiler cuts into pieces and
    starts one by one while it decodes the operands of the next.
    """
    TRIPS: tl.constexpr = K // 128 // UNROLL
    TILE: tl.constexpr = 4096 if TILED else 64
    i_rest, i_m, i_n, i_split, spans = placed(
        M, N, num_whole, num_splits, SPLIT, BLOCK_N, BLOCK_M
    )  # fmt: skip
    first, last = 0, TRIPS
    if SPLIT:
        first, last = TRIPS * i_split // spans, TRIPS * (i_split + 1) // spans
    if EARLY:
        gdc_wait()
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_j = tl.arange(0, 64)
    o_row = tl.minimum(o_n, N - 1)
    o_token = tl.minimum(o_m, M - 1).to(tl.int64)
    if TILED:
        o_data = (o_row // 64).to(tl.int64) * (32 * K) + (o_row % 64) * 64
    else:
        o_data = o_row.to(tl.int64) * (K // 2)
    p_data = data + o_data[:, None] + o_j[None, :]
    p_x = x + o_token[None, :] * stride_x + tl.arange(0, 128 * UNROLL)[:, None]
    p_low, p_high = tables + o_row, tables + (K // 128) * N + o_row
    b_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i_trip in tl.range(first, last, num_stages=STAGES):
        i = i_trip * UNROLL
        b_x = load_tokens(p_x + i * 128, o_m < M)
        b_w = _operand(
            tl.load(p_data + i * TILE), tl.load(p_low + i * N), tl.load(p_high + i * N), USE_PTX
        )
        if UNROLL == 2:
            i += 1
            b_next = _operand(
                tl.load(p_data + i * TILE), tl.load(p_low + i * N), tl.load(p_high + i * N), USE_PTX
            )
            b_w = joined(b_w, b_next)
        b_acc = tl.dot(b_w, b_x, b_acc)
        await_products(i, WGMMA)
    finish(
        b_acc, row_scales, x_scales, bias, residual, out, partial, arrivals, o_m, o_n, M, N,
        i_rest, i_split, spans, stride_r, 1.0, SPLIT, True, EARLY, BLOCK_N, BLOCK_M,
    )  # fmt: skip


def w4a8_fp8_folded_triton(
    x: torch.Tensor, weight: PackedWeight, *, out_dtype: torch.dtype, x_scales: torch.Tensor,
    folded: FoldedScales, bias: torch.Tensor | None = None, residual: torch.Tensor | None = None,
    config: GemmConfig | None = None,
) -> torch.Tensor:  # fmt: skip
    """`w4a8_fp8_folded` on the device of `x`; `config` replaces the one chosen for the shape."""
    tokens, features, tiled = x.shape[0], weight.out_features, weight.data.ndim == 4
    if x.dtype != torch.float8_e4m3fn or x.shape[1] != weight.in_features:
        raise FormatError(
            f"x must be e4m3 with {weight.in_features} features, found {x.dtype} {list(x.shape)}"
        )
    out = torch.empty(tokens, features, dtype=out_dtype, device=x.device)
    if not tokens:
        return out
    x = padded(x)
    width = x.shape[1]
    config = config or gemm_config(
        x.device, M=tokens, N=features, K=width, bits=8,
        scheme="w4a8-fp8-folded" + "-tiled" * tiled,
    )  # fmt: skip
    spans = Spans.of(config, tokens, features, torch.float32, out)
    _folded_kernel[(spans.programs,)](
        x, weight.data, folded.tables, folded.rows, x_scales, bias, residual, out, spans.partial,
        spans.arrivals, tokens, features, spans.whole, spans.count, x.stride(0),
        residual_stride(residual, out), K=width, SPLIT=spans.count > 1, TILED=tiled,
        BLOCK_N=config.block_n, BLOCK_M=config.block_m, STAGES=config.num_stages,
        USE_PTX=config.use_ptx, EARLY=config.early,
        UNROLL=config.unroll if width // TILE_K % config.unroll == 0 else 1,
        WGMMA=device_facts(x.device).arch == 90,
        **config.options,
    )  # fmt: skip
    return out
