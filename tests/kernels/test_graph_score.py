"""The graph score on every backend against loops over its definition."""

from __future__ import annotations

import math

import pytest
import torch

from epd_kernels.graph_score import BINS, graph_score

# of a cosine of 4,096 products near 0.2: a tensor core cuts a sum off after every 16 of them
_ROUNDING = 4096 / 16 * 2**-23 * 0.2


def _tokens(batch, size, width, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, size, width, generator=rng) + 0.4).to(dtype)


def _cosines(x, bipartite):
    rows = x.double() / x.double().norm(dim=-1, keepdim=True)
    return rows[0::2] @ rows[1::2].mT if bipartite else rows @ rows.mT


def _side(similarity, tau, min_degree, gamma):
    scores = []
    for row in similarity.tolist():
        edges = [value for value in row if value >= tau]
        mean = sum(edges) / max(len(edges), 1)
        score = len(edges) * math.exp(gamma * (mean - tau))
        if len(edges) < min_degree:
            score = 0.5 * score + 0.5 * sum(row) / max(len(row), 1)
        scores.append(score)
    return torch.tensor(scores)


def _by_loop(x, bipartite, tau, min_degree=4, gamma=1.0):
    similarity = _cosines(x, bipartite)
    if not bipartite:
        return _side(similarity, tau, min_degree, gamma)
    score = torch.empty(len(x))
    score[0::2] = _side(similarity, tau, min_degree, gamma)
    score[1::2] = _side(similarity.mT, tau, min_degree, gamma)
    return score


def _cell_edge(similarity, quantile):
    pairs = similarity.flatten().sort().values
    exact = pairs[max(1, math.ceil(quantile * len(pairs))) - 1].item()
    return min(math.floor((exact + 1) * BINS / 2), BINS - 1) * 2 / BINS - 1


@pytest.mark.parametrize("bipartite", [False, True], ids=["dense", "bipartite"])
@pytest.mark.parametrize(("size", "width"), [(1, 8), (17, 40), (34, 33), (63, 16)])
def test_equals_the_definition(size, width, bipartite, backend, assert_close):
    run = backend.op("graph_score", "graph_score")
    for dtype in backend.dtypes:
        x = _tokens(2, size, width, dtype, seed=size).to(backend.device)
        found = run(x, bipartite=bipartite, tau=0.25, min_degree=5, gamma=1.5)
        expected = [_by_loop(image.cpu(), bipartite, 0.25, 5, 1.5) for image in x]
        assert found.shape == (2, size) and found.dtype == torch.float32
        assert_close(found.cpu(), torch.stack(expected))


@pytest.mark.parametrize("bipartite", [False, True], ids=["dense", "bipartite"])
@pytest.mark.parametrize("quantile", [0.02, 0.5, 0.9, 0.995])
def test_quantile_is_the_cell_edge_below_it(quantile, bipartite, backend, assert_close):
    x = _tokens(2, 37, 24, seed=3).to(backend.device)
    found = backend.op("graph_score", "graph_score")(x, bipartite=bipartite, quantile=quantile)
    for image, score in zip(x.cpu(), found.cpu(), strict=True):
        edge = _cell_edge(_cosines(image, bipartite), quantile)
        assert_close(score, _by_loop(image, bipartite, edge))


def test_images_do_not_touch_each_other(backend):
    run = backend.op("graph_score", "graph_score")
    x = _tokens(3, 20, 16, seed=5).to(backend.device)
    together = run(x, quantile=0.8)
    for image in range(3):
        assert torch.equal(run(x[image : image + 1], quantile=0.8)[0], together[image])


def test_a_zero_row_is_similar_to_nothing(backend, assert_close):
    x = _tokens(1, 12, 16).to(backend.device)
    x[0, 5] = 0
    found = backend.op("graph_score", "graph_score")(x, tau=0.2)[0, 5]
    assert found.item() == 0.0


@pytest.mark.parametrize("bipartite", [False, True], ids=["dense", "bipartite"])
def test_reference_at_a_real_width(bipartite):
    x = _tokens(1, 576, 4096, torch.bfloat16)
    found = graph_score(x, bipartite=bipartite, quantile=0.9)
    _check_within_rounding(x, found, bipartite=bipartite, quantile=0.9)


@pytest.mark.gpu
@pytest.mark.parametrize("bipartite", [False, True], ids=["dense", "bipartite"])
@pytest.mark.parametrize(("batch", "size"), [(32, 576), (1, 2880)])
def test_real_shapes(batch, size, bipartite, gpu):
    x = _tokens(batch, size, 4096, torch.bfloat16).cuda()
    settings = {"bipartite": bipartite, "quantile": 0.9}
    found = gpu.op("graph_score", "graph_score")(x, **settings)
    assert torch.equal(found, gpu.op("graph_score", "graph_score")(x, **settings))
    _check_within_rounding(x, found, **settings)


def _check_within_rounding(x, found, *, bipartite, quantile):
    """Every score is that of the fp64 cosines, but for pairs within rounding of the threshold.

    Degree jumps there: such a pair may count as an edge or not. An edge more raises d exp(e / d -
    tau), so counting none and all of a token's bounds its score; most tokens have no such pair.
    """
    for image, score in zip(x, found.double(), strict=True):
        similarity = _cosines(image, bipartite)
        tau = _cell_edge(similarity, quantile)
        low, high = (
            _interleaved(similarity, bipartite, tau, tau + margin)
            for margin in (_ROUNDING, -_ROUNDING)
        )
        assert bool((score >= low * (1 - 1e-5)).all()) and bool((score <= high * (1 + 1e-5)).all())
        assert (low == high).double().mean() > 0.6


def _interleaved(similarity, bipartite, tau, counted_from):
    sides = [similarity, similarity.mT] if bipartite else [similarity]
    score = similarity.new_empty(sum(len(side) for side in sides))
    for i, side in enumerate(sides):
        edges = side >= counted_from
        degree = edges.sum(-1)
        connected = degree * torch.exp((side * edges).sum(-1) / degree.clamp_min(1) - tau)
        lonely = (connected + side.mean(-1)) / 2
        score[i :: len(sides)] = torch.where(degree >= 4, connected, lonely)
    return score
