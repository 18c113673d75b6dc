"""Greedy DPP on every backend against determinants, and against the reference."""

from __future__ import annotations

import pytest
import torch

EPS = 1e-5


def _problem(batch, size, seed=0, width=48):
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(batch, size, width, generator=rng) + 0.5
    rows = rows / rows.norm(dim=-1, keepdim=True)
    return rows @ rows.mT, 0.05 + 0.95 * torch.rand(batch, size, generator=rng)


def _by_determinant(similarity, r, count):
    kernel = (r[:, None] * similarity * r).double()
    chosen = []
    for _ in range(count):
        rest = [n for n in range(len(kernel)) if n not in chosen]
        dets = [torch.linalg.det(kernel[[*chosen, n]][:, [*chosen, n]]).item() for n in rest]
        chosen.append(rest[dets.index(max(dets))])
    return chosen


def _run(backend, similarity, r, count):
    indices, gains = backend.op("greedy_dpp", "greedy_dpp")(
        similarity.to(backend.device), r.to(backend.device), count, eps=EPS
    )
    return indices.cpu(), gains.cpu()


@pytest.mark.parametrize("size", [9, 17, 33])
def test_each_choice_has_the_largest_determinant(size, backend):
    similarity, r = _problem(3, size)
    indices, _ = _run(backend, similarity, r, 8)
    for image in range(3):
        assert indices[image].tolist() == _by_determinant(similarity[image], r[image], 8)


@pytest.mark.parametrize(("size", "count"), [(1, 1), (16, 16), (40, 13), (63, 21)])
def test_equals_the_reference(size, count, backend, assert_close):
    for dtype in (torch.float32, torch.float16):
        similarity, r = _problem(2, size, seed=size)
        similarity = similarity.to(dtype)
        indices, gains = _run(backend, similarity, r, count)
        ref = type(backend)("ref", "cpu")
        expected, expected_gains = _run(ref, similarity, r, count)
        assert indices.dtype == torch.int64 and torch.equal(indices, expected)
        assert_close(gains, expected_gains)


def test_fills_come_by_relevance_then_index_and_zero_relevance_last(backend):
    similarity = torch.ones(1, 6, 6)
    r = torch.tensor([[0.2, 0.7, 0.9, 0.7, 0.0, 0.2]])
    indices, gains = _run(backend, similarity, r, 6)
    assert indices.tolist() == [[2, 1, 3, 0, 5, 4]]
    assert gains[0, 1:].tolist() == [0.0] * 5


def test_duplicates_wait(backend):
    similarity, _ = _problem(1, 7)
    doubled = similarity.repeat_interleave(2, 1).repeat_interleave(2, 2)
    r = torch.linspace(1.0, 0.001, 7).repeat_interleave(2)[None]
    indices, _ = _run(backend, doubled, r, 14)
    assert sorted((indices[0, :7] // 2).tolist()) == list(range(7))
    assert indices[0, 7:].tolist() == [1, 3, 5, 7, 9, 11, 13]


def test_ties_go_to_the_lowest_index(backend):
    indices, _ = _run(backend, torch.eye(8)[None], torch.ones(1, 8), 5)
    assert indices.tolist() == [[0, 1, 2, 3, 4]]


def test_padding_and_neighbours_change_nothing(backend):
    similarity, r = _problem(2, 30)
    similarity[1, 20:], similarity[1, :, 20:], r[1, 20:] = 0, 0, 0
    indices, _ = _run(backend, similarity, r, 11)
    for image, size in ((0, 30), (1, 20)):
        alone, _ = _run(
            backend, similarity[image : image + 1, :size, :size], r[image : image + 1, :size], 11
        )
        assert torch.equal(alone[0], indices[image])


def test_nothing_asked_is_nothing(backend):
    similarity, r = _problem(2, 5)
    indices, gains = _run(backend, similarity, r, 0)
    assert indices.shape == gains.shape == (2, 0)


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "size", "count"), [(1, 576, 64), (32, 576, 64), (5, 2880, 320)])
def test_real_shapes(batch, size, count, gpu):
    similarity, r = _problem(batch, size, width=1024)
    indices, gains = _run(gpu, similarity, r, count)
    again, _ = _run(gpu, similarity, r, count)
    assert torch.equal(indices, again)
    expected, expected_gains = _run(type(gpu)("ref", "cpu"), similarity, r, count)
    assert (indices == expected).float().mean() > 0.99
    torch.testing.assert_close(gains.log().sum(1), expected_gains.log().sum(1), rtol=1e-3, atol=0)
