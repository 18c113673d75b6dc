"""Few tokens: the four-bit GEMM by programs of one warp, without shared memory.

The maths is that of `w4_gemm`. A decode step's product waits for memory, and tiles of four warps
wait for each other as well, a barrier per step, while each of them asks the L2 cache for all
activations again. Here a program has 16 to 64 rows and one warp, weights go straight to the lanes
that multiply them (see `w4_lanes`), those of the next steps under way while these are multiplied,
and activations, a few kilobytes, are found in the L1 cache. Every tensor has 32 elements, one per
lane: a register. Integer sums are exact, so int8 with one scale per row gives the very bits of
`w4_gemm`; FP8 is widened to fp16 and summed in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .launch import constant, gdc_launch_dependents, gdc_wait, jit, tl
from .packing import TILE_K, Format, PackedWeight
from .w4_epilogue import residual_stride
from .w4_lanes import HALVES, HALVES_IO, LOAD, LOAD_IO, LOAD_ONCE, fp8_product, int8_product

if TYPE_CHECKING:
    from .launch import GemmConfig

__all__ = ["takes_few", "w4_few_triton"]

_LOAD, _LOAD_ONCE, _LOAD_IO = constant(LOAD), constant(LOAD_ONCE), constant(LOAD_IO)
_HALVES, _HALVES_IO = constant(HALVES), constant(HALVES_IO)


def takes_few(x: torch.Tensor, weight: PackedWeight, config: GemmConfig) -> bool:
    """Whether programs of one warp can multiply `x [M, K]` by `weight` as `config` says."""
    eight_bit = (torch.float8_e4m3fn, Format.SM7), (torch.int8, Format.HI4)
    groups = (weight.in_features, TILE_K) if x.dtype == torch.int8 else (TILE_K,)
    aligned = x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0
    return (
        (x.dtype, weight.format) in eight_bit and weight.data.ndim == 4 and aligned
        and weight.group_size in groups and len(x) <= config.block_m and config.use_ptx
        and weight.data.shape[1] % config.num_stages == 0
    )  # fmt: skip


@jit
def _none() -> tl.tensor:
    """No registers yet."""
    return ()


@jit
def _load_words(
    p_rows: tl.tensor, i_step: tl.tensor, TRIP: tl.constexpr, BLOCKS: tl.constexpr
) -> tl.tensor:
    """Four words of rows g and g + 8 of each block of 16 rows, for TRIP tiles."""
    found = _none()
    for s in tl.static_range(TRIP):
        for b in tl.static_range(2 * BLOCKS):
            p_words = (p_rows + (i_step + s) * 4096 + b * 512).to(tl.int64)
            found += tl.inline_asm_elementwise(
                _LOAD_ONCE, _LOAD_IO, [p_words], dtype=(tl.int32,) * 4, is_pure=False, pack=1
            )
    return found


@jit
def _load_scales(
    scales: tl.tensor, i_step: tl.tensor, o_n: tl.tensor, N: tl.tensor, TRIP: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """Scales of the same rows and tiles."""
    found = _none()
    for s in tl.static_range(TRIP):
        for b in tl.static_range(2 * BLOCKS):
            found += (tl.load(scales + (i_step + s) * N + tl.minimum(o_n + 8 * b, N - 1)),)
    return found


@jit
def _load_tokens(p_x: tl.tensor, k: tl.tensor, FP8: tl.constexpr) -> tl.tensor:
    """Right operands of one tile: per group of eight tokens, low nibbles' inputs, then high."""
    found = _none()
    for j in tl.static_range(len(p_x)):
        for half in tl.static_range(2):
            b_x = tl.inline_asm_elementwise(
                _LOAD, _LOAD_IO, [(p_x[j] + k + 64 * half).to(tl.int64)], dtype=(tl.int32,) * 4,
                is_pure=False, pack=1,
            )  # fmt: skip
            if FP8:
                for w in tl.static_range(4):
                    found += tl.inline_asm_elementwise(
                        _HALVES, _HALVES_IO, [b_x[w]], dtype=(tl.int32, tl.int32), is_pure=True,
                        pack=1,
                    )  # fmt: skip
            else:
                found += b_x
    return found


@jit
def _tile(
    b_words: tl.tensor, b_x: tl.tensor, b_acc: tl.tensor, b_scales: tl.tensor, SUMS: tl.constexpr,
    FP8: tl.constexpr, ROWWISE: tl.constexpr, PRODUCT: tl.constexpr, IO: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`b_acc` and the product of one tile of 16 rows; `b_scales` are two, or none by rows."""
    if FP8:
        b_p = tl.inline_asm_elementwise(
            PRODUCT, IO, b_words + b_x, dtype=(tl.float32,) * SUMS, is_pure=True, pack=1
        )
    else:
        b_before = b_acc
        if not ROWWISE:
            b_before = (tl.zeros((32,), tl.int32),) * SUMS
        b_p = tl.inline_asm_elementwise(
            PRODUCT, IO, b_words + b_x + b_before, dtype=(tl.int32,) * SUMS, is_pure=True, pack=1
        )
    if ROWWISE:
        return b_p
    else:
        total = _none()
        for i in tl.static_range(SUMS):
            total += (b_acc[i] + b_p[i].to(tl.float32) * b_scales[i % 4 // 2],)
        return total


@jit
def _trip(
    b_acc: tl.tensor, b_words: tl.tensor, b_scales: tl.tensor, p_x: tl.tensor, i_step: tl.tensor,
    TRIP: tl.constexpr, BLOCKS: tl.constexpr, FP8: tl.constexpr, ROWWISE: tl.constexpr,
    PRODUCT: tl.constexpr, IO: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`b_acc` after TRIP tiles of every block."""
    SUMS: tl.constexpr = 4 * len(p_x)
    for s in tl.static_range(TRIP):
        b_x = _load_tokens(p_x, (i_step + s) * 128, FP8)
        total = _none()
        for b in tl.static_range(BLOCKS):
            total += _tile(
                b_words[8 * (s * BLOCKS + b) : 8 * (s * BLOCKS + b + 1)], b_x,
                b_acc[SUMS * b : SUMS * (b + 1)],
                b_scales[2 * (s * BLOCKS + b) : 2 * (s * BLOCKS + b + 1)], SUMS, FP8, ROWWISE,
                PRODUCT, IO,
            )  # fmt: skip
        b_acc = total
    return b_acc


@jit
def _few_kernel(
    x: tl.tensor, data: tl.tensor, scales: tl.tensor, x_scales: tl.tensor, bias: tl.tensor,
    residual: tl.tensor, out: tl.tensor, M: tl.tensor, N: tl.tensor, stride_x: tl.tensor,
    stride_r: tl.tensor, unit: tl.tensor, K: tl.constexpr, FP8: tl.constexpr,
    ROWWISE: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, TRIP: tl.constexpr,
    EARLY: tl.constexpr, PRODUCT: tl.constexpr, IO: tl.constexpr,
) -> None:  # fmt: skip
    """16 BLOCKS rows by all tokens, at most 8 GROUPS; weights travel TRIP tiles ahead."""
    STEPS: tl.constexpr = K // 128
    o_lane = tl.arange(0, 32)
    o_g, o_t = o_lane // 4, o_lane % 4
    i_row = tl.program_id(0) * (16 * BLOCKS)
    o_n = i_row + o_g
    p_strip = data + (i_row // 64).to(tl.int64) * (32 * K) + i_row % 64 * 64
    p_rows = p_strip + o_g * 64 + o_t * 16
    # no kernel writes weights: theirs may travel while the kernel ahead drains
    b_words = _load_words(p_rows, 0, TRIP, BLOCKS)
    b_scales = _none()
    if not ROWWISE:
        b_scales = _load_scales(scales, 0, o_n, N, TRIP, BLOCKS)
    if EARLY:
        gdc_wait()
    p_x = _none()
    b_acc = _none()
    for j in tl.static_range(GROUPS):
        p_x += (x + tl.minimum(o_g + 8 * j, M - 1).to(tl.int64) * stride_x + o_t * 16,)
    for _ in tl.static_range(4 * GROUPS * BLOCKS):
        b_acc += (tl.zeros((32,), tl.int32 if ROWWISE else tl.float32),)
    for i in range(0, STEPS - TRIP, TRIP):
        b_next = _load_words(p_rows, i + TRIP, TRIP, BLOCKS)
        b_later = _none()
        if not ROWWISE:
            b_later = _load_scales(scales, i + TRIP, o_n, N, TRIP, BLOCKS)
        b_acc = _trip(b_acc, b_words, b_scales, p_x, i, TRIP, BLOCKS, FP8, ROWWISE, PRODUCT, IO)
        b_words, b_scales = b_next, b_later
    b_acc = _trip(
        b_acc, b_words, b_scales, p_x, STEPS - TRIP, TRIP, BLOCKS, FP8, ROWWISE, PRODUCT, IO
    )
    if EARLY:
        gdc_launch_dependents()
    for b in tl.static_range(2 * BLOCKS):
        o_row = o_n + 8 * b
        b_unit = unit
        if ROWWISE:
            b_unit = tl.load(scales + tl.minimum(o_row, N - 1))
        for i in tl.static_range(2 * GROUPS):
            o_m = 8 * (i // 2) + 2 * o_t + i % 2
            mask = (o_m < M) & (o_row < N)
            b_out = b_acc[4 * GROUPS * (b // 2) + 4 * (i // 2) + 2 * (b % 2) + i % 2]
            b_out = b_out.to(tl.float32) * b_unit
            if ROWWISE:
                b_out *= unit
            b_out *= tl.load(x_scales + o_m, mask=o_m < M, other=0.0)
            if bias is not None:
                b_out += tl.load(bias + o_row, mask=o_row < N, other=0.0).to(tl.float32)
            b_out = b_out.to(out.dtype.element_ty)
            if residual is not None:
                p_residual = residual + o_m.to(tl.int64) * stride_r + o_row
                b_residual = tl.load(p_residual, mask=mask, other=0.0).to(tl.float32)
                b_out = (b_out.to(tl.float32) + b_residual).to(out.dtype.element_ty)
            tl.store(out + o_m.to(tl.int64) * N + o_row, b_out, mask=mask)


def w4_few_triton(
    x: torch.Tensor, weight: PackedWeight, out: torch.Tensor, config: GemmConfig, *,
    x_scales: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """`out [M, N]` filled with what `w4_gemm` returns; `takes_few` must hold.

    Of `config`, `block_n` is 16, 32 or 64 rows, `block_m` 8 or 16 tokens, and `num_stages` counts
    the tiles that weights travel ahead.
    """
    fp8 = x.dtype == torch.float8_e4m3fn
    groups = config.block_m // 8
    product, constraints = (fp8_product if fp8 else int8_product)(groups)
    _few_kernel[(-(-weight.out_features // config.block_n),)](
        x.view(torch.uint8), weight.data, weight.scales, x_scales, bias, residual, out, len(x),
        weight.out_features, x.stride(0), residual_stride(residual, out),
        65536.0 if fp8 else 1 / 16, K=weight.data.shape[1] * TILE_K, FP8=fp8,
        ROWWISE=weight.group_size == weight.in_features and not fp8, BLOCKS=config.block_n // 16,
        GROUPS=groups, TRIP=config.num_stages, EARLY=config.early, PRODUCT=product,
        IO=constraints, **{**config.options, "num_stages": 1},
    )  # fmt: skip
    return out
