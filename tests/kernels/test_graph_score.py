"""The graph score on every backend against loops over its definition."""

from __future__ import annotations

import math

import pytest
import torch

from epd_kernels.graph_score import BINS


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
        pairs = _cosines(image, bipartite).flatten().sort().values
        exact = pairs[max(1, math.ceil(quantile * len(pairs))) - 1].item()
        edge = min(math.floor((exact + 1) * BINS / 2), BINS - 1) * 2 / BINS - 1
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


@pytest.mark.gpu
@pytest.mark.parametrize("bipartite", [False, True], ids=["dense", "bipartite"])
@pytest.mark.parametrize(("batch", "size"), [(32, 576), (1, 2880)])
def test_real_shapes(batch, size, bipartite, gpu, assert_close):
    x = _tokens(batch, size, 4096, torch.bfloat16).cuda()
    settings = {"bipartite": bipartite, "quantile": 0.9}
    found = gpu.op("graph_score", "graph_score")(x, **settings)
    assert torch.equal(found, gpu.op("graph_score", "graph_score")(x, **settings))
    ref = type(gpu)("ref", "cuda").op("graph_score", "graph_score")(x, **settings)
    assert_close(found, ref)
