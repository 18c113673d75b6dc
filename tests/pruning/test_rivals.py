"""The other methods against plain loops over their definitions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from epd_pruning.base import VisionInputs
from epd_pruning.cdpruner import CDPruner
from epd_pruning.dart import Dart, least_duplicated
from epd_pruning.divprune import DivPrune, farthest_points
from epd_pruning.errors import PruningError
from epd_pruning.selection import cosine_matrix
from epd_pruning.visionzip import VisionZip
from epd_pruning.vispruner import VisPruner


def rows(seed: int, count: int = 30, width: int = 24) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", range(5))
def test_divprune_follows_the_farthest_point_recursion(seed: int) -> None:
    x = rows(seed)
    distance = 1 - cosine_matrix(x)
    order = DivPrune().rank_image(VisionInputs(embeddings=x), 12).tolist()
    loneliest = [min(distance[n, m].item() for m in range(30) if m != n) for n in range(30)]
    assert order[0] == loneliest.index(max(loneliest))
    reach = []
    for size in range(1, 12):
        nearest = {
            n: min(distance[n, m].item() for m in order[:size])
            for n in range(30)
            if n not in order[:size]
        }
        assert order[size] == max(nearest, key=lambda n: (nearest[n], -n))
        reach.append(nearest[order[size]])
    assert reach == sorted(reach, reverse=True)


def test_divprune_ties_go_to_the_lowest_index() -> None:
    assert farthest_points(1 - torch.eye(6), 4).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("seed", range(5))
def test_cdpruner_maximises_the_determinant_step_by_step(seed: int) -> None:
    x, aligned, query = rows(seed).double(), rows(seed + 50, width=8), rows(seed + 90, 1, 8)
    cosine = torch.cosine_similarity(aligned, query)
    r = (cosine - cosine.min()) / (cosine.max() - cosine.min())
    r = r.clamp_min(1e-3).double()
    kernel = r[:, None] * cosine_matrix(x) * r
    chosen: list[int] = []
    for _ in range(8):
        rest = [n for n in range(30) if n not in chosen]
        dets = [torch.linalg.det(kernel[[*chosen, n]][:, [*chosen, n]]).item() for n in rest]
        chosen.append(rest[dets.index(max(dets))])
    inputs = VisionInputs(embeddings=x, aligned=aligned, query=query)
    assert CDPruner(relevance_sign=1).prune(inputs, 8).tolist() == sorted(chosen)


def test_visionzip_by_hand() -> None:
    attention = torch.tensor([0.1, 0.9, 0.2, 0.8, 0.3, 0.1, 0.7, 0.2, 0.1, 0.2])
    inputs = VisionInputs(embeddings=rows(0, 10), cls_attention=attention)
    # two contextual of five: the rest 0 2 4 5 7 8 9 at steps of three
    assert VisionZip(contextual_share=0.4).rank_image(inputs, 5).tolist() == [1, 3, 6, 0, 5]
    assert VisionZip(contextual_share=0.0).prune(inputs, 4).tolist() == [1, 3, 4, 6]


@pytest.mark.parametrize(("num_kept", "contextual"), [(64, 10), (128, 20), (192, 30)])
def test_visionzip_splits_the_budget_as_published(num_kept: int, contextual: int) -> None:
    attention = torch.linspace(1, 0, 576)
    inputs = VisionInputs(embeddings=torch.zeros(576, 1), cls_attention=attention)
    order = VisionZip().rank_image(inputs, num_kept)
    dominant = num_kept - contextual
    assert order[:dominant].tolist() == list(range(dominant))
    step = (576 - dominant) // contextual
    assert order[dominant:].tolist() == [dominant + step * n for n in range(contextual)]


def test_visionzip_merges_the_dropped_into_the_contextual_token_of_the_nearest_key() -> None:
    attention = torch.tensor([9.0, 1, 1, 1, 1, 1, 1])
    keys = torch.tensor([[1.0, 1], [1, 0], [1, 0.1], [0.2, 1], [0, 1], [0.1, 1], [1, 0.2]])
    x = torch.arange(7.0)[:, None]
    inputs = VisionInputs(embeddings=x, cls_attention=attention, encoder_keys=keys)
    pool = VisionZip(contextual_share=2 / 3, merging=True).prepare(inputs, 3)
    assert pool.indices.tolist() == [0, 1, 4]
    # 2 and 6 belong to 1, 3 and 5 to 4
    assert pool.inputs.embeddings[:, 0].tolist() == [0.0, 1 + 4, 4 + 4]
    assert x.flatten().tolist() == list(range(7))
    kept = VisionZip(contextual_share=2 / 3).prepare(inputs, 3)
    assert kept.inputs.embeddings[:, 0].tolist() == [0.0, 1.0, 4.0]


def thin_by_loop(similarity: Tensor, rest: list[int], count: int) -> list[int]:
    while (surplus := len(rest) - count) > 0:
        even, odd = rest[0::2], rest[1::2]
        likeness = {n: max(similarity[n, m].item() for m in odd) for n in even}
        order = sorted(even, key=lambda n: (-likeness[n], n))
        leaving = set(order[: min(8, surplus)])
        rest = [n for n in rest if n not in leaving]
    return rest


@pytest.mark.parametrize("num_kept", [5, 12, 20, 39])
def test_vispruner_removes_duplicates_of_even_places(num_kept: int) -> None:
    attention, states = torch.rand(40, generator=torch.Generator().manual_seed(1)), rows(2, 40)
    inputs = VisionInputs(embeddings=rows(3, 40), cls_attention=attention, encoder_states=states)
    ranked = sorted(range(40), key=lambda n: -attention[n].item())
    important = num_kept // 2
    rest = sorted(ranked[important:])
    diverse = thin_by_loop(cosine_matrix(states), rest, num_kept - important)
    expected = sorted(ranked[:important] + diverse)
    assert VisPruner().prune(inputs, num_kept).tolist() == expected


def test_dart_takes_what_each_pivot_resembles_least() -> None:
    x = rows(4)
    similarity, norms = cosine_matrix(x), x.abs().sum(1)
    pivots = sorted(range(30), key=lambda n: -norms[n].item())[:3]
    taken = list(pivots)
    for pivot, share in zip(pivots, (4, 3, 3), strict=True):
        rest = [n for n in range(30) if n not in taken]
        rest.sort(key=lambda n, pivot=pivot: similarity[pivot, n].item())  # type: ignore[misc]
        taken += rest[:share]
    order = Dart(num_pivots=3).rank_image(VisionInputs(embeddings=x), 13)
    assert order.tolist() == taken


def test_dart_pivots_take_at_most_half_of_the_budget() -> None:
    order = least_duplicated(torch.eye(9), torch.arange(9.0), 6, 10)
    assert order[:3].tolist() == [8, 7, 6] and order.unique().shape == (6,)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Dart(num_pivots=0),
        lambda: VisionZip(contextual_share=2),
        lambda: VisPruner(important_share=-1),
    ],
)
def test_hyper_parameters_out_of_range_are_refused(build: object) -> None:
    with pytest.raises(PruningError):
        build()  # type: ignore[operator]
