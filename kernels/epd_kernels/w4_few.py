"""Up to eight tokens in W4A8-INT8: the GEMM by programs of one warp, without shared memory.

The maths is that of `w4_gemm`. There four warps share a tile: they wait for each other at every
step, and every tile asks the L2 cache for all activations again. Here a program has 16 rows and one
warp, weights go straight to the lanes that multiply them (see `w4_lanes`), those of the next steps
under way while these are multiplied, and activations, a few kilobytes, are found in the L1 cache.
Every tensor has 32 elements, one per lane: a register. Integer sums are exact, so with one scale
per row the result has the very bits of `w4_gemm`.

Sixteen tokens take twice the loads of activations, and e4m3 has no instruction of single warps on
compute capability 9.0: both are slower this way than by tiles (measured on an H200).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from .launch import constant, gdc_launch_dependents, gdc_wait, jit, tl
from .packing import TILE_K, Format, PackedWeight
from .w4_epilogue import residual_stride
from .w4_lanes import LOAD, LOAD_IO, LOAD_ONCE, PRODUCT, PRODUCT_IO

if TYPE_CHECKING:
    from .launch import GemmConfig

__all__ = ["takes_few", "w4_few_triton"]

_MOST_TOKENS = 8
_REGISTERS = 160  # a thread's, of twelve programs on a multiprocessor
_LOAD, _LOAD_ONCE, _LOAD_IO = constant(LOAD), constant(LOAD_ONCE), constant(LOAD_IO)
_PRODUCT, _PRODUCT_IO = constant(PRODUCT), constant(PRODUCT_IO)


def takes_few(x: torch.Tensor, weight: PackedWeight, config: GemmConfig) -> bool:
    """Whether programs of one warp can multiply `x [M, K]` by `weight` as `config` says."""
    return (
        x.dtype == torch.int8 and weight.format is Format.HI4 and weight.data.ndim == 4
        and weight.group_size in (weight.in_features, TILE_K) and len(x) <= _MOST_TOKENS
        and x.data_ptr() % 16 == 0 and x.stride(0) % 16 == 0 and config.use_ptx
        and weight.data.shape[1] % config.num_stages == 0
    )  # fmt: skip


@jit
def _none() -> tl.tensor:
    """No registers yet."""
    return ()


@jit
def _load_words(p_rows: tl.tensor, i_step: tl.tensor, AHEAD: tl.constexpr) -> tl.tensor:
    """Four words of row g and four of row g + 8, for AHEAD tiles."""
    found = _none()
    for s in tl.static_range(AHEAD):
        for r in tl.static_range(2):
            p_words = (p_rows + (i_step + s) * 4096 + r * 512).to(tl.int64)
            found += tl.inline_asm_elementwise(
                _LOAD_ONCE, _LOAD_IO, [p_words], dtype=(tl.int32,) * 4, is_pure=False, pack=1
            )
    return found


@jit
def _load_scales(
    scales: tl.tensor, i_step: tl.tensor, o_n: tl.tensor, N: tl.tensor, AHEAD: tl.constexpr
) -> tl.tensor:
    """Scales of the same rows and tiles."""
    found = _none()
    for s in tl.static_range(AHEAD):
        for r in tl.static_range(2):
            found += (tl.load(scales + (i_step + s) * N + tl.minimum(o_n + 8 * r, N - 1)),)
    return found


@jit
def _load_inputs(p_x: tl.tensor) -> tl.tensor:
    """Token g's inputs to one tile: four words that meet high halves of bytes, four the low."""
    found = _none()
    for half in tl.static_range(2):
        found += tl.inline_asm_elementwise(
            _LOAD, _LOAD_IO, [(p_x + 64 * half).to(tl.int64)], dtype=(tl.int32,) * 4,
            is_pure=False, pack=1,
        )  # fmt: skip
    return found


@jit
def _multiply(
    b_acc: tl.tensor, b_words: tl.tensor, b_scales: tl.tensor, p_x: tl.tensor, i_step: tl.tensor,
    AHEAD: tl.constexpr, ROWWISE: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """`b_acc` after AHEAD tiles; `b_scales` are two per tile, or none where rows have one."""
    for s in tl.static_range(AHEAD):
        b_x = _load_inputs(p_x + (i_step + s) * 128)
        b_before = b_acc
        if not ROWWISE:
            b_before = (tl.zeros((32,), tl.int32),) * 4
        b_p = tl.inline_asm_elementwise(
            _PRODUCT, _PRODUCT_IO, b_words[8 * s : 8 * s + 8] + b_x + b_before,
            dtype=(tl.int32,) * 4, is_pure=True, pack=1,
        )  # fmt: skip
        if not ROWWISE:
            total = _none()
            for i in tl.static_range(4):
                total += (b_acc[i] + b_p[i].to(tl.float32) * b_scales[2 * s + i // 2],)
            b_p = total
        b_acc = b_p
    return b_acc


@jit
def _few_kernel(
    x: tl.tensor, data: tl.tensor, scales: tl.tensor, x_scales: tl.tensor, bias: tl.tensor,
    residual: tl.tensor, out: tl.tensor, M: tl.tensor, N: tl.tensor, stride_x: tl.tensor,
    stride_r: tl.tensor, unit: tl.tensor, K: tl.constexpr, ROWWISE: tl.constexpr,
    AHEAD: tl.constexpr, EARLY: tl.constexpr,
) -> None:  # fmt: skip
    """16 rows by all tokens; weights travel AHEAD tiles before their use."""
    STEPS: tl.constexpr = K // 128
    o_lane = tl.arange(0, 32)
    o_g, o_t = o_lane // 4, o_lane % 4
    i_row = tl.program_id(0) * 16
    o_n = i_row + o_g
    p_strip = data + (i_row // 64).to(tl.int64) * (32 * K) + i_row % 64 * 64
    p_rows = p_strip + o_g * 64 + o_t * 16
    # no kernel writes weights: theirs may travel while the kernel ahead drains
    b_words = _load_words(p_rows, 0, AHEAD)
    b_scales = _none()
    if not ROWWISE:
        b_scales = _load_scales(scales, 0, o_n, N, AHEAD)
    if EARLY:
        gdc_wait()
    p_x = x + tl.minimum(o_g, M - 1).to(tl.int64) * stride_x + o_t * 16
    b_acc = (tl.zeros((32,), tl.int32 if ROWWISE else tl.float32),) * 4
    for i in range(0, STEPS - AHEAD, AHEAD):
        b_next = _load_words(p_rows, i + AHEAD, AHEAD)
        b_later = _none()
        if not ROWWISE:
            b_later = _load_scales(scales, i + AHEAD, o_n, N, AHEAD)
        b_acc = _multiply(b_acc, b_words, b_scales, p_x, i, AHEAD, ROWWISE)
        b_words, b_scales = b_next, b_later
    b_acc = _multiply(b_acc, b_words, b_scales, p_x, STEPS - AHEAD, AHEAD, ROWWISE)
    if EARLY:
        gdc_launch_dependents()
    for i in tl.static_range(4):
        o_row, o_m = o_n + 8 * (i // 2), 2 * o_t + i % 2
        m_n, m_m = o_row < N, o_m < M
        b_out = b_acc[i].to(tl.float32)
        if ROWWISE:
            b_out *= tl.load(scales + o_row, mask=m_n, other=0.0)
        b_out *= unit * tl.load(x_scales + o_m, mask=m_m, other=0.0)
        if bias is not None:
            b_out += tl.load(bias + o_row, mask=m_n, other=0.0).to(tl.float32)
        b_out = b_out.to(out.dtype.element_ty)
        o_token = o_m.to(tl.int64)
        if residual is not None:
            p_residual = residual + o_token * stride_r + o_row
            b_residual = tl.load(p_residual, mask=m_m & m_n, other=0.0).to(tl.float32)
            b_out = (b_out.to(tl.float32) + b_residual).to(out.dtype.element_ty)
        tl.store(out + o_token * N + o_row, b_out, mask=m_m & m_n)


def w4_few_triton(
    x: torch.Tensor, weight: PackedWeight, out: torch.Tensor, config: GemmConfig, *,
    x_scales: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """`out [M, N]` filled with what `w4_gemm` returns; `takes_few` must hold.

    Of `config`, `num_stages` counts the tiles that weights travel ahead.
    """
    _few_kernel[(-(-weight.out_features // 16),)](
        x, weight.data, weight.scales, x_scales, bias, residual, out, len(x), weight.out_features,
        x.stride(0), residual_stride(residual, out), 1 / 16, K=weight.data.shape[1] * TILE_K,
        ROWWISE=weight.group_size == weight.in_features, AHEAD=config.num_stages,
        EARLY=config.early, **{**config.options, "num_stages": 1, "maxnreg": _REGISTERS},
    )  # fmt: skip
    return out
