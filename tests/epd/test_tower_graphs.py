"""The recorded vision tower against the tower itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from epd.graphs import CalledAgain, CudaGraphs
from epd.models.card import ModelCard
from epd.models.tiny import write_tiny_llava
from epd.models.tower_graphs import TowerGraphs
from epd.models.vision import VisionEncoder

NEEDS = frozenset({"encoder_states", "encoder_keys", "cls_attention"})
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("tiny") / "model", seed=4)


def pictures(count: int, seed: int = 0) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    source = np.random.default_rng(seed)
    return [source.integers(0, 256, (20 + 3 * n, 40, 3), dtype=np.uint8) for n in range(count)]


def reusing(read: Any, sizes: list[int]) -> Any:
    """`read` with its results where those of the last such batch were, as a graph leaves them.

    The images of each batch are noted in `sizes`.
    """
    kept: dict[int, list[torch.Tensor]] = {}

    def run(pixels: torch.Tensor) -> list[torch.Tensor]:
        sizes.append(len(pixels))
        fresh = read(pixels)
        for old, new in zip(kept.setdefault(len(pixels), fresh), fresh, strict=True):
            old.copy_(new)
        return kept[len(pixels)]

    return run


def fields(inputs: Any) -> list[torch.Tensor]:
    return [inputs.embeddings, *(inputs.require(name) for name in sorted(NEEDS))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("at_once", [True, False])
def test_recorded_batches_give_what_the_tower_gives(
    tiny: Path, device: str, at_once: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = VisionEncoder.load(ModelCard.load(tiny), device, torch.float32)
    images = pictures(11)
    counts = [1, 8, 2, 5, 9, 3, 11, 7, 1]
    expected = [encoder.encode_inputs(images[:n], NEEDS) for n in counts]
    sizes: list[int] = []
    if device == "cpu":
        monkeypatch.setattr(encoder, "_read", reusing(encoder._read, sizes))
    recorder = CalledAgain("cpu") if device == "cpu" else CudaGraphs(device)
    encoder.repeat_with(recorder, at_once=at_once)
    recorded = len(sizes)
    # all are kept until the end: later batches must not reach into earlier ones
    found = [encoder.encode_inputs(images[:n], NEEDS) for n in counts]
    for batch, other in zip(expected, found, strict=True):
        for one, two in zip(batch, other, strict=True):
            for a, b in zip(fields(one), fields(two), strict=True):
                torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)
    if device == "cpu" and at_once:  # padded to what is recorded, but for more than that
        assert sizes[recorded:] == [1, 8, 2, 6, 9, 3, 11, 8, 1]
    elif device == "cpu":  # once more whenever a batch is recorded
        assert sizes == [1, 1, 8, 8, 2, 2, 6, 6, 9, 3, 3, 11, 8, 1]
    encoder.repeat_with(None)
    monkeypatch.undo()
    assert torch.allclose(encoder.encode(images)[3], expected[6][3].embeddings, atol=1e-5)


def test_batches_are_padded_to_the_next_recorded_one_and_no_more() -> None:
    seen: list[int] = []

    def tower(pixels: torch.Tensor) -> list[torch.Tensor]:
        seen.append(len(pixels))
        return [pixels.sum((1, 2))]

    graphs = TowerGraphs(tower, CalledAgain("cpu"), shape=(2, 2), dtype=torch.float32)
    graphs.record()
    assert seen == [8, 6, 4, 3, 2, 1]
    seen.clear()
    for count in range(1, 9):
        [sums] = graphs.run(torch.full((count, 2, 2), float(count))) or []
        assert sums.tolist() == [4.0 * count] * count
    assert seen == [1, 2, 3, 4, 6, 6, 8, 8]
    assert graphs.run(torch.zeros(9, 2, 2)) is None


def test_pictures_processed_side_by_side_are_those_processed_alone(tiny: Path) -> None:
    encoder = VisionEncoder.load(ModelCard.load(tiny))
    images = pictures(40, seed=1)
    alone = torch.cat([encoder.pixels([image]) for image in images])
    for _ in range(5):
        assert torch.equal(encoder.pixels(images), alone)
