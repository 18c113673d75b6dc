"""Script's graph stage: how redundant a token is among the tokens it resembles."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor

from epd_kernels import graph_score as kernel
from epd_pruning.errors import PruningError

__all__ = ["GraphMode", "graph_score", "parse_tau"]

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


def graph_score(
    embeddings: Tensor,
    *,
    mode: GraphMode = "dense",
    tau: float | str = 0.2,
    min_degree: int = 4,
    gamma: float = 1.0,
) -> Tensor:
    """Redundancy [..., N] of `embeddings` [..., N, D]: d·exp(γ(μ − τ)) where cosines are ≥ τ.

    d is a token's degree, μ its mean edge weight; below `min_degree` edges the score is averaged
    with the mean cosine to all compared tokens. `dense` compares all pairs, self included;
    `bipartite` the even with the odd tokens only, a quarter of the work. A quantile τ is that of
    the compared pairs, rounded down by less than 0.001.
    """
    quantile, constant = parse_tau(tau)
    score = kernel.graph_score(
        embeddings if embeddings.dim() == 3 else embeddings[None],
        bipartite=mode == "bipartite",
        tau=constant,
        quantile=quantile,
        min_degree=min_degree,
        gamma=gamma,
    )
    return score.view(embeddings.shape[:-1])
