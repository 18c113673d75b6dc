"""Greedy MAP of determinantal point processes with kernel diag(r) S diag(r), a batch at a time.

The incremental Cholesky of Chen et al. (Fast greedy MAP inference for DPP, 2018) runs on S alone; r
enters the argmax only. With u the residual variances (first diag(S)) and c_t the rows found so far,

    j = argmax r_n^2 u_n        c_t = (S_j - sum_s c_s[j] c_s) / sqrt(u_j)        u -= c_t^2

A token with u <= eps or r = 0 is a fill: taken once no other is left, by falling r, then by rising
index. Ties go to the lowest index. One program owns one process: u stays in registers, the rows c
go through L1 and L2, and no step returns to the host.
"""

from __future__ import annotations

import math

import torch

from .launch import INTERPRETED, jit, next_power_of_2, tl

__all__ = ["LEAST", "greedy_dpp", "greedy_dpp_ref"]

LEAST = 128  # tokens that a program has room for: one kernel for all images below


def greedy_dpp(
    similarity: torch.Tensor, relevance: torch.Tensor, num_kept: int, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`indices` int64 `[B, K]` in order of choice; `gains` `[B, K]`, r^2 u of each, 0 if filled.

    `similarity` `[B, N, N]` positive semi-definite in any float type, `relevance` `[B, N]` >= 0; K
    is `num_kept` <= N. Rows of zeros with r = 0 are padding, as long as K fits the smallest member.
    """
    run = greedy_dpp_triton if similarity.is_cuda else greedy_dpp_ref
    return run(similarity, relevance, num_kept, eps=eps)


def greedy_dpp_ref(
    similarity: torch.Tensor, relevance: torch.Tensor, num_kept: int, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`greedy_dpp` in torch, fp32 or, for fp64 input, fp64; no step waits for a value."""
    kernel = similarity.to(torch.promote_types(similarity.dtype, torch.float32))
    r = relevance.to(kernel.dtype)
    batch, size, _ = kernel.shape
    residual = kernel.diagonal(dim1=-2, dim2=-1).clone()
    rank = r.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    fill = -1 - rank.to(r.dtype)
    taken = torch.zeros_like(r, dtype=torch.bool)
    factors = kernel.new_empty(batch, num_kept, size)
    indices = torch.empty(batch, num_kept, dtype=torch.int64, device=r.device)
    gains = kernel.new_empty(batch, num_kept)
    for step in range(num_kept):
        gain = torch.where(residual > eps, r * r * residual, 0.0)
        score = torch.where(gain > 0, gain, fill).masked_fill(taken, -math.inf)
        j = score.argmax(-1, keepdim=True)
        earlier = factors[:, :step]
        column = earlier.gather(2, j[:, None].expand(-1, step, 1))
        row = kernel.gather(1, j[:, :, None].expand(-1, 1, size))
        row = (row - column.mT @ earlier)[:, 0] * residual.gather(1, j).clamp_min(eps).rsqrt()
        indices[:, step], gains[:, step] = j[:, 0], gain.gather(1, j)[:, 0]
        factors[:, step] = torch.where(gains[:, step, None] > 0, row, 0.0)
        residual = (residual - factors[:, step].square()).clamp_min(0)
        taken.scatter_(1, j, True)
    return indices, gains


@jit
def _greedy_dpp_kernel(
    similarity: tl.tensor, relevance: tl.tensor, factors: tl.tensor, indices: tl.tensor,
    gains: tl.tensor, num_tokens: tl.tensor, num_kept: tl.tensor, stride: tl.tensor,
    eps: tl.tensor, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr,
) -> None:  # fmt: skip
    """One process per program; rows of S and of c are `stride` apart, all else is contiguous.

    What stands in a row behind its tokens is read with them, and decides nothing.
    """
    i_b = tl.program_id(0).to(tl.int64)
    similarity += i_b * num_tokens * stride
    factors += i_b * num_kept * stride
    relevance += i_b * num_tokens
    o_n, o_t = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_T)
    m_n, m_row = o_n < num_tokens, o_n < stride
    b_r = tl.load(relevance + o_n, mask=m_n, other=0.0).to(tl.float32)
    b_u = tl.load(similarity + o_n.to(tl.int64) * (stride + 1), mask=m_n, other=0.0).to(tl.float32)
    # order-preserving integers: fills by relevance, all below zero; whoever is taken, lowest
    b_fill = b_r.to(tl.int32, bitcast=True) - 0x7FFFFFFF
    b_fill = tl.where(m_n, b_fill, -0x80000000)
    for i_t in range(0, num_kept):
        b_gain = tl.where((b_fill != -0x80000000) & (b_u > eps), b_r * b_r * b_u, 0.0)
        b_key = tl.where(b_gain > 0, b_gain.to(tl.int32, bitcast=True), b_fill)
        best, i_j = tl.max(b_key, axis=0, return_indices=True, return_indices_tie_break_left=True)
        gain = tl.maximum(best, 0).to(tl.float32, bitcast=True)
        p_row = similarity + i_j.to(tl.int64) * stride + o_n
        b_row = tl.load(p_row, mask=m_row, other=0.0).to(tl.float32)
        chosen_r = tl.load(relevance + i_j).to(tl.float32)
        b_explained = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
        for i_s in range(0, i_t, BLOCK_T):
            m_s = i_s + o_t < i_t
            o_s = (i_s + o_t) * stride
            b_column = tl.load(factors + o_s + i_j, mask=m_s, other=0.0)
            m_c = m_s[:, None] & m_row[None, :]
            b_c = tl.load(factors + o_s[:, None] + o_n[None, :], mask=m_c, other=0.0)
            b_explained += b_column[:, None] * b_c
        b_row -= tl.sum(b_explained, axis=0)
        # the residual variance of the chosen one is its gain over r^2
        pivot = tl.maximum(gain / tl.maximum(chosen_r * chosen_r, 1e-30), eps)
        b_row = tl.where(gain > 0, b_row * tl.rsqrt(pivot), 0.0)
        tl.store(factors + i_t * stride + o_n, b_row, mask=m_row)
        tl.store(indices + i_b * num_kept + i_t, i_j.to(tl.int64))
        tl.store(gains + i_b * num_kept + i_t, gain)
        b_u = tl.maximum(b_u - b_row * b_row, 0.0)
        b_fill = tl.where(o_n == i_j, -0x80000000, b_fill)
        # the next step reads rows that other threads of this program have written
        tl.debug_barrier()


def greedy_dpp_triton(
    similarity: torch.Tensor, relevance: torch.Tensor, num_kept: int, *, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`greedy_dpp` on the device of `similarity`, in fp32."""
    batch, size, _ = similarity.shape
    assert num_kept <= size and relevance.shape == (batch, size)
    device = similarity.device
    indices = torch.empty(batch, num_kept, dtype=torch.int64, device=device)
    gains = torch.empty(batch, num_kept, dtype=torch.float32, device=device)
    if not indices.numel():
        return indices, gains
    if similarity.stride() != (size * similarity.stride(1), similarity.stride(1), 1):
        similarity = similarity.contiguous()
    stride = similarity.stride(1)
    factors = torch.empty(batch, num_kept, stride, dtype=torch.float32, device=device)
    block_n, block_t, warps = dpp_config(size)
    _greedy_dpp_kernel[(batch,)](
        similarity, relevance.contiguous(), factors, indices, gains, size, num_kept, stride, eps,
        BLOCK_N=block_n, BLOCK_T=block_t, num_warps=warps,
    )  # fmt: skip
    return indices, gains


def dpp_config(size: int) -> tuple[int, int, int]:
    """Tokens that a program holds, rows c it reads at a time, and its warps, for `size` tokens."""
    block = max(next_power_of_2(size), LEAST)
    if INTERPRETED:
        return block, 4, 4
    rows = 16 if block <= 512 else 8 if block <= 2048 else 4
    # a warp reads 128 elements of a row at once; with more warps sums would cross them
    return block, rows, min(block // 128, 16)
