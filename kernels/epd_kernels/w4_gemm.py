"""Matrix product of activations with packed four-bit weights.

    y[m, n] = s_x[m] * sum_g s[g, n] * (sum_k u[n, k] x[m, k] - z[g, n] * sum_k x[m, k]) + bias[n]

The dtype of x chooses the scheme: 16- or 32-bit floats (W4A16, s_x = 1), e4m3 (W4A8-FP8) or int8
(W4A8-INT8), the latter two with one scale s_x per token. Codes enter the matrix unit as a format
leaves them (see `packing`): u / 512 or code / 512 in e4m3, 16 * code in int8, and the code itself
in 16 or 32 bits; the power of two is undone once in the epilogue. Only U4 has zeros. Where they do
not vanish they need the sums of x per group.

The kernel swaps the operands: weight rows are the M = 64 side of the tensor core, tokens the other,
so that a decode batch of 16 tokens wastes nothing. Each byte is loaded once and feeds two products,
one per nibble. Products are promoted to fp32 with the group's scale every 128 input features, which
also bounds what the tensor core's short FP8 accumulator can lose; int8 with one group per row needs
no promotion and is summed exactly in int32. Small batches split K over programs: each leaves its
span in a workspace, and the last to arrive adds them in fixed order, so two runs are bit-equal.
"""

from __future__ import annotations

from functools import partial

import torch
from torch.nn import functional

from .activations import group_sums
from .errors import FormatError
from .launch import (
    GemmConfig,
    device_facts,
    gdc_wait,
    gemm_config,
    jit,
    tl,
)
from .packing import TILE_K, Format, PackedWeight
from .w4_epilogue import Spans, finish, placed, residual_stride
from .w4_few import takes_few, w4_few_triton
from .w4_operands import await_products, load_tokens, operands, wide_operand

__all__ = ["padded", "w4_gemm", "w4_gemm_ref"]

_ACCEPTS = {
    Format.U4: (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    Format.SM7: (torch.float8_e4m3fn,),
    Format.HI4: (torch.int8,),
}
_TUNED_AS = {
    torch.float32: "", torch.float16: "w4a16", torch.bfloat16: "w4a16",
    torch.float8_e4m3fn: "w4a8-fp8", torch.int8: "w4a8-int8",
}  # fmt: skip
_UNIT = {torch.float8_e4m3fn: 512.0, torch.int8: 1 / 16}


def w4_gemm(
    x: torch.Tensor, weight: PackedWeight, *, out_dtype: torch.dtype,
    x_scales: torch.Tensor | None = None, bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`[M, N]` in `out_dtype`: `x [M, K]`, times `x_scales [M]`, by `weight [N, K]`, plus `bias`.

    `residual [M, N]` of `out_dtype` is added after the rounding, as a separate addition would.
    Raises `FormatError` where the weight's format cannot meet the dtype of `x`.
    """
    run = w4_gemm_triton if x.is_cuda else w4_gemm_ref
    return run(x, weight, out_dtype=out_dtype, x_scales=x_scales, bias=bias, residual=residual)


def _check(x: torch.Tensor, weight: PackedWeight) -> None:
    if x.dtype not in _ACCEPTS[weight.format]:
        raise FormatError(f"{weight.format.name} weights cannot meet {x.dtype} activations")
    if x.shape[1] != weight.in_features:
        raise FormatError(f"x has {x.shape[1]} features, the weight {weight.in_features}")
    arch = device_facts(x.device).arch
    if x.is_cuda and arch < (89 if x.dtype == torch.float8_e4m3fn else 80):
        raise FormatError(f"no {x.dtype} product at compute capability {arch / 10}")


def w4_gemm_ref(
    x: torch.Tensor, weight: PackedWeight, *, out_dtype: torch.dtype,
    x_scales: torch.Tensor | None = None, bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`w4_gemm` in torch, fp32, from the unpacked definition."""
    _check(x, weight)
    out = x.float() @ weight.unpack().dequantize().t()
    if x_scales is not None:
        out = out * x_scales[:, None]
    out = (out if bias is None else out + bias.float()).to(out_dtype)
    return out if residual is None else out + residual


@jit
def _scaled(
    b_p: tl.tensor, scales: tl.tensor, zeros: tl.tensor, p_sums: tl.tensor, g: tl.tensor,
    o_row: tl.tensor, N: tl.tensor, ZEROS: tl.constexpr, CENTRE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """s * (p - z * sum x) of one group, rows by tokens; z is counted from CENTRE."""
    b_p = b_p.to(tl.float32)
    if ZEROS:
        b_z = tl.load(zeros + g * N + o_row) - CENTRE
        b_p -= b_z[:, None] * tl.load(p_sums)[None, :]
    return b_p * tl.load(scales + g * N + o_row)[:, None]


@jit
def _w4_gemm_kernel(
    x: tl.tensor, data: tl.tensor, scales: tl.tensor, zeros: tl.tensor, sums: tl.tensor,
    x_scales: tl.tensor, bias: tl.tensor, residual: tl.tensor, out: tl.tensor, partial: tl.tensor,
    arrivals: tl.tensor, M: tl.tensor, N: tl.tensor, num_whole: tl.tensor, num_splits: tl.tensor,
    stride_x: tl.tensor, stride_r: tl.tensor, unit: tl.tensor, K: tl.constexpr,
    GROUP: tl.constexpr, FORMAT: tl.constexpr, SPLIT: tl.constexpr, TILED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, STAGES: tl.constexpr,
    USE_PTX: tl.constexpr, ZEROS: tl.constexpr, EARLY: tl.constexpr, UNROLL: tl.constexpr,
    TURNED: tl.constexpr, WGMMA: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK_N weight rows by BLOCK_M tokens over one span of K, as `placed` says.

    BLOCK_J bytes of a row are taken at once: inputs k .. k + BLOCK_J, and as many 64 further on.
    UNROLL such steps share a trip of the loop, and its barriers; where nothing is promoted in
    between they are one product. Rows and tokens past the end repeat the last one and are not
    stored. STAGES is said to the loop and not only to the launch, so that the scales travel ahead
    of their use as the weights do.
    """
    STEPS: tl.constexpr = K // (2 * BLOCK_J)
    PER_TILE: tl.constexpr = 64 // BLOCK_J
    SPAN: tl.constexpr = GROUP if GROUP < 128 else 128
    CENTRE: tl.constexpr = 8 if x.dtype.element_ty.primitive_bitwidth > 8 else 0
    ROWWISE: tl.constexpr = GROUP == K and not ZEROS
    SUM: tl.constexpr = tl.int32 if FORMAT == "hi4" else tl.float32
    HELD: tl.constexpr = SUM if ROWWISE else tl.float32
    TILE: tl.constexpr = 4096 if TILED else 64
    JOINED: tl.constexpr = x.dtype.element_ty.primitive_bitwidth == 8 and GROUP >= 128
    BARE: tl.constexpr = ROWWISE and FORMAT == "hi4" and JOINED
    WIDTH: tl.constexpr = BLOCK_J if not JOINED else (128 * UNROLL if BARE else 128)
    TRIPS: tl.constexpr = STEPS // UNROLL
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
    o_j = tl.arange(0, BLOCK_J)
    o_row = tl.minimum(o_n, N - 1)
    o_token = tl.minimum(o_m, M - 1).to(tl.int64)
    if TILED:
        o_data = (o_row // 64).to(tl.int64) * (32 * K) + (o_row % 64) * 64
    else:
        o_data = o_row.to(tl.int64) * (K // 2)
    p_data = data + o_data[:, None] + o_j[None, :]
    p_x = x + o_token[None, :] * stride_x + tl.arange(0, WIDTH)[:, None]
    m_m = o_m < M
    p_sums = sums + o_token * (K // SPAN)
    b_acc = tl.zeros((BLOCK_N, BLOCK_M), HELD)
    for i_trip in tl.range(first, last, num_stages=STAGES):
        if TURNED:
            i_trip += i_n % (last - first)
            i_trip = tl.where(i_trip < last, i_trip, i_trip - (last - first))
        if BARE:
            b_x = load_tokens(p_x + i_trip * WIDTH, m_m)
            b_w = wide_operand(
                p_data, i_trip * UNROLL, TILE, UNROLL, FORMAT, x.dtype.element_ty, USE_PTX
            )
            b_acc = tl.dot(b_w, b_x, b_acc, out_dtype=SUM)
            await_products(i_trip, WGMMA)
        for i_step in tl.static_range(0 if BARE else UNROLL):
            i = i_trip * UNROLL + i_step
            i_tile, j = i // PER_TILE, (i % PER_TILE) * BLOCK_J
            k = i_tile * 128 + j
            if JOINED:
                b_w = wide_operand(p_data, i, TILE, 1, FORMAT, x.dtype.element_ty, USE_PTX)
                b_p = tl.dot(b_w, load_tokens(p_x + k, m_m), out_dtype=SUM)
            else:
                b_q = tl.load(p_data + i_tile * TILE + j)
                b_xa = load_tokens(p_x + k, m_m)
                b_xb = load_tokens(p_x + k + 64, m_m)
                b_a, b_b = operands(b_q, FORMAT, x.dtype.element_ty, USE_PTX)
                b_p = tl.dot(b_a, b_xa, input_precision="ieee", out_dtype=SUM)
                if GROUP < 128:
                    b_acc += _scaled(
                        b_p, scales, zeros, p_sums + k // SPAN, k // GROUP, o_row, N, ZEROS, CENTRE
                    )
                    k += 64
                    b_p = tl.dot(b_b, b_xb, input_precision="ieee", out_dtype=SUM)
                else:
                    b_p = tl.dot(b_b, b_xb, b_p, input_precision="ieee", out_dtype=SUM)
            if ROWWISE:
                b_acc += b_p
            else:
                b_acc += _scaled(
                    b_p, scales, zeros, p_sums + k // SPAN, k // GROUP, o_row, N, ZEROS, CENTRE
                )
    finish(
        b_acc, scales, x_scales, bias, residual, out, partial, arrivals, o_m, o_n, M, N,
        i_rest, i_split, spans, stride_r, unit, SPLIT, ROWWISE, EARLY, BLOCK_N, BLOCK_M,
    )  # fmt: skip


def w4_gemm_triton(
    x: torch.Tensor, weight: PackedWeight, *, out_dtype: torch.dtype,
    x_scales: torch.Tensor | None = None, bias: torch.Tensor | None = None,
    residual: torch.Tensor | None = None, config: GemmConfig | None = None,
) -> torch.Tensor:  # fmt: skip
    """`w4_gemm` on the device of `x`; `config` replaces the one chosen for the shape."""
    _check(x, weight)
    tokens, features = x.shape[0], weight.out_features
    out = torch.empty(tokens, features, dtype=out_dtype, device=x.device)
    if not tokens:
        return out
    x = padded(x)
    width, rowwise = x.shape[1], weight.group_size == weight.in_features
    group = width if rowwise else weight.group_size
    unit = _UNIT.get(x.dtype, 1.0)
    zeros = sums = weight.scales  # never read without zeros
    shifted = False
    if weight.zeros is not None and not (weight.centred and x.element_size() > 1):
        shifted = True
        zeros, sums = weight.zeros, group_sums(x, min(group, TILE_K), unit=1 / unit)
    config = config or _config(x, weight, "" if shifted else _scheme(x, weight))
    if config.num_warps == 1:
        assert x_scales is not None and takes_few(x, weight, config)
        return w4_few_triton(
            x, weight, out, config, x_scales=x_scales, bias=bias, residual=residual
        )
    steps = width // (2 * min(group, TILE_K // 2))
    held = torch.int32 if rowwise and weight.format is Format.HI4 else torch.float32
    spans = Spans.of(config, tokens, features, held, out)
    tiled = weight.data.ndim == 4
    _w4_gemm_kernel[(spans.programs,)](
        x, weight.data, weight.scales, zeros, sums, x_scales, bias, residual, out, spans.partial,
        spans.arrivals, tokens, features, spans.whole, spans.count, x.stride(0),
        residual_stride(residual, out), unit, K=width, GROUP=group, FORMAT=weight.format.value,
        SPLIT=spans.count > 1, TILED=tiled, BLOCK_N=config.block_n, BLOCK_M=config.block_m,
        BLOCK_J=min(group, TILE_K // 2), STAGES=config.num_stages,
        USE_PTX=config.use_ptx and x.element_size() <= 2, ZEROS=shifted, EARLY=config.early,
        UNROLL=config.unroll if steps % config.unroll == 0 else 1, TURNED=config.turned,
        WGMMA=device_facts(x.device).arch == 90, **config.options,
    )  # fmt: skip
    return out


def _config(x: torch.Tensor, weight: PackedWeight, scheme: str) -> GemmConfig:
    """The launch of the nearest shape; the rule's, where one warp cannot take this one."""
    choose = partial(
        gemm_config, x.device, M=len(x), N=weight.out_features, K=x.shape[1],
        bits=8 * x.element_size(),
    )  # fmt: skip
    config = choose(scheme=scheme)
    return config if config.num_warps > 1 or takes_few(x, weight, config) else choose()


def _scheme(x: torch.Tensor, weight: PackedWeight) -> str:
    """The name under which launches of this product are tuned."""
    name = _TUNED_AS[x.dtype]
    if weight.format is Format.HI4:
        name += "-channel" if weight.group_size == weight.in_features else "-group"
    return name + "-tiled" * (weight.data.ndim == 4)


def padded(x: torch.Tensor) -> torch.Tensor:
    """`x` with unit stride along K and K a multiple of the tile; as it is where both hold."""
    padding = -x.shape[1] % TILE_K
    if padding:
        bits = x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
        return functional.pad(bits, (0, padding)).view(x.dtype)
    return x if x.stride(1) == 1 else x.contiguous()
