"""The graph stage by hand and against loops over its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from epd_pruning.errors import PruningError
from epd_pruning.graph import graph_score, parse_tau
from epd_pruning.selection import cosine_matrix, stable_top_k


def tokens(seed: int, count: int = 33, width: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) + 0.4


def score_by_loop(row: list[float], tau: float, min_degree: int, gamma: float) -> float:
    edges = [value for value in row if value >= tau]
    mean = sum(edges) / len(edges) if edges else 0.0
    connected = len(edges) * math.exp(gamma * (mean - tau))
    if len(edges) >= min_degree:
        return connected
    return 0.5 * connected + 0.5 * sum(row) / len(row)


@pytest.mark.parametrize("tau", [-1.0, 0.1, 0.3, 0.6, 2.0])
def test_dense_equals_the_definition(tau: float) -> None:
    x = tokens(0)
    similarity = cosine_matrix(x).tolist()
    expected = torch.tensor([score_by_loop(row, tau, 5, 1.5) for row in similarity])
    found = graph_score(x, tau=tau, min_degree=5, gamma=1.5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [32, 33])
def test_bipartite_scores_both_sides_from_one_block(count: int) -> None:
    x = tokens(1, count)
    block = cosine_matrix(x[0::2], x[1::2])
    expected = torch.empty(count)
    expected[0::2] = torch.tensor([score_by_loop(row, 0.2, 4, 1.0) for row in block.tolist()])
    expected[1::2] = torch.tensor([score_by_loop(row, 0.2, 4, 1.0) for row in block.mT.tolist()])
    torch.testing.assert_close(graph_score(x, mode="bipartite"), expected, rtol=1e-5, atol=1e-5)


def test_orthonormal_tokens_have_only_their_own_edge() -> None:
    score = graph_score(torch.eye(8), tau=0.2, min_degree=4, gamma=1.0)
    torch.testing.assert_close(score, torch.full((8,), 0.5 * math.exp(0.8) + 0.5 / 8))


def test_low_keeps_the_outlier_of_two_clusters_and_high_drops_it() -> None:
    x = torch.zeros(11, 3)
    x[0:5, 0], x[5, 2], x[6:11, 1] = 1.0, 1.0, 1.0
    score = graph_score(x)
    assert stable_top_k(score, 1, largest=False).tolist() == [5]
    assert 5 not in stable_top_k(score, 10).tolist()


def test_a_threshold_above_one_leaves_the_background_only() -> None:
    x = tokens(2)
    torch.testing.assert_close(graph_score(x, tau=1.5), 0.5 * cosine_matrix(x).mean(1))


@pytest.mark.parametrize("quantile", [0.05, 0.5, 0.9, 0.99])
def test_quantile_threshold_is_a_constant_just_below_that_share(quantile: float) -> None:
    x = tokens(3)
    pairs = cosine_matrix(x).flatten().sort().values
    exact = pairs[max(1, math.ceil(quantile * pairs.shape[0])) - 1].item()
    cell = min(math.floor((exact + 1) * 1024), 2047)
    constant = graph_score(x, tau=cell / 1024 - 1)
    assert torch.equal(graph_score(x, tau=f"quantile:{quantile}"), constant)


def test_dense_follows_a_permutation_and_bipartite_does_not() -> None:
    x, order = tokens(4, 40), torch.randperm(40, generator=torch.Generator().manual_seed(0))
    for mode, follows in (("dense", True), ("bipartite", False)):
        moved = graph_score(x[order], mode=mode)  # type: ignore[arg-type]
        still = graph_score(x, mode=mode)[order]  # type: ignore[arg-type]
        assert torch.allclose(moved, still, rtol=1e-4) is follows


def test_scaling_tokens_changes_nothing() -> None:
    x = tokens(5)
    torch.testing.assert_close(graph_score(x * 512), graph_score(x))


@pytest.mark.parametrize("tau", ["quantile:1.0", "quantile:0", "quantile:x", "0.2", "", math.nan])
def test_a_malformed_threshold_is_named(tau: float | str) -> None:
    with pytest.raises(PruningError) as caught:
        parse_tau(tau)
    assert caught.value.field == "tau"
