"""Greedy DPP against determinants computed from the definition."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor

from epd_pruning.dpp import greedy_dpp
from epd_pruning.selection import cosine_matrix


def features(seed: int, count: int = 20, width: int = 32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, width, generator=generator, dtype=torch.float64)
    return centres[torch.randint(5, (count,), generator=generator)] + 0.7 * noise


def relevance(seed: int, count: int = 20) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + seed)
    return 0.05 + 0.95 * torch.rand(count, generator=generator, dtype=torch.float64)


def greedy_by_determinant(kernel: Tensor, num_kept: int) -> list[int]:
    """The definition: at each step the candidate whose submatrix has the largest determinant."""
    chosen: list[int] = []
    for _ in range(num_kept):
        rest = [n for n in range(len(kernel)) if n not in chosen]
        dets = [torch.linalg.det(kernel[[*chosen, n]][:, [*chosen, n]]).item() for n in rest]
        chosen.append(rest[dets.index(max(dets))])
    return chosen


@pytest.mark.parametrize("seed", range(12))
def test_equals_greedy_by_determinant(seed: int) -> None:
    similarity, r = cosine_matrix(features(seed)), relevance(seed)
    expected = greedy_by_determinant(r[:, None] * similarity * r, 9)
    assert greedy_dpp(similarity, 9, relevance=r).indices.tolist() == expected
    assert greedy_dpp(similarity.float(), 9, relevance=r.float()).indices.tolist() == expected


@pytest.mark.parametrize("seed", range(6))
def test_relevance_free_form_equals_the_full_kernel(seed: int) -> None:
    similarity, r = cosine_matrix(features(seed, 60, 64)), relevance(seed, 60)
    free = greedy_dpp(similarity, 24, relevance=r)
    full = greedy_dpp(r[:, None] * similarity * r, 24, eps=1e-12)
    assert torch.equal(free.indices, full.indices)
    torch.testing.assert_close(free.gains, full.gains)


@pytest.mark.parametrize("seed", range(6))
def test_gains_are_ratios_of_determinants_and_never_rise(seed: int) -> None:
    similarity, r = cosine_matrix(features(seed)), relevance(seed)
    order = greedy_dpp(similarity, 10, relevance=r)
    kernel = r[:, None] * similarity * r
    dets = [torch.ones((), dtype=torch.float64)]
    for size in range(1, 11):
        rows = order.indices[:size]
        dets.append(torch.linalg.det(kernel[rows][:, rows]))
    ratios = torch.stack([after / before for before, after in pairwise(dets)])
    torch.testing.assert_close(order.gains, ratios)
    assert bool((order.gains.diff() <= 1e-12).all())


@pytest.mark.parametrize("seed", range(6))
def test_log_determinant_splits_into_similarity_and_relevance(seed: int) -> None:
    similarity, r = cosine_matrix(features(seed)), relevance(seed)
    order = greedy_dpp(similarity, 8, relevance=r)
    rows = order.indices
    parts = torch.linalg.slogdet(similarity[rows][:, rows])[1] + 2 * r[rows].log().sum()
    torch.testing.assert_close(order.gains.log().sum(), parts)


def test_greedy_is_at_most_the_optimum_and_sometimes_below_it() -> None:
    below = 0
    for seed in range(60):
        kernel = cosine_matrix(features(seed, 10, 6))
        rows = greedy_dpp(kernel, 4, eps=1e-9).indices
        best = max(
            torch.linalg.det(kernel[list(subset)][:, list(subset)]).item()
            for subset in combinations(range(10), 4)
        )
        found = torch.linalg.det(kernel[rows][:, rows]).item()
        assert found <= best + 1e-12
        below += found < best - 1e-9
    assert 0 < below < 60


def test_diagonal_kernel_is_top_k_by_relevance() -> None:
    r = torch.tensor([0.3, 0.9, 0.1, 0.9, 0.5])
    assert greedy_dpp(torch.eye(5), 4, relevance=r).indices.tolist() == [1, 3, 4, 0]


def test_ties_go_to_the_lowest_index() -> None:
    assert greedy_dpp(torch.eye(6), 4).indices.tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_duplicate_waits_for_every_other_token(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    distinct = torch.randn(12, 48, generator=generator, dtype=dtype)
    similarity = cosine_matrix(distinct.repeat_interleave(3, dim=0))
    # copies of one token are equally relevant; the least relevant token still beats any copy
    r = torch.linspace(1.0, 1e-3, 12, dtype=dtype).repeat_interleave(3)
    order = greedy_dpp(similarity, 20, relevance=r).indices
    assert sorted((order[:12] // 3).tolist()) == list(range(12))
    assert order[12:].tolist() == [1, 2, 4, 5, 7, 8, 10, 11]


def test_fills_by_relevance_then_index_once_the_rank_is_spent() -> None:
    similarity = torch.ones(5, 5)
    r = torch.tensor([0.2, 0.7, 0.9, 0.7, 0.2])
    order = greedy_dpp(similarity, 5, relevance=r)
    assert order.indices.tolist() == [2, 1, 3, 0, 4]
    assert order.gains[1:].tolist() == [0.0] * 4


def test_zero_relevance_is_never_chosen_before_residuals_run_out() -> None:
    r = torch.tensor([0.0, 1.0, 0.5])
    similarity = torch.eye(3)
    similarity[1, 2] = similarity[2, 1] = 1 - 1e-3
    assert greedy_dpp(similarity, 3, relevance=r).indices.tolist() == [1, 2, 0]


@pytest.mark.parametrize("seed", range(4))
def test_every_prefix_is_the_smaller_answer(seed: int) -> None:
    similarity, r = cosine_matrix(features(seed)), relevance(seed)
    whole = greedy_dpp(similarity, 20, relevance=r).indices
    assert sorted(whole.tolist()) == list(range(20))
    for size in (0, 1, 7, 15):
        assert torch.equal(greedy_dpp(similarity, size, relevance=r).indices, whole[:size])


def test_batch_neighbours_and_zero_padding_change_nothing() -> None:
    sizes = (20, 13, 17)
    similarity, r = torch.zeros(3, 20, 20), torch.zeros(3, 20)
    alone = []
    for row, size in enumerate(sizes):
        one, weight = cosine_matrix(features(row, size)).float(), relevance(row, size).float()
        similarity[row, :size, :size], r[row, :size] = one, weight
        alone.append(greedy_dpp(one, 13, relevance=weight).indices)
    assert torch.equal(greedy_dpp(similarity, 13, relevance=r).indices, torch.stack(alone))


def test_half_precision_similarity_is_computed_in_fp32() -> None:
    similarity = cosine_matrix(features(2, 40, 64)).half()
    order = greedy_dpp(similarity, 12)
    assert order.gains.dtype == torch.float32
    assert torch.equal(order.indices, greedy_dpp(similarity.float(), 12).indices)
