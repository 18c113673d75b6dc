"""The controls: seeded, even, coarse."""

from __future__ import annotations

import pytest
import torch

from epd_pruning.base import VisionInputs
from epd_pruning.controls import LowResolution, Random, UniformStride
from epd_pruning.errors import PruningError


def test_random_depends_on_both_seeds_and_on_nothing_else() -> None:
    inputs = VisionInputs(embeddings=torch.zeros(100, 2), seed=5)
    kept = Random().prune(inputs, 10)
    other = VisionInputs(embeddings=torch.ones(100, 2), seed=5)
    assert torch.equal(Random().prune(other, 10), kept)
    assert not torch.equal(Random(seed=1).prune(inputs, 10), kept)
    moved = VisionInputs(embeddings=torch.zeros(100, 2), seed=6)
    assert not torch.equal(Random().prune(moved, 10), kept)


def test_random_is_uniform() -> None:
    counts = torch.zeros(20)
    for seed in range(400):
        inputs = VisionInputs(embeddings=torch.zeros(20, 1), seed=seed)
        counts[Random().prune(inputs, 5)] += 1
    # 400 draws of probability 1/4: five standard deviations are 43
    assert bool(((counts - 100).abs() < 43).all())


def test_uniform_stride_by_hand() -> None:
    inputs = VisionInputs(embeddings=torch.zeros(12, 1))
    assert UniformStride().prune(inputs, 3).tolist() == [2, 6, 10]
    assert UniformStride().prune(inputs, 5).tolist() == [1, 3, 6, 8, 10]


def test_low_resolution_keeps_the_centres_of_a_coarse_grid() -> None:
    inputs = VisionInputs(embeddings=torch.zeros(24, 1), grid=(4, 6))
    assert LowResolution().prune(inputs, 6).tolist() == [7, 9, 11, 19, 21, 23]


def test_low_resolution_merges_cells_to_their_means() -> None:
    embeddings = torch.arange(16.0)[:, None]
    inputs = VisionInputs(embeddings=embeddings, grid=(4, 4))
    pool = LowResolution().prepare(inputs, 4)
    assert pool.inputs.embeddings[:, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    plain = LowResolution(merging=False).prepare(inputs, 4)
    assert torch.equal(plain.inputs.embeddings, embeddings[plain.indices])


@pytest.mark.parametrize("num_kept", range(1, 24))
def test_low_resolution_fills_any_budget_exactly(num_kept: int) -> None:
    inputs = VisionInputs(embeddings=torch.zeros(24, 1), grid=(2, 12))
    assert LowResolution().prune(inputs, num_kept).unique().shape == (num_kept,)


def test_low_resolution_asks_for_the_grid_of_a_rectangle() -> None:
    with pytest.raises(PruningError) as caught:
        LowResolution().prune(VisionInputs(embeddings=torch.zeros(24, 1)), 6)
    assert caught.value.field == "grid"
