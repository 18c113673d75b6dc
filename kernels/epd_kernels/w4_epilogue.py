"""What follows the loop of a four-bit GEMM: spans of K added up, scales, bias, residual, the store.

    out[m, n] = round(s_x[m] * s[n] * acc[n, m] * unit + bias[n])            and, with a residual,
    out[m, n] = round(out[m, n] + residual[m, n])

with s where a row has one scale. The residual is added after the rounding of the product, as a
separate addition would, so fusing it changes no bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from .errors import FormatError
from .launch import gdc_launch_dependents, jit, tl

if TYPE_CHECKING:
    from .launch import GemmConfig

__all__ = ["Spans", "finish", "residual_stride"]

_MOST_BLOCKS = 4096


@jit
def _gathered(
    b_acc: tl.tensor, partial: tl.tensor, arrivals: tl.tensor, num_splits: tl.tensor,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(whether all spans have arrived, their sum) after leaving `b_acc` in the workspace.

    The last to arrive adds all spans in order: the sum does not depend on who it is.
    """
    i_block = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    o_block = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    p_block = partial + i_block.to(tl.int64) * num_splits * (BLOCK_N * BLOCK_M) + o_block
    tl.store(p_block + tl.program_id(2) * (BLOCK_N * BLOCK_M), b_acc)
    tl.debug_barrier()
    done = tl.atomic_add(arrivals + i_block, 1, sem="acq_rel") == num_splits - 1
    if done:
        b_acc = tl.zeros((BLOCK_N, BLOCK_M), b_acc.dtype)
        for i in range(num_splits):
            b_acc += tl.load(p_block + i * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
        tl.store(arrivals + i_block, 0)
    return done, b_acc


@jit
def finish(
    b_acc: tl.tensor, row_scales: tl.tensor, x_scales: tl.tensor, bias: tl.tensor,
    residual: tl.tensor, out: tl.tensor, partial: tl.tensor, arrivals: tl.tensor, o_m: tl.tensor,
    o_n: tl.tensor, M: tl.tensor, N: tl.tensor, num_splits: tl.tensor, stride_r: tl.tensor,
    unit: tl.tensor, SPLIT: tl.constexpr, ROWWISE: tl.constexpr, EARLY: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
) -> None:  # fmt: skip
    """Store a block of sums, BLOCK_N rows by BLOCK_M tokens, as `out [M, N]`.

    `x_scales`, `bias` and `residual` may be None. With SPLIT the block is one span of K of
    `num_splits`; with EARLY the kernel behind this one may start.
    """
    if EARLY:
        gdc_launch_dependents()
    done = True
    if SPLIT:
        done, b_acc = _gathered(b_acc, partial, arrivals, num_splits, BLOCK_N, BLOCK_M)
    if done:
        b_sum = b_acc.to(tl.float32)
        if ROWWISE:
            b_sum *= tl.load(row_scales + tl.minimum(o_n, N - 1))[:, None]
        m_m, m_n = o_m < M, o_n < N
        b_out = tl.trans(b_sum) * unit
        if x_scales is not None:
            b_out *= tl.load(x_scales + o_m, mask=m_m, other=0.0)[:, None]
        if bias is not None:
            b_out += tl.load(bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
        mask = m_m[:, None] & m_n[None, :]
        o_token = o_m.to(tl.int64)[:, None]
        b_out = b_out.to(out.dtype.element_ty)
        if residual is not None:
            p_residual = residual + o_token * stride_r + o_n[None, :]
            b_residual = tl.load(p_residual, mask=mask, other=0.0).to(tl.float32)
            b_out = (b_out.to(tl.float32) + b_residual).to(out.dtype.element_ty)
        tl.store(out + o_token * N + o_n[None, :], b_out, mask=mask)


@dataclass(frozen=True, slots=True, eq=False)
class Spans:
    """How a GEMM's blocks and spans of K are launched, and where spans are left and counted."""

    grid: tuple[int, int, int]
    partial: torch.Tensor
    arrivals: torch.Tensor

    @property
    def count(self) -> int:
        return self.grid[2]

    @staticmethod
    def of(
        config: GemmConfig, tokens: int, features: int, held: torch.dtype, out: torch.Tensor
    ) -> Spans:
        """The spans `config` asks for, with a workspace of dtype `held` on the device of `out`.

        More blocks than there are counters fill any device, and take one span.
        """
        blocks = (-(-tokens // config.block_m), -(-features // config.block_n))
        splits = config.splits if math.prod(blocks) <= _MOST_BLOCKS else 1
        grid = (*blocks, splits)
        if splits == 1:
            return Spans(grid, out, out)  # neither is touched
        size = math.prod(grid) * config.block_m * config.block_n
        partial = torch.empty(size, dtype=held, device=out.device)
        return Spans(grid, partial, _arrivals(out.device))


@cache
def _arrivals(device: torch.device) -> torch.Tensor:
    """Zeroed counters, one per block, which every launch leaves at zero again.

    They are the device's, not the call's: GEMMs of one device run one after another.
    """
    return torch.zeros(_MOST_BLOCKS, dtype=torch.int32, device=device)


def residual_stride(residual: torch.Tensor | None, out: torch.Tensor) -> int:
    """Elements between two tokens of the residual; 0 without one.

    Raises `FormatError` unless it has the shape and dtype of `out`, and unit stride along rows.
    """
    if residual is None:
        return 0
    if residual.shape != out.shape or residual.dtype != out.dtype or residual.stride(1) != 1:
        raise FormatError(
            f"the residual must be {out.dtype} {list(out.shape)} with contiguous rows, found "
            f"{residual.dtype} {list(residual.shape)}"
        )
    return residual.stride(0)
