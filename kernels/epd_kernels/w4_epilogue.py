"""What follows the loop of a four-bit GEMM: spans of K added up, scales, bias, residual, the store.

    out[m, n] = round(s_x[m] * s[n] * acc[n, m] * unit + bias[n])            and, with a residual,
    out[m, n] = round(out[m, n] + residual[m, n])

with s where a row has one scale. The residual is added after the rounding of the product, as a
separate addition would, so fusing it changes no bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from .errors import FormatError
from .launch import device_facts, gdc_launch_dependents, jit, tl

if TYPE_CHECKING:
    from .launch import GemmConfig

__all__ = ["Spans", "even_pieces", "finish", "placed", "residual_stride"]

_MOST_BLOCKS = 4096


@jit
def placed(
    M: tl.tensor, N: tl.tensor, num_whole: tl.tensor, num_splits: tl.tensor, SPLIT: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """(its number among split blocks, its token and row block, span, spans) of this program.

    The first `num_whole` blocks have one span; then come the first spans of all others, and so on.
    Blocks of the same rows follow one another.
    """
    i_block = tl.program_id(0)
    i_rest, i_split, spans = 0, 0, 1
    blocks_m = tl.cdiv(M, BLOCK_M)
    if SPLIT:
        num_rest = blocks_m * tl.cdiv(N, BLOCK_N) - num_whole
        spans = tl.where(i_block < num_whole, 1, num_splits)
        i_split = tl.maximum(i_block - num_whole, 0) // num_rest
        i_block -= i_split * num_rest
        i_rest = i_block - num_whole
    return i_rest, i_block % blocks_m, i_block // blocks_m, i_split, spans


@jit
def _gathered(
    b_acc: tl.tensor, partial: tl.tensor, arrivals: tl.tensor, i_rest: tl.tensor,
    i_split: tl.tensor, spans: tl.tensor, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """(whether all spans have arrived, their sum) after leaving `b_acc` in the workspace.

    The last to arrive adds all spans in order: the sum does not depend on who it is.
    """
    done = spans == 1
    if spans > 1:
        o_block = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
        p_block = partial + i_rest.to(tl.int64) * spans * (BLOCK_N * BLOCK_M) + o_block
        tl.store(p_block + i_split * (BLOCK_N * BLOCK_M), b_acc)
        tl.debug_barrier()
        done = tl.atomic_add(arrivals + i_rest, 1, sem="acq_rel") == spans - 1
        if done:
            b_acc = tl.zeros((BLOCK_N, BLOCK_M), b_acc.dtype)
            for i in range(spans):
                b_acc += tl.load(p_block + i * (BLOCK_N * BLOCK_M), cache_modifier=".cg")
            tl.store(arrivals + i_rest, 0)
    return done, b_acc


@jit
def finish(
    b_acc: tl.tensor, row_scales: tl.tensor, x_scales: tl.tensor, bias: tl.tensor,
    residual: tl.tensor, out: tl.tensor, partial: tl.tensor, arrivals: tl.tensor, o_m: tl.tensor,
    o_n: tl.tensor, M: tl.tensor, N: tl.tensor, i_rest: tl.tensor, i_split: tl.tensor,
    spans: tl.tensor, stride_r: tl.tensor, unit: tl.tensor, SPLIT: tl.constexpr,
    ROWWISE: tl.constexpr, EARLY: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
) -> None:  # fmt: skip
    """Store a block of sums, BLOCK_N rows by BLOCK_M tokens, as `out [M, N]`.

    `x_scales`, `bias` and `residual` may be None. With SPLIT the block is one of `spans` spans of
    K, as `placed` says; with EARLY the kernel behind this one may start.
    """
    if EARLY:
        gdc_launch_dependents()
    done = True
    if SPLIT:
        done, b_acc = _gathered(b_acc, partial, arrivals, i_rest, i_split, spans, BLOCK_N, BLOCK_M)
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
    """How a GEMM's blocks and spans of K are launched, and where spans are left and counted.

    The first `whole` blocks are of one span, the others of `count`.
    """

    programs: int
    whole: int
    count: int
    partial: torch.Tensor
    arrivals: torch.Tensor

    @staticmethod
    def of(
        config: GemmConfig, tokens: int, features: int, held: torch.dtype, out: torch.Tensor
    ) -> Spans:
        """The spans `config` asks for, with a workspace of dtype `held` on the device of `out`.

        More blocks than there are counters fill any device, and take one span.
        """
        blocks = -(-tokens // config.block_m) * -(-features // config.block_n)
        whole, splits = 0, config.splits
        if config.cut:
            sms = device_facts(out.device).num_sms
            whole = blocks // sms * sms
            splits = even_pieces(blocks - whole, sms, most=splits)
        rest = blocks - whole
        if splits == 1 or not 0 < rest <= _MOST_BLOCKS:
            return Spans(blocks, 0, 1, out, out)  # neither is touched
        size = rest * splits * config.block_m * config.block_n
        partial = torch.empty(size, dtype=held, device=out.device)
        return Spans(whole + rest * splits, whole, splits, partial, _arrivals(out.device))


def even_pieces(blocks: int, sms: int, *, most: int) -> int:
    """Into how many equal pieces to cut `blocks` so that `sms` multiprocessors end together.

    ceil(blocks * pieces / sms) / pieces is the time of the busiest one; of equals the fewest.
    """
    return min(range(1, most + 1), key=lambda n: (-(-blocks * n // sms) / n, n))


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
