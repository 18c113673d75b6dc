"""Sorting rows, cosines and relevance on every backend against their definitions."""

from __future__ import annotations

import math

import pytest
import torch


def _random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("largest", [False, True])
@pytest.mark.parametrize("size", [1, 31, 150])
def test_rows_are_sorted_with_ties_in_order(size, largest, backend):
    run = backend.op("row_sort", "sort_rows")
    random, counts = _random(3, size), torch.arange(3 * size).view(3, -1)
    for x in (random, random.mul(3).round(), counts):
        values, indices = run(x.to(backend.device), largest=largest)
        for row, found, order in zip(x.tolist(), values.tolist(), indices.tolist(), strict=True):
            expected = sorted(range(size), key=lambda i: -row[i] if largest else row[i])
            assert order == expected
            assert found == [row[i] for i in expected]


@pytest.mark.parametrize("largest", [False, True])
def test_nan_counts_as_the_last_infinity(largest, backend):
    x = torch.tensor([[1.0, math.nan, -math.inf, 2.0, math.nan, math.inf]]).to(backend.device)
    indices = backend.op("row_sort", "sort_rows")(x, largest=largest)[1]
    assert indices.tolist() == [[5, 3, 0, 1, 2, 4] if largest else [2, 0, 3, 1, 4, 5]]


@pytest.mark.parametrize("power", [1, 2, 4])
@pytest.mark.parametrize(("size", "width"), [(1, 5), (19, 40), (33, 33)])
def test_cosines_to_a_power(size, width, power, backend, assert_close):
    for dtype in backend.dtypes:
        x = _random(2, size, width, seed=size).to(backend.device, dtype)
        rows = x.double().cpu()
        rows = rows / rows.norm(dim=-1, keepdim=True)
        found = backend.op("cosines", "cosines")(x, power=power)
        assert found.dtype == torch.float32
        assert_close(found, (rows @ rows.mT) ** power)
        assert (found.diagonal(dim1=1, dim2=2) == 1).all()


def test_a_zero_row_is_like_nothing_not_even_itself(backend):
    x = _random(1, 6, 8).to(backend.device)
    x[0, 2] = 0
    found = backend.op("cosines", "cosines")(x)
    assert not found[0, 2].any() and not found[0, :, 2].any()


def _expected(tokens, query, sign, form, weight):
    raw = [
        sign * torch.nn.functional.cosine_similarity(token, query, dim=0).item() for token in tokens
    ]
    low, high = min(raw), max(raw)
    shaped = [(value - low) / (high - low) for value in raw]
    return {
        "floor": [max(value, 1e-3) for value in shaped],
        "exp": [math.exp(weight * (value - 1)) for value in shaped],
        "raw": shaped,
        "offset": [value + 1e-6 / (high - low) for value in shaped],
    }[form]


@pytest.mark.parametrize("form", ["floor", "exp", "raw", "offset"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_relevance_by_its_formula(sign, form, backend, assert_close):
    tokens, query = _random(2, 21, 37), _random(2, 37, seed=1)
    found = backend.op("relevance", "relevance")(
        tokens.to(backend.device), query.to(backend.device), sign=sign, form=form, weight=0.8
    )
    expected = [_expected(*pair, sign, form, 0.8) for pair in zip(tokens, query, strict=True)]
    assert_close(found, torch.tensor(expected))


# the interpreter is NumPy, which warns
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_makes_all_alike(value, backend):
    tokens, query = _random(2, 9, 16), _random(2, 16, seed=1)
    tokens[1, 4, 3] = value
    found = backend.op("relevance", "relevance")(
        tokens.to(backend.device), query.to(backend.device), sign=1, form="exp", weight=0.8
    )
    assert (found[1] == 1).all() and (found[0] != 1).any()


def test_equal_similarities_make_all_alike(backend):
    tokens = _random(1, 1, 16).expand(1, 7, 16).contiguous().to(backend.device)
    query = _random(1, 16, seed=1).to(backend.device)
    found = backend.op("relevance", "relevance")(tokens, query, sign=-1, form="floor", weight=0.0)
    assert (found == 1).all()
