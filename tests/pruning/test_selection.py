"""Top-k with ties, evenly spread indices and budgets, from their definitions."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epd_pruning.errors import PruningError
from epd_pruning.selection import (
    cosine_matrix,
    keep_count,
    split_budget,
    spread,
    stable_top_k,
    unit_rows,
)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=40), st.booleans(), st.data())
def test_top_k_equals_python_sorting(values: list[int], largest: bool, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, len(values)))
    sign = -1 if largest else 1
    expected = sorted(range(len(values)), key=lambda n: (sign * values[n], n))[:count]
    scores = torch.tensor(values, dtype=torch.float32)
    assert stable_top_k(scores, count, largest=largest).tolist() == expected


def test_nan_comes_last_either_way() -> None:
    scores = torch.tensor([1.0, math.nan, 2.0])
    assert stable_top_k(scores, 3).tolist() == [2, 0, 1]
    assert stable_top_k(scores, 3, largest=False).tolist() == [0, 2, 1]


@pytest.mark.parametrize(
    ("num_tokens", "keep", "expected"),
    [(576, 0.111, 64), (576, 64, 64), (10, 0.01, 1), (10, 99, 10), (5, 1.0, 5), (0, 0.5, 0)],
)  # fmt: skip
def test_keep_count(num_tokens: int, keep: float, expected: int) -> None:
    assert keep_count(num_tokens, keep) == expected


@pytest.mark.parametrize("keep", [0, -1, 0.0, 1.01, -0.5, math.nan, math.inf, True, "64", None])
def test_keep_count_names_the_field_and_the_range(keep: object) -> None:
    with pytest.raises(PruningError) as caught:
        keep_count(576, keep)  # type: ignore[arg-type]
    assert caught.value.field == "keep"
    assert "1" in caught.value.allowed


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(1, 400))
def test_split_budget_is_exact_and_fair(sizes: list[int], total: int) -> None:
    filled = sum(size > 0 for size in sizes)
    if total < filled:
        with pytest.raises(PruningError, match="one token per image"):
            split_budget(total, sizes)
        return
    shares = split_budget(total, sizes)
    assert sum(shares) == min(total, sum(sizes))
    assert all(min(size, 1) <= share <= size for share, size in zip(shares, sizes, strict=True))
    if 0 < total < sum(sizes) and all(total * size >= sum(sizes) for size in sizes if size):
        exact = [Fraction(total * size, sum(sizes)) for size in sizes]
        assert all(abs(share - quota) < 1 for share, quota in zip(shares, exact, strict=True))


@pytest.mark.parametrize(
    ("total", "sizes", "expected"),
    [
        (10, [3, 3, 3], [3, 3, 3]),
        (4, [3, 3, 3], [2, 1, 1]),
        (64, [576, 288], [43, 21]),
        (7, [100, 1, 1], [5, 1, 1]),
        (320, [576] * 5, [64] * 5),
        (3, [0, 10, 10], [0, 2, 1]),
    ],
)
def test_split_budget_by_hand(total: int, sizes: list[int], expected: list[int]) -> None:
    assert split_budget(total, sizes) == expected


@given(st.integers(1, 300), st.data())
def test_spread_is_increasing_and_even(num_tokens: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, num_tokens))
    indices = spread(num_tokens, count).tolist()
    assert len(indices) == count
    steps = {b - a for a, b in pairwise(indices)}
    assert steps <= {num_tokens // max(count, 1), num_tokens // max(count, 1) + 1}
    assert all(0 <= index < num_tokens for index in indices)


def test_cosine_of_half_precision_rows_is_fp32_and_scale_free() -> None:
    rows = torch.tensor([[3.0, 4.0], [-4.0, 3.0], [0.0, 0.0]], dtype=torch.bfloat16)
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(cosine_matrix(rows * 64), expected)
    torch.testing.assert_close(cosine_matrix(rows, rows[:1]), expected[:, :1])
    assert unit_rows(rows).dtype == torch.float32
