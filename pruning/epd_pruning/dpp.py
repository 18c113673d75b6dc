"""Greedy MAP of a determinantal point process, conditioned by relevance outside the recursion.

The kernel is K = diag(r)·S·diag(r). Its greedy log-det maximisation (Chen et al., "Fast greedy MAP
inference for DPP", 2018) factors: the Cholesky recursion needs S alone, r enters the argmax as r².
So S and its factors belong to the image, and only r to the question.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from epd_kernels import greedy_dpp as kernel

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
    fills come by relevance, then by index. A batch may be padded by zero rows of S with r = 0, as
    long as `num_kept` fits its smallest member.
    """
    if relevance is None:
        relevance = torch.ones(similarity.shape[:-1], device=similarity.device)
    if similarity.dim() == 3:
        return GreedyOrder(*kernel.greedy_dpp(similarity, relevance, num_kept, eps=eps))
    indices, gains = kernel.greedy_dpp(similarity[None], relevance[None], num_kept, eps=eps)
    return GreedyOrder(indices[0], gains[0])
