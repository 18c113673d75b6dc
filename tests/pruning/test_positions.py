"""Positions after pruning, for one-dimensional and M-RoPE prompts, and calibrated attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from epd_pruning.errors import PruningError
from epd_pruning.positions import (
    PositionPolicy,
    calibration_bias,
    group_sizes,
    place,
)

SURVIVORS = torch.tensor([0, 1, 4, 9, 12, 13])


def mrope(rows: int, columns: int, before: int, after: int, frames: int = 1) -> Tensor:
    """Positions [3, L] of `before` text tokens, a grid, `after` text tokens."""
    text = torch.arange(before).expand(3, -1)
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns))
    grid = grid.reshape(-1, 3).mT + before
    rest = torch.arange(after).expand(3, -1) + int(grid.max()) + 1
    return torch.cat([text, grid, rest], 1)


@pytest.mark.parametrize("policy", [PositionPolicy.KEEP, PositionPolicy.KEEP_CALIBRATE])
def test_keep_moves_nothing(policy: PositionPolicy) -> None:
    placed = place(torch.arange(14), SURVIVORS, policy)
    assert torch.equal(placed.positions, SURVIVORS)
    assert placed.next_pos == 14 and placed.rope_delta == 8


def test_renumber_closes_the_gaps() -> None:
    placed = place(torch.arange(14), SURVIVORS, PositionPolicy.RENUMBER)
    assert placed.positions.tolist() == list(range(6))
    assert placed.next_pos == 6 and placed.rope_delta == 0


@pytest.mark.parametrize(
    ("rows", "columns", "frames"), [(4, 4, 1), (8, 2, 1), (2, 8, 1), (2, 3, 9)],
    ids=["square", "portrait", "landscape", "long-video"],
)  # fmt: skip
def test_mrope_text_and_decode_stay_where_they_were(rows: int, columns: int, frames: int) -> None:
    positions = mrope(rows, columns, before=5, after=4, frames=frames)
    size = frames * rows * columns
    survivors = torch.cat([torch.arange(6), 5 + size + torch.arange(4)])
    placed = place(positions, survivors, PositionPolicy.KEEP)
    span = max(rows, columns, frames)
    assert placed.positions.shape == (3, 10)
    assert placed.positions[:, 6:].tolist() == [list(range(5 + span, 9 + span))] * 3
    assert placed.next_pos == 9 + span
    with pytest.raises(PruningError, match="M-RoPE"):
        place(positions, survivors, PositionPolicy.RENUMBER)


def test_losing_the_last_block_does_not_rewind_the_counter() -> None:
    placed = place(torch.arange(14), torch.tensor([0, 1]), PositionPolicy.KEEP)
    assert placed.next_pos == 14
    assert place(torch.arange(14), SURVIVORS, PositionPolicy.KEEP, next_pos=40).next_pos == 40


def test_policies_are_parsed_by_name() -> None:
    assert PositionPolicy.parse("keep+calibrate") is PositionPolicy.KEEP_CALIBRATE
    with pytest.raises(PruningError) as caught:
        PositionPolicy.parse("shuffle")
    assert caught.value.field == "positions" and "renumber" in caught.value.allowed


def test_calibration_equals_its_definition() -> None:
    frequencies = 10000.0 ** -(torch.arange(8) / 8)
    queries, keys = torch.tensor([20.0, 21.0]), torch.tensor([1.0, 5.0, 18.0])
    sizes = torch.tensor([3, 1, 0])
    bias = calibration_bias(queries[:, None] * frequencies, keys[:, None] * frequencies, sizes)
    for q, query in enumerate(queries.tolist()):
        for k, key in enumerate(keys.tolist()[:2]):
            cosines = [math.cos((query - key) * f) for f in frequencies.tolist()]
            expected = math.log(sizes[k].item() * (2 - sum(cosines) / 8))
            assert bias[q, k].item() == pytest.approx(expected, abs=1e-5)
    assert bias[:, 2].tolist() == [0.0, 0.0]


def test_calibration_says_nothing_at_no_distance_and_lifts_far_tokens() -> None:
    frequencies = 10000.0 ** -(torch.arange(32) / 32)
    angles = torch.tensor([0.0, 1.0, 64.0, 512.0])[:, None] * frequencies
    bias = calibration_bias(angles[:1], angles, torch.ones(4, dtype=torch.int64))[0]
    assert bias[0].item() == pytest.approx(0.0, abs=1e-6)
    assert bool((bias.diff() > 0).all())
    with pytest.raises(PruningError):
        calibration_bias(angles, angles, torch.ones(4), ceiling=1.0)


def test_every_token_belongs_to_the_kept_one_nearest_to_it() -> None:
    x = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0.1, 1], [1, 0.1], [-1, 0.2]])
    assert group_sizes(x, torch.tensor([1, 2])).tolist() == [3, 3]
    assert group_sizes(x, torch.arange(6)).tolist() == [1] * 6
