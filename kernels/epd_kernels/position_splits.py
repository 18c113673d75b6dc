"""Attention whose positions are cut into spans: who takes which, what a span leaves, the merging.

A program that attends to one span leaves its maximum m, its sum l and its unnormalised output; with
M = max_j m_j the whole is

    out = sum_j 2^(m_j - M) out_j / sum_j 2^(m_j - M) l_j
"""

from __future__ import annotations

import torch

from .launch import jit, next_power_of_2, tl

__all__ = ["combine_splits", "split_span", "split_workspace"]


@jit
def split_span(
    end: tl.tensor, i_split: tl.tensor, num_splits: tl.tensor, BLOCK_N: tl.constexpr
) -> tl.tensor:
    """The positions of [0, end) that split `i_split` takes, in whole tiles."""
    chunk = tl.cdiv(tl.cdiv(end, num_splits), BLOCK_N) * BLOCK_N
    start = i_split * chunk
    return start, tl.minimum(start + chunk, end)


@jit
def _combine_kernel(
    partial: tl.tensor, stats: tl.tensor, out: tl.tensor, cu_seqlens_q: tl.tensor,
    num_splits: tl.tensor, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    BY_TOKEN: tl.constexpr,
) -> None:  # fmt: skip
    """Merge the splits of one head of one token, or of one sequence of one query."""
    i_t = tl.program_id(0)
    wanted = True
    if not BY_TOKEN:
        i_t = tl.load(cu_seqlens_q + tl.program_id(0))
        wanted = tl.load(cu_seqlens_q + tl.program_id(0) + 1) == i_t + 1
    if wanted:
        heads, i_h = tl.num_programs(1), tl.program_id(1)
        i_row = tl.program_id(0).to(tl.int64) * heads + i_h
        o_s, o_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
        m_s = o_s < num_splits
        p_stats = stats + (i_row * num_splits + o_s) * 2
        b_m = tl.load(p_stats, mask=m_s, other=float("-inf"))
        b_l = tl.load(p_stats + 1, mask=m_s, other=0.0)
        top = tl.max(b_m, axis=0)
        b_w = tl.exp2(b_m - tl.where(top == float("-inf"), 0.0, top))
        # an empty split may have left its outputs unwritten
        m_o = (b_m > float("-inf"))[:, None] & (o_d < D)[None, :]
        p_o = partial + (i_row * num_splits + o_s)[:, None] * D + o_d[None, :]
        b_o = tl.sum(tl.load(p_o, mask=m_o, other=0.0) * b_w[:, None], axis=0)
        total = tl.sum(b_l * b_w, axis=0)
        b_o = b_o / tl.where(total == 0.0, 1.0, total)
        p_out = out + (i_t.to(tl.int64) * heads + i_h) * D + o_d
        tl.store(p_out, b_o.to(out.dtype.element_ty), mask=o_d < D)


def split_workspace(out: torch.Tensor, rows: int, splits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """What `splits` spans leave for each head of `rows` queries: outputs, maximum and sum."""
    _, heads, dim = out.shape
    count = rows * heads * splits if splits > 1 else 0
    partial = torch.empty(count, dim, dtype=torch.float32, device=out.device)
    return partial, torch.empty(count, 2, dtype=torch.float32, device=out.device)


def combine_splits(
    partial: torch.Tensor, stats: torch.Tensor, out: torch.Tensor, splits: int,
    cu_seqlens_q: torch.Tensor, *, by_token: bool = False,
) -> None:  # fmt: skip
    """Merge `splits` spans into `out [T, H, D]`, kept by token or by sequence of one query."""
    tokens, heads, dim = out.shape
    # few splits share one compiled kernel
    block_d, block_s = max(16, next_power_of_2(dim)), max(16, next_power_of_2(splits))
    _combine_kernel[(tokens if by_token else len(cu_seqlens_q) - 1, heads)](
        partial, stats, out, cu_seqlens_q, splits, D=dim, BLOCK_D=block_d, BLOCK_S=block_s,
        BY_TOKEN=by_token, num_warps=max(4, block_s * block_d // 2048),
    )  # fmt: skip
