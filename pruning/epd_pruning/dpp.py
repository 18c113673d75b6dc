"""Greedy MAP of a determinantal point process, conditioned by relevance outside the recursion.

The kernel is K = diag(r)·S·diag(r). Its greedy log-det maximisation (Chen et al., "Fast greedy MAP
inference for DPP", 2018) factors: the Cholesky recursion needs S alone, r enters the argmax as r².
So S and its factors belong to the image, and only r to the question.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from epd_pruning.selection import at_least_fp32

__all__ = ["RESIDUAL_EPS", "GreedyOrder", "greedy_dpp"]

# a unit row explained by its predecessors leaves rounding of this size behind in fp32
RESIDUAL_EPS = 1e-5


@dataclass(frozen=True, slots=True)
class GreedyOrder:
    """`indices` [..., k] int64 in order of choice: any prefix is the answer to a smaller budget.

    `gains` [..., k] is the factor r²·u by which each choice multiplied det K; 0 where filled.
    """

    indices: Tensor
    gains: Tensor


def greedy_dpp(
    similarity: Tensor,
    num_kept: int,
    *,
    relevance: Tensor | None = None,
    eps: float = RESIDUAL_EPS,
) -> GreedyOrder:
    """The greedy order of `num_kept` tokens under K = diag(r)·S·diag(r); ties to the lowest index.

    `similarity` S [N, N] or [B, N, N], positive semi-definite; `relevance` r ≥ 0, [N] or [B, N],
    ones by default. u_n, the variance of n left by the chosen, starts at S_nn; each step takes
    argmax r_n²·u_n. A token with u ≤ eps, or with r = 0, is only a fill: once no other is left,
    fills come by relevance, then by index. The loop holds no data-dependent branch. A batch may be
    padded by zero rows of S with r = 0, as long as `num_kept` fits its smallest member.
    """
    kernel = at_least_fp32(similarity)
    if kernel.dim() == 2:
        one = greedy_dpp(
            kernel[None],
            num_kept,
            relevance=None if relevance is None else relevance[None],
            eps=eps,
        )
        return GreedyOrder(one.indices[0], one.gains[0])
    batch, size, _ = kernel.shape
    weight = kernel.new_ones(batch, size) if relevance is None else relevance.to(kernel.dtype)
    fill = _fill_score(weight)
    residual = kernel.diagonal(dim1=-2, dim2=-1).clone()
    factors = kernel.new_empty(batch, num_kept, size)
    taken = torch.zeros(batch, size, dtype=torch.bool, device=kernel.device)
    indices, gains = [], []
    for step in range(num_kept):
        gain = weight * weight * residual
        usable = (residual > eps) & (gain > 0)
        score = torch.where(usable, gain, fill).masked_fill(taken, -math.inf)
        chosen = score.argmax(-1, keepdim=True)
        taken.scatter_(1, chosen, True)
        earlier = factors[:, :step]
        column = earlier.gather(2, chosen[:, None].expand(-1, step, 1))
        row = kernel.gather(1, chosen[:, :, None].expand(-1, 1, size))
        row = (row - column.mT @ earlier)[:, 0] * residual.gather(1, chosen).clamp_min(eps).rsqrt()
        row = row * usable.gather(1, chosen)
        factors[:, step] = row
        residual = (residual - row * row).clamp_min(0)
        indices.append(chosen)
        gains.append(torch.where(usable, gain, 0).gather(1, chosen))
    if not indices:
        return GreedyOrder(taken.new_empty(batch, 0, dtype=torch.int64), kernel.new_empty(batch, 0))
    return GreedyOrder(torch.cat(indices, 1), torch.cat(gains, 1))


def _fill_score(weight: Tensor) -> Tensor:
    """Negative scores [B, N] that order fills by falling relevance, then by rising index."""
    rank = weight.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return -1 - rank.to(weight.dtype)
