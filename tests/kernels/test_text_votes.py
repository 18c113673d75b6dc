"""What voting rows say, and which rows stay, against one eager fp32 attention map per prompt."""

from __future__ import annotations

import math

import pytest
import torch

from epd_kernels.text_votes import Span, Spans

# heads, key heads, width
SHAPES = [(1, 1, 8), (4, 2, 40), (8, 2, 16)]
# rows and voters of each prompt; one does not vote
PROMPTS = ((37, 17), (5, 0), (18, 18), (20, 1), (50, 34))


def _problem(shape, dtype=torch.float32, prompts=PROMPTS):
    """Packed queries and keys, and spans whose queries lie where their rows do."""
    heads, kv_heads, width = shape
    rng = torch.Generator().manual_seed(heads)
    total = sum(length for length, _ in prompts)
    q = torch.randn(total, heads, width, generator=rng).to(dtype)
    k = torch.randn(total, kv_heads, width, generator=rng).to(dtype)
    spans, start = [], 0
    for length, votes in prompts:
        stop = start + length
        spans.append(Span(stop - votes, votes, start, stop))
        start = stop
    return q, k, tuple(spans)


def _eager(q, k, span, scale=0.4):
    """The map `[H, votes, rows]` of the voting rows of one prompt."""
    rows = slice(span.start, span.stop)
    keys = k[rows].double().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("ihd,jhd->hij", q[rows].double(), keys) * scale
    causal = torch.ones(logits.shape[1:], dtype=torch.bool).tril()
    whole = logits.masked_fill(~causal, -torch.inf)
    votes = span.stop - span.start - span.votes
    return whole.softmax(-1)[:, votes:], whole.logsumexp(-1)[:, votes:]


def _on(backend, q, k, spans):
    return q.to(backend.device), k.to(backend.device), Spans.of(spans, backend.device)


@pytest.mark.parametrize("shape", SHAPES)
def test_row_lse_is_that_of_the_map(shape, backend, assert_close):
    run = backend.op("text_votes", "row_lse")
    for dtype in backend.dtypes:
        q, k, spans = _problem(shape, dtype)
        found = run(*_on(backend, q, k, spans), scale=0.4).cpu()
        assert found.shape == (shape[0], len(q)) and found.dtype == torch.float32
        for span in spans:
            if span.votes:
                mine = found[:, span.query : span.query + span.votes]
                assert_close(mine, _eager(q, k, span)[1])


@pytest.mark.parametrize("shape", SHAPES)
def test_prior_is_the_column_sum_of_the_symmetrised_map(shape, backend, assert_close):
    q, k, spans = _problem(shape)
    there = _on(backend, q, k, spans)
    lse = backend.op("text_votes", "row_lse")(*there, scale=0.4)
    run = backend.op("text_votes", "received_and_given")
    found = run(*there[:2], lse, there[2], scale=0.4).cpu()
    for span in spans:
        if span.votes:
            block = _eager(q, k, span)[0][:, :, -span.votes :]
            both = block + block.mT - torch.diag_embed(block.diagonal(dim1=1, dim2=2))
            assert_close(found[:, span.query : span.query + span.votes], both.sum(1))


@pytest.mark.parametrize("expanded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_are_weighted_columns_of_the_map(shape, expanded, backend, assert_close):
    for dtype in backend.dtypes:
        q, k, spans = _problem(shape, dtype)
        there = _on(backend, q, k, spans)
        weights = torch.rand(shape[0], len(q), generator=torch.Generator().manual_seed(9))
        weights = weights[:1].expand(weights.shape) if expanded else weights
        lse = backend.op("text_votes", "row_lse")(*there, scale=0.4)
        run = backend.op("text_votes", "weighted_columns")
        parts = run(*there[:2], lse, weights.to(backend.device), there[2], scale=0.4)
        found = parts.sum(0).cpu()
        for span in spans:
            seen = span.stop - span.votes - span.start
            if span.votes and seen:
                own = weights[:, span.query : span.query + span.votes, None]
                expected = (own * _eager(q, k, span)[0][:, :, :seen]).sum((0, 1))
                assert_close(found[span.start : span.start + seen], expected)


def test_queries_may_be_packed_apart_from_keys(backend):
    q, k, spans = _problem(SHAPES[1])
    voting = torch.cat([q[s.query : s.query + s.votes] for s in spans])
    packed, first = [], 0
    for span in spans:
        packed.append(span._replace(query=first))
        first += span.votes
    run = backend.op("text_votes", "row_lse")
    apart = run(*_on(backend, voting, k, tuple(packed)), scale=0.4)
    whole = run(*_on(backend, q, k, spans), scale=0.4)
    for one, other in zip(packed, spans, strict=True):
        there = slice(other.query, other.query + other.votes)
        assert torch.equal(apart[:, one.query : one.query + one.votes], whole[:, there])


def _parts(backend, q, k, spans):
    q, k, there = _on(backend, q, k, spans)
    lse = backend.op("text_votes", "row_lse")(q, k, there, scale=0.4)
    weights = backend.op("text_votes", "received_and_given")(q, k, lse, there, scale=0.4)
    return backend.op("text_votes", "weighted_columns")(q, k, lse, weights, there, scale=0.4)


def test_nobody_changes_the_scores_of_another(backend):
    q, k, spans = _problem(SHAPES[1], prompts=((29, 9),))
    more_q, more_k, more = _problem(SHAPES[1], prompts=((60, 40), (3, 3)))
    moved = (s._replace(query=s.query + 29, start=s.start + 29, stop=s.stop + 29) for s in more)
    alone = _parts(backend, q, k, spans)
    together = _parts(backend, torch.cat([q, more_q]), torch.cat([k, more_k]), (*spans, *moved))
    assert torch.equal(alone[:, :20], together[:, :20])


def _kept_by_loop(scores, is_vision, span):
    vision = [row for row in range(span.start, span.stop) if is_vision[row]]
    best = sorted(vision, key=lambda row: -math.inf if math.isnan(scores[row]) else -scores[row])
    gone = set(best[span.keep :])
    return [row for row in range(span.start, span.stop) if row not in gone]


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("rounded", [False, True])
def test_the_best_vision_rows_stay_in_order(parts, rounded, backend):
    rng = torch.Generator().manual_seed(parts)
    lengths, keeps = (600, 1, 40, 70, 33), (133, 0, 0, 500, 7)
    scores = torch.randn(parts, sum(lengths), generator=rng)
    scores = scores.round() if rounded else scores
    is_vision = torch.rand(sum(lengths), generator=rng) < 0.8
    total, start, spans, expected = scores.sum(0).tolist(), 0, [], []
    for length, keep in zip(lengths, keeps, strict=True):
        span = Span(0, 0, start, start + length, keep, len(expected))
        spans.append(span)
        expected += _kept_by_loop(total, is_vision, span)
        start += length
    there = Spans.of(tuple(spans), backend.device)
    rows, kinds = backend.op("row_keep", "keep_rows")(
        scores.to(backend.device), is_vision.to(backend.device), there, num_rows=len(expected)
    )
    assert rows.tolist() == expected
    assert kinds.tolist() == is_vision[rows.cpu()].tolist()


def test_what_is_not_vision_is_not_asked_for_its_score(backend):
    scores = torch.tensor([[math.nan, 3.0, 1.0, 2.0, math.nan]]).to(backend.device)
    is_vision = torch.tensor([False, True, True, True, False]).to(backend.device)
    spans = Spans.of((Span(0, 0, 0, 5, 2, 0),), backend.device)
    run = backend.op("row_keep", "keep_rows")
    rows, kinds = run(scores, is_vision, spans, num_rows=4)
    assert rows.tolist() == [0, 1, 3, 4]
    assert kinds.tolist() == [False, True, True, False]


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(32, 32, 128), (32, 8, 128), (28, 4, 128)])
@pytest.mark.parametrize("votes", [1, 29, 64, 300])
def test_real_shapes(shape, votes, gpu, assert_close):
    q, k, spans = _problem(shape, torch.bfloat16, ((32 + 576 + votes, votes),) * 4)
    reference = type(gpu)("ref", "cuda")
    scores = []
    for backend in (gpu, reference):
        there = _on(backend, q, k, spans)
        lse = backend.op("text_votes", "row_lse")(*there, scale=0.088)
        prior = backend.op("text_votes", "received_and_given")
        weights = prior(*there[:2], lse, there[2], scale=0.088)
        run = backend.op("text_votes", "weighted_columns")
        scores.append(run(*there[:2], lse, weights, there[2], scale=0.088).sum(0))
    for span in spans:
        columns = slice(span.start, span.stop - span.votes)
        assert_close(scores[0][columns], scores[1][columns])
