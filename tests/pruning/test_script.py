"""Script: the two stages, how they meet, and what each mode may not do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from epd_pruning.base import VisionInputs
from epd_pruning.cdpruner import CDPruner, Diverse
from epd_pruning.dpp import greedy_dpp
from epd_pruning.errors import PruningError
from epd_pruning.graph import graph_score
from epd_pruning.script import Script, intersection_first, pool_first
from epd_pruning.selection import cosine_matrix, stable_top_k


def image(seed: int, count: int = 64, width: int = 48) -> VisionInputs:
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, width, generator=generator)
    labels = torch.randint(6, (count,), generator=generator)
    noise = torch.randn(count, width, generator=generator)
    return VisionInputs(
        embeddings=centres[labels] + 0.5 * noise,
        aligned=torch.randn(count, 12, generator=generator),
        query=torch.randn(1, 12, generator=generator),
    )


@pytest.mark.parametrize("seed", range(30))
def test_the_released_combination_is_the_plain_dpp(seed: int) -> None:
    inputs = image(seed)
    released = Script(combine="released", relevance_form="floor").prune(inputs, 12)
    assert torch.equal(released, CDPruner().prune(inputs, 12))


def test_the_cascade_is_not() -> None:
    different = 0
    for seed in range(10):
        inputs = image(seed)
        cascade = Script(pool_floor=0.0).prune(inputs, 12)
        different += not torch.equal(cascade, CDPruner().prune(inputs, 12))
    assert different == 10


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_cascade_is_a_dpp_inside_the_graph_pool(seed: int, power: int) -> None:
    inputs = image(seed)
    pruner = Script(tau=0.3, pool_factor=2.5, pool_floor=0.0, similarity_power=power)
    score = graph_score(inputs.embeddings, tau=0.3)
    pool = stable_top_k(score, 20, largest=False).sort().values
    r = pruner.relevance(inputs.take(pool))
    similarity = cosine_matrix(inputs.embeddings[pool]) ** power
    assert torch.linalg.eigvalsh(similarity.double()).min() > -1e-6
    chosen = greedy_dpp(similarity, 8, relevance=r).indices
    assert torch.equal(pruner.prune(inputs, 8), pool[chosen].sort().values)
    assert torch.equal(pruner.prepare(inputs, 8).indices, pool)


@pytest.mark.parametrize(
    ("factor", "floor", "num_kept", "expected"),
    [(2.0, 0.0, 64, 128), (2.0, 0.25, 64, 144), (2.5, 0.0, 3, 8), (2.0, 0.0, 400, 576)],
)
def test_pool_size(factor: float, floor: float, num_kept: int, expected: int) -> None:
    assert Script(pool_factor=factor, pool_floor=floor).pool_size(576, num_kept) == expected
    assert Script(combine="intersect_fill").pool_size(576, num_kept) == 576


def test_one_cached_pool_answers_every_smaller_budget_and_every_question_as_a_cold_run() -> None:
    pruner, inputs = Script(pool_floor=0.0), image(3)
    pool = pruner.prepare(inputs, 24)
    for seed, num_kept in ((0, 24), (1, 6), (2, 24), (0, 17), (1, 1)):
        query = image(seed).query
        cold = pruner.prune(replace(inputs, query=query), num_kept)
        assert torch.equal(pruner.select(pool, num_kept, query=query), cold)


def test_the_question_matters_but_not_to_the_pool() -> None:
    pruner, inputs = Script(), image(5)
    assert inputs.query is not None
    other = replace(inputs, query=-inputs.query)
    assert torch.equal(pruner.prepare(inputs, 8).indices, pruner.prepare(other, 8).indices)
    assert not torch.equal(pruner.prune(inputs, 8), pruner.prune(other, 8))


def test_without_a_question_and_with_the_whole_image_as_pool_it_is_the_blind_dpp() -> None:
    inputs = replace(image(6), query=None)
    blind = Diverse().prune(inputs, 9)
    assert torch.equal(Script(pool_floor=1.0, similarity_power=1).prune(inputs, 9), blind)
    assert torch.equal(CDPruner().prune(inputs, 9), blind)


def test_intersect_fill_on_sets() -> None:
    r = torch.ones(10)
    order = torch.tensor([7, 2, 9, 4])
    assert pool_first(order, torch.tensor([9, 4, 0]), r).tolist() == [9, 4, 7, 2]
    assert pool_first(order, torch.tensor([0, 1]), r).tolist() == [7, 2, 9, 4]


def test_parity_modes_on_sets() -> None:
    r = torch.tensor([0.9, 0.1, 0.5, 0.7, 0.3, 0.2])
    graph, chosen = torch.tensor([1, 4, 2]), torch.tensor([5, 2, 3])
    top = stable_top_k(r, 3)
    # both hold 2; relevance fills with 0 and 3, the DPP with 3 and 5
    assert intersection_first(graph, chosen, top, r)[:3].tolist() == [2, 0, 3]
    assert intersection_first(graph, chosen, chosen, r)[:3].tolist() == [2, 3, 5]
    disjoint = torch.tensor([0, 1, 4])
    assert intersection_first(disjoint, chosen, top, r)[:3].tolist() == [0, 3, 2]
    assert intersection_first(disjoint, chosen, chosen, r)[:3].tolist() == [3, 2, 5]


@pytest.mark.parametrize("seed", range(6))
def test_modes_on_an_image_follow_their_set_definitions(seed: int) -> None:
    inputs, num_kept = image(seed), 10
    r = Script().relevance(inputs)
    greedy = greedy_dpp(cosine_matrix(inputs.embeddings), 20, relevance=r).indices.tolist()
    score = graph_score(inputs.embeddings, tau="quantile:0.9")
    ranked = stable_top_k(score, 64, largest=False).tolist()
    by_relevance = stable_top_k(r, 64).tolist()

    pool = set(ranked[:30])
    expected = [n for n in greedy if n in pool] + [n for n in greedy if n not in pool]
    pruner = Script(combine="intersect_fill", pool_factor=3.0)
    assert pruner.prune(inputs, num_kept).tolist() == sorted(expected[:num_kept])

    both = set(ranked[:num_kept]) & set(greedy[:num_kept])
    fill = [n for n in by_relevance[:num_kept] if n not in both]
    expected = sorted([*both, *fill[: num_kept - len(both)]])
    assert Script(combine="plot_parity").prune(inputs, num_kept).tolist() == expected


def test_keeping_the_redundant_end_changes_the_pool() -> None:
    inputs = image(8)
    low = set(Script(pool_floor=0.0).prepare(inputs, 8).indices.tolist())
    high = set(Script(graph_keep="high", pool_floor=0.0).prepare(inputs, 8).indices.tolist())
    assert not low & high


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pool_factor", 0.5),
        ("pool_floor", 1.5),
        ("similarity_power", 0),
        ("min_degree", -1),
        ("gamma", float("inf")),
        ("tau", "quantile:2"),
        ("relevance_weight", -0.1),
    ],
)
def test_hyper_parameters_out_of_range_are_named(field: str, value: object) -> None:
    with pytest.raises(PruningError) as caught:
        Script(**{field: value})  # type: ignore[arg-type]
    assert caught.value.field == field
