"""The offline analysis behind a schedule."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epd_pruning.calibrate import (
    calibrated_schedule,
    change_points,
    propose_layers,
    shift_histogram,
)
from epd_pruning.errors import PruningError


def test_change_points_minimise_the_squared_error_of_two_levels() -> None:
    curves = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)).cumsum(1)
    for curve, found in zip(curves.double(), change_points(curves).tolist(), strict=True):
        errors = [
            sum(float((part - part.mean()).square().sum()) for part in (curve[:t], curve[t:]))
            for t in range(1, 12)
        ]
        assert found == errors.index(min(errors)) + 1


def test_shifts_are_found_where_they_were_put() -> None:
    # attention to the first half of the tokens arrives at layer 3, to the second half at layer 8
    sample = torch.zeros(12, 20)
    sample[3, :10], sample[8, 10:] = 5.0, 5.0
    histogram = shift_histogram([sample, sample], share=1.0)
    assert histogram.tolist() == [0, 0, 20, 0, 0, 0, 0, 20, 0, 0, 0, 0]


def test_only_the_most_attended_tokens_are_looked_at() -> None:
    sample = torch.zeros(6, 10)
    sample[2], sample[4, 7] = 1.0, 9.0
    assert shift_histogram([sample], share=0.1).tolist() == [0, 0, 0, 1, 0, 0]
    assert shift_histogram([sample], share=1.0).tolist() == [0, 9, 0, 1, 0, 0]


@pytest.mark.parametrize(
    ("histogram", "stages", "first", "expected"),
    [
        ([0, 9, 9, 0, 0, 0, 5, 0], 2, 0, (0, 2)),
        ([0, 9, 9, 0, 0, 0, 5, 0], 3, 0, (0, 2, 6)),
        ([9, 0, 0, 0, 0, 0, 0, 0], 2, 0, (0, 4)),
        ([9, 0, 0, 0, 0, 0, 0, 8], 2, 2, (4, 6)),
        ([1, 1, 1, 1, 1, 1, 1, 1], 1, 0, (3,)),
    ],
)
def test_layers_surround_dense_regions(
    histogram: list[int], stages: int, first: int, expected: tuple[int, ...]
) -> None:
    assert propose_layers(histogram, stages, first=first) == expected


@given(st.lists(st.integers(0, 9), min_size=3, max_size=40), st.data())
def test_proposals_always_fit_the_model(histogram: list[int], data: st.DataObject) -> None:
    first = data.draw(st.integers(0, len(histogram) - 2))
    stages = data.draw(st.integers(1, len(histogram) - 1 - first))
    layers = propose_layers(histogram, stages, first=first)
    assert len(set(layers)) == stages and list(layers) == sorted(layers)
    assert first <= layers[0] and layers[-1] <= len(histogram) - 2


def test_a_calibrated_schedule_holds_its_budget() -> None:
    schedule = calibrated_schedule([0, 9, 0, 0, 8, 0, 0, 0], num_tokens=256, average=64.0)
    assert schedule.layers == (0, 1, 4)
    processed = schedule.lengths(256, 8)
    assert 63 < sum(processed) / 8 <= 64
    assert schedule.counts[0] > schedule.counts[1] > schedule.counts[2]


def test_nothing_to_learn_from_is_an_error() -> None:
    with pytest.raises(PruningError, match="samples"):
        shift_histogram([])
    with pytest.raises(PruningError, match="stages"):
        propose_layers([1, 2, 3], 3)
