"""Relevance: forms, sign, segments and the degenerate cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from epd_pruning.base import VisionInputs
from epd_pruning.cdpruner import CDPruner
from epd_pruning.errors import PruningError
from epd_pruning.relevance import FLOOR, RelevanceOnly, raw_relevance, shape_relevance


def rows(seed: int, count: int = 10, width: int = 6) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def test_raw_relevance_is_the_mean_cosine_or_the_mean_dot_product() -> None:
    tokens, query = rows(0), rows(1, 3)
    cosines = torch.cosine_similarity(tokens[:, None], query[None], dim=-1).mean(1)
    torch.testing.assert_close(raw_relevance(tokens, query, best_segments=False), cosines)
    dots = raw_relevance(tokens, query, normalise=False, best_segments=False)
    torch.testing.assert_close(dots, (tokens @ query.mT).mean(1))


def test_the_better_half_of_the_segments_counts() -> None:
    tokens = torch.tensor([[1.0, 0.0], [1.0, 0.1]])
    near, far = torch.tensor([2.0, 0.1]), torch.tensor([-1.0, 0.0])
    for query in (torch.stack([near, far]), torch.stack([far, near, far])):
        only_near = raw_relevance(tokens, near[None])
        torch.testing.assert_close(raw_relevance(tokens, query), only_near)


def test_forms_by_hand() -> None:
    raw = torch.tensor([1.0, 3.0, 2.0])
    assert shape_relevance(raw, "floor").tolist() == pytest.approx([FLOOR, 1.0, 0.5])
    assert shape_relevance(raw, "raw").tolist() == [0.0, 1.0, 0.5]
    assert shape_relevance(raw, "offset").tolist() == pytest.approx([5e-7, 1.0, 0.5], rel=1e-5)
    # θ = 0.8 gives α = 2; only ratios of r matter
    r = shape_relevance(raw, "exp", 0.8)
    assert (r / r[0]).tolist() == pytest.approx([1.0, math.exp(2), math.exp(1)])
    assert shape_relevance(raw, "exp", 0.0).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("form", ["floor", "exp", "raw", "offset"])
def test_equal_or_broken_scores_mean_no_preference(form: str) -> None:
    for raw in (torch.full((4,), 0.3), torch.zeros(4), torch.tensor([0.1, math.nan, 0.2, 0.3])):
        assert shape_relevance(raw, form).tolist() == [1.0] * 4  # type: ignore[arg-type]


def test_min_max_forgets_scale_and_offset() -> None:
    raw = rows(2)[:, 0]
    for form in ("floor", "exp", "raw"):
        moved = shape_relevance(7 * raw - 4, form)  # type: ignore[arg-type]
        torch.testing.assert_close(moved, shape_relevance(raw, form), rtol=1e-4, atol=1e-5)  # type: ignore[arg-type]


def test_flipping_the_sign_reverses_the_order() -> None:
    inputs = VisionInputs(embeddings=rows(3), aligned=rows(4), query=rows(5, 1))
    up = RelevanceOnly(relevance_sign=1).rank_query(inputs, 10)
    down = RelevanceOnly(relevance_sign=-1).rank_query(inputs, 10)
    assert torch.equal(up, down.flip(0))


def test_the_default_sign_follows_the_query_encoder() -> None:
    clip = VisionInputs(embeddings=rows(3), aligned=rows(4), query=rows(5, 1))
    assert torch.equal(
        RelevanceOnly().relevance(clip), RelevanceOnly(relevance_sign=-1).relevance(clip)
    )
    pruner = RelevanceOnly(query_encoder="llm_embed_mean")
    direct = shape_relevance(raw_relevance(clip.embeddings, rows(5, 1)), "floor")
    assert torch.equal(pruner.relevance(clip), direct)
    assert pruner.query_needs == frozenset() and RelevanceOnly().query_needs == {"aligned"}


def test_an_empty_question_weighs_every_token_alike() -> None:
    for query in (None, torch.zeros(0, 6)):
        inputs = VisionInputs(embeddings=rows(3), aligned=rows(4), query=query)
        assert CDPruner().relevance(inputs).tolist() == [1.0] * 10


def test_misfits_are_named() -> None:
    with pytest.raises(PruningError) as caught:
        raw_relevance(rows(0), rows(1, 1, 5))
    assert caught.value.field == "query"
    with pytest.raises(PruningError) as caught:
        CDPruner(relevance_weight=1.0)
    assert caught.value.field == "relevance_weight"
