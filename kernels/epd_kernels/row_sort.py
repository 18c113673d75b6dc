"""Stable sorting of many short rows in one launch, by counting who comes first.

The place of element i of a row is the number of elements j with x_j before x_i, or equal to it and
j < i. That is N^2 comparisons, which a GPU makes faster than it starts a general sort, for the few
thousand scores that an image has.
"""

from __future__ import annotations

import math

import torch

from .launch import jit, tl

__all__ = ["MOST", "sort_rows", "sort_rows_ref"]

MOST = 4096  # beyond it a general sort is faster


def sort_rows(x: torch.Tensor, *, largest: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and int64 indices of the rows of `x [B, N]`, rising, or falling with `largest`.

    Ties keep their order; NaN counts as the infinity that comes last.
    """
    counting = x.is_cuda and x.shape[1] <= MOST
    return sort_rows_triton(x, largest=largest) if counting else sort_rows_ref(x, largest=largest)


def sort_rows_ref(x: torch.Tensor, *, largest: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """`sort_rows` in torch."""
    keys = x
    if x.is_floating_point():
        keys = torch.where(x.isnan(), -math.inf if largest else math.inf, x)
    order = keys.argsort(dim=1, descending=largest, stable=True)
    return x.gather(1, order), order


@jit
def _sort_kernel(
    x: tl.tensor, values: tl.tensor, indices: tl.tensor, num_tokens: tl.tensor,
    LARGEST: tl.constexpr, FLOATING: tl.constexpr, BLOCK: tl.constexpr, BLOCK_J: tl.constexpr,
) -> None:  # fmt: skip
    """BLOCK elements of one row per program, each written to its place."""
    i_b = tl.program_id(0).to(tl.int64)
    o_i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < num_tokens
    b_own = tl.load(x + i_b * num_tokens + o_i, m_i, 0)
    b_x = b_own
    if FLOATING:
        b_x = tl.where(b_x != b_x, float("-inf") if LARGEST else float("inf"), b_x)
    b_place = tl.zeros((BLOCK,), tl.int32)
    for i_j in range(0, num_tokens, BLOCK_J):
        o_j = i_j + tl.arange(0, BLOCK_J)
        m_j = o_j < num_tokens
        b_y = tl.load(x + i_b * num_tokens + o_j, m_j, 0)
        if FLOATING:
            b_y = tl.where(b_y != b_y, float("-inf") if LARGEST else float("inf"), b_y)
        b_first = b_y[:, None] > b_x[None, :] if LARGEST else b_y[:, None] < b_x[None, :]
        b_first |= (b_y[:, None] == b_x[None, :]) & (o_j[:, None] < o_i[None, :])
        b_place += tl.sum((b_first & m_j[:, None]).to(tl.int32), axis=0)
    tl.store(values + i_b * num_tokens + b_place, b_own, m_i)
    tl.store(indices + i_b * num_tokens + b_place, o_i.to(tl.int64), m_i)


def sort_rows_triton(
    x: torch.Tensor, *, largest: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sort_rows` on the device of `x`."""
    batch, size = x.shape
    values = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    indices = torch.empty(x.shape, dtype=torch.int64, device=x.device)
    if x.numel():
        x = x.contiguous()
        if x.data_ptr() % 16:
            x = x.clone()  # a row of a batch may begin anywhere, and would be compiled for apart
        _sort_kernel[(batch, math.ceil(size / 32))](
            x, values, indices, size, LARGEST=largest,
            FLOATING=x.is_floating_point(), BLOCK=32, BLOCK_J=128, num_warps=4,
        )  # fmt: skip
    return values, indices
