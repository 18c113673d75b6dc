"""Matrix product of activations with packed four-bit weights.

    y[m, n] = s_x[m] * sum_g s[g, n] * (sum_k u[n, k] x[m, k] - z[g, n] * sum_k x[m, k]) + bias[n]

The dtype of x chooses the scheme: 16- or 32-bit floats (W4A16, s_x = 1), e4m3 (W4A8-FP8) or int8
(W4A8-INT8), the latter two with one scale s_x per token. Codes enter the matrix unit as a format
leaves them (see `packing`): u, code / 512 in e4m3, or 16 * code in int8; the power of two is undone
once in the epilogue. Only U4 has zeros, and needs the sums of x per group.

The kernel swaps the operands: weight rows are the M = 64 side of the tensor core, tokens the other,
so that a decode batch of 16 tokens wastes nothing. Each byte is loaded once and feeds two products,
one per nibble. Products are promoted to fp32 with the group's scale every 128 input features, which
also bounds what the tensor core's short FP8 accumulator can lose. Small batches split K over
programs into an fp32 workspace, summed in fixed order: two runs are bit-equal.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from .activations import group_sums
from .errors import FormatError
from .launch import GemmConfig, constant, device_facts, gemm_config, jit, tl
from .packing import TILE_K, Format, PackedWeight

__all__ = ["padded", "w4_gemm", "w4_gemm_ref"]

_ACCEPTS = {
    Format.U4: (torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    Format.SM7: (torch.float8_e4m3fn,),
    Format.HI4: (torch.int8,),
}
_UNIT = {torch.float8_e4m3fn: 512.0, torch.int8: 1 / 16}

# $2 holds four packed bytes; $0 and $1 receive their A and B operands
_U4_PTX = constant("""
    and.b32 $0, $2, 0x0F0F0F0F;
    shr.u32 $1, $2, 4;
    and.b32 $1, $1, 0x0F0F0F0F;
""")
_HI4_PTX = constant("""
    and.b32 $0, $2, 0xF0F0F0F0;
    shl.b32 $1, $2, 4;
    and.b32 $1, $1, 0xF0F0F0F0;
""")
_SM7_PTX = constant("""{
    .reg .b32 magnitude, sign;
    and.b32 $0, $2, 0x87878787;
    shr.u32 magnitude, $2, 4;
    and.b32 magnitude, magnitude, 0x07070707;
    shl.b32 sign, $2, 4;
    and.b32 sign, sign, 0x80808080;
    or.b32 $1, magnitude, sign;
}""")


def w4_gemm(
    x: torch.Tensor, weight: PackedWeight, *, out_dtype: torch.dtype,
    x_scales: torch.Tensor | None = None, bias: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """`[M, N]` in `out_dtype`: `x [M, K]`, times `x_scales [M]`, by `weight [N, K]`, plus `bias`.

    Raises `FormatError` where the weight's format cannot meet the dtype of `x`.
    """
    run = w4_gemm_triton if x.is_cuda else w4_gemm_ref
    return run(x, weight, out_dtype=out_dtype, x_scales=x_scales, bias=bias)


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
) -> torch.Tensor:  # fmt: skip
    """`w4_gemm` in torch, fp32, from the unpacked definition."""
    _check(x, weight)
    out = x.float() @ weight.unpack().dequantize().t()
    if x_scales is not None:
        out = out * x_scales[:, None]
    return (out if bias is None else out + bias.float()).to(out_dtype)


@jit
def _operands(
    b_q: tl.tensor, FORMAT: tl.constexpr, dtype: tl.constexpr, USE_PTX: tl.constexpr
) -> tl.tensor:
    """The two matrix operands a block of bytes carries.

    The PTX forms do four bytes per instruction and are bit-equal to the portable ones.
    """
    if USE_PTX:
        other: tl.constexpr = _HI4_PTX if FORMAT == "hi4" else _U4_PTX
        asm: tl.constexpr = _SM7_PTX if FORMAT == "sm7" else other
        b_a, b_b = tl.inline_asm_elementwise(
            asm, "=r,=r,r", [b_q], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4
        )
    elif FORMAT == "sm7":
        b_a = b_q & 0x87
        b_b = ((b_q >> 4) & 0x07) | ((b_q << 4) & 0x80)
    elif FORMAT == "hi4":
        b_a = b_q & 0xF0
        b_b = b_q << 4
    else:
        b_a = b_q & 0x0F
        b_b = b_q >> 4
    bits: tl.constexpr = dtype.primitive_bitwidth
    if bits == 8:
        b_a, b_b = b_a.to(dtype, bitcast=True), b_b.to(dtype, bitcast=True)
    else:
        b_a, b_b = b_a.to(dtype), b_b.to(dtype)
    return b_a, b_b


@jit
def _scaled(
    b_p: tl.tensor, scales: tl.tensor, zeros: tl.tensor, p_sums: tl.tensor, g: tl.tensor,
    o_n: tl.tensor, m_n: tl.tensor, m_m: tl.tensor, N: tl.constexpr, HAS_ZEROS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """s * (p - z * sum x) of one group, rows by tokens."""
    b_p = b_p.to(tl.float32)
    if HAS_ZEROS:
        b_z = tl.load(zeros + g * N + o_n, mask=m_n, other=0.0)
        b_p -= b_z[:, None] * tl.load(p_sums, mask=m_m, other=0.0)[None, :]
    return b_p * tl.load(scales + g * N + o_n, mask=m_n, other=0.0)[:, None]


@jit
def _w4_gemm_kernel(
    x: tl.tensor, data: tl.tensor, scales: tl.tensor, zeros: tl.tensor, sums: tl.tensor,
    x_scales: tl.tensor, bias: tl.tensor, out: tl.tensor, M: tl.tensor, stride_x: tl.tensor,
    unit: tl.tensor, N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, FORMAT: tl.constexpr,
    SPLITS: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_J: tl.constexpr, USE_PTX: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK_N weight rows by BLOCK_M tokens over one of SPLITS spans of K.

    BLOCK_J bytes of a row are taken at once: inputs k .. k + BLOCK_J, and as many 64 further on.
    With one split the output is finished here; with more, `out` is fp32 `[SPLITS, M, N]`.
    """
    STEPS: tl.constexpr = K // (2 * BLOCK_J)
    PER_TILE: tl.constexpr = 64 // BLOCK_J
    SPAN: tl.constexpr = GROUP if GROUP < 128 else 128
    ZEROS: tl.constexpr = FORMAT == "u4"
    SUM: tl.constexpr = tl.int32 if FORMAT == "hi4" else tl.float32
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_j = tl.arange(0, BLOCK_J)
    i_split = tl.program_id(2)
    m_n, m_m = o_n < N, o_m < M
    p_data = data + o_n.to(tl.int64)[:, None] * (K // 2) + o_j[None, :]
    p_x = x + o_m.to(tl.int64)[None, :] * stride_x + o_j[:, None]
    p_sums = sums + o_m.to(tl.int64) * (K // SPAN)
    b_acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for i in range(STEPS * i_split // SPLITS, STEPS * (i_split + 1) // SPLITS):
        k = (i // PER_TILE) * 128 + (i % PER_TILE) * BLOCK_J
        b_q = tl.load(p_data + i * BLOCK_J, mask=m_n[:, None], other=0)
        b_xa = tl.load(p_x + k, mask=m_m[None, :], other=0.0)
        b_xb = tl.load(p_x + k + 64, mask=m_m[None, :], other=0.0)
        b_a, b_b = _operands(b_q, FORMAT, x.dtype.element_ty, USE_PTX)
        b_p = tl.dot(b_a, b_xa, input_precision="ieee")
        if GROUP < 128:
            b_acc += _scaled(b_p, scales, zeros, p_sums + k // SPAN, k // GROUP,
                             o_n, m_n, m_m, N, ZEROS)  # fmt: skip
            k += 64
            b_p = tl.dot(b_b, b_xb, input_precision="ieee")
        else:
            b_p = tl.dot(b_b, b_xb, b_p, input_precision="ieee", out_dtype=SUM)
        b_acc += _scaled(b_p, scales, zeros, p_sums + k // SPAN, k // GROUP,
                         o_n, m_n, m_m, N, ZEROS)  # fmt: skip
    b_out = tl.trans(b_acc)
    o_out = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    if SPLITS == 1:
        b_out = _finish(b_out, x_scales, bias, unit, o_m, m_m, o_n, m_n, SCALED, BIASED)
    else:
        o_out += i_split.to(tl.int64) * M * N
    tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=m_m[:, None] & m_n[None, :])


@jit
def _finish(
    b_out: tl.tensor, x_scales: tl.tensor, bias: tl.tensor, unit: tl.tensor, o_m: tl.tensor,
    m_m: tl.tensor, o_n: tl.tensor, m_n: tl.tensor, SCALED: tl.constexpr, BIASED: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """The epilogue of a tokens-by-rows block: token scale, unit of the codes, bias."""
    b_out *= unit
    if SCALED:
        b_out *= tl.load(x_scales + o_m, mask=m_m, other=0.0)[:, None]
    if BIASED:
        b_out += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    return b_out


@jit
def _sum_splits_kernel(
    partial: tl.tensor, x_scales: tl.tensor, bias: tl.tensor, out: tl.tensor, M: tl.tensor,
    unit: tl.tensor, N: tl.constexpr, SPLITS: tl.constexpr, SCALED: tl.constexpr,
    BIASED: tl.constexpr, BLOCK_N: tl.constexpr,
) -> None:  # fmt: skip
    """The splits of one token and BLOCK_N features, in order, then the epilogue."""
    o_m = tl.program_id(0) + tl.arange(0, 1)
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m, m_n = o_m < M, o_n < N
    o_out = o_m.to(tl.int64)[:, None] * N + o_n[None, :]
    b_out = tl.zeros((1, BLOCK_N), tl.float32)
    for i in range(SPLITS):
        p_split = partial + tl.cast(i, tl.int64) * M * N
        b_out += tl.load(p_split + o_out, mask=m_n[None, :], other=0.0)
    b_out = _finish(b_out, x_scales, bias, unit, o_m, m_m, o_n, m_n, SCALED, BIASED)
    tl.store(out + o_out, b_out.to(out.dtype.element_ty), mask=m_n[None, :])


def w4_gemm_triton(
    x: torch.Tensor, weight: PackedWeight, *, out_dtype: torch.dtype,
    x_scales: torch.Tensor | None = None, bias: torch.Tensor | None = None,
    config: GemmConfig | None = None,
) -> torch.Tensor:  # fmt: skip
    """`w4_gemm` on the device of `x`; `config` replaces the heuristic one."""
    _check(x, weight)
    tokens, features = x.shape[0], weight.out_features
    out = torch.empty(tokens, features, dtype=out_dtype, device=x.device)
    if not tokens:
        return out
    x = padded(x)
    width, per_channel = x.shape[1], weight.group_size == weight.in_features
    group = width if per_channel else weight.group_size
    unit = _UNIT.get(x.dtype, 1.0)
    zeros = sums = weight.scales  # never read without zeros
    if weight.zeros is not None:
        zeros, sums = weight.zeros, group_sums(x, min(group, TILE_K)) / unit
    config = config or gemm_config(
        x.device, M=tokens, N=features, K=width, bits=8 * x.element_size()
    )
    splits, target = config.splits, out
    if splits > 1:
        target = torch.empty(splits, tokens, features, dtype=torch.float32, device=x.device)
    grid = (-(-features // config.block_n), -(-tokens // config.block_m), splits)
    epilogue = {"SCALED": x_scales is not None, "BIASED": bias is not None}
    _w4_gemm_kernel[grid](
        x, weight.data, weight.scales, zeros, sums, x_scales, bias, target, tokens,
        x.stride(0), unit, N=features, K=width, GROUP=group, FORMAT=weight.format.value,
        SPLITS=splits, BLOCK_N=config.block_n, BLOCK_M=config.block_m,
        BLOCK_J=min(group, TILE_K // 2), num_warps=config.num_warps, num_stages=config.num_stages,
        USE_PTX=config.use_ptx and x.element_size() == 1, **epilogue,
    )  # fmt: skip
    if splits > 1:
        grid = (tokens, -(-features // 1024), 1)
        _sum_splits_kernel[grid](
            target, x_scales, bias, out, tokens, unit, N=features, SPLITS=splits, BLOCK_N=1024,
            **epilogue,
        )  # fmt: skip
    return out


def padded(x: torch.Tensor) -> torch.Tensor:
    """`x` with unit stride along K and K a multiple of the tile; as it is where both hold."""
    padding = -x.shape[1] % TILE_K
    if padding:
        bits = x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x
        return functional.pad(bits, (0, padding)).view(x.dtype)
    return x if x.stride(1) == 1 else x.contiguous()
