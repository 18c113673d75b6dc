"""Script's graph stage: how redundant a token is among the tokens it resembles."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from epd_pruning.errors import PruningError
from epd_pruning.selection import unit_rows

__all__ = ["GraphMode", "graph_score", "parse_tau", "redundancy"]

GraphMode = Literal["dense", "bipartite"]


def parse_tau(tau: float | str) -> tuple[float | None, float]:
    """(quantile or None, constant) of an edge threshold: a number, or "quantile:q", q in (0, 1)."""
    if not isinstance(tau, str):
        if not math.isfinite(tau):
            raise PruningError("tau", "finite", tau)
        return None, float(tau)
    kind, _, told = tau.partition(":")
    try:
        quantile = float(told)
    except ValueError:
        quantile = math.nan
    if kind != "quantile" or not 0.0 < quantile < 1.0:
        raise PruningError("tau", 'a number or "quantile:q" with q in (0, 1)', tau)
    return quantile, 0.0


def redundancy(similarity: Tensor, tau: Tensor | float, min_degree: int, gamma: float) -> Tensor:
    """Redundancy [A] of the rows of `similarity` [A, B] in the graph of its edges ≥ τ.

    R = d·exp(γ(μ − τ)) with degree d and mean edge weight μ; below `min_degree` edges the mean of
    R and the row's background similarity.
    """
    edges = similarity >= tau
    degree = edges.sum(1)
    mean_edge = (similarity * edges).sum(1) / degree.clamp_min(1)
    score = degree * torch.exp(gamma * (mean_edge - tau))
    background = similarity.sum(1) / max(similarity.shape[1], 1)
    return torch.where(degree >= min_degree, score, 0.5 * score + 0.5 * background)


def graph_score(
    embeddings: Tensor,
    *,
    mode: GraphMode = "dense",
    tau: float | str = 0.2,
    min_degree: int = 4,
    gamma: float = 1.0,
) -> Tensor:
    """Redundancy [N] of `embeddings` [N, D] by cosine similarity, in fp32.

    `dense` compares all pairs, self included. `bipartite` compares the even with the odd tokens
    only, a quarter of the work: even ones are scored by the rows of the block, odd ones by its
    columns; the last of an odd number is even. A quantile τ is taken over the compared pairs.
    """
    rows = unit_rows(embeddings)
    left, right = (rows, rows) if mode == "dense" else (rows[0::2], rows[1::2])
    similarity = left @ right.mT
    threshold = _threshold(similarity, tau)
    score = redundancy(similarity, threshold, min_degree, gamma)
    if mode == "dense":
        return score
    joined = score.new_empty(rows.shape[0])
    joined[0::2] = score
    joined[1::2] = redundancy(similarity.mT, threshold, min_degree, gamma)
    return joined


def _threshold(similarity: Tensor, tau: float | str) -> Tensor | float:
    quantile, constant = parse_tau(tau)
    if quantile is None or similarity.numel() == 0:
        return constant
    place = max(1, math.ceil(quantile * similarity.numel()))
    return similarity.flatten().kthvalue(place).values
