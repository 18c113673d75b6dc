"""Looked-up pixel values against the image processor itself, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from epd.models.card import ModelCard
from epd.models.pixels import ImageProcessor
from epd.models.tiny import write_tiny_llava

SIZES = [(28, 28), (40, 31), (5, 90), (200, 7), (64, 64), (1, 1), (33, 3), (480, 640)]
CHANGES: list[dict[str, Any]] = [
    {},
    {"do_normalize": False},
    {"do_rescale": False, "do_normalize": False},
    {"rescale_factor": 0.0123, "image_mean": [0.0, 0.7, 1.5], "image_std": [1.0, 0.1, 3.0]},
    {
        "image_processor_type": "LlavaImageProcessor", "do_pad": True,
        "image_mean": [0.4, 0.5, 0.6], "size": {"shortest_edge": 28},
        "do_center_crop": True, "crop_size": {"height": 28, "width": 28},
    },
]  # fmt: skip


def pictures() -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
    source = np.random.default_rng(5)
    return [source.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def processor(path: Path, changes: dict[str, Any]) -> ImageProcessor:
    file = path / "processor_config.json"
    config = json.loads(file.read_text())
    config["image_processor"] |= changes
    file.write_text(json.dumps(config))
    return ImageProcessor(ModelCard.load(path), 28)


@pytest.mark.parametrize("changes", CHANGES)
@pytest.mark.parametrize("options", [{}, {"center_crop": True}, {"vision": "siglip"}])
def test_looked_up_pixels_equal_the_processors(
    tmp_path: Path, options: dict[str, Any], changes: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    asked = processor(write_tiny_llava(tmp_path, **options), changes)
    assert asked._numbers is not None
    images = pictures()
    expected = [
        np.stack(asked._processor(images=[image], return_tensors="np",
                                  input_data_format="channels_last")["pixel_values"])
        for image in images
    ]  # fmt: skip
    real = asked._run

    def sizing_only(image: Any, **changed: bool) -> Any:
        assert changed == {"do_rescale": False, "do_normalize": False}
        return real(image, **changed)

    monkeypatch.setattr(asked, "_run", sizing_only)
    for image, wanted in zip(images, expected, strict=True):
        assert np.array_equal(asked([image]).numpy(), wanted.astype(np.float32))
    for _ in range(5):  # side by side as one by one
        assert np.array_equal(asked(images).numpy(), np.concatenate(expected).astype(np.float32))


def test_a_processor_that_looks_at_other_pixels_is_asked_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = processor(write_tiny_llava(tmp_path), {})
    real = asked._run

    def centred(image: Any, **changed: bool) -> Any:
        values = real(image, **changed)
        return values if "do_normalize" in changed else values - values.mean()

    monkeypatch.setattr(asked, "_run", centred)
    asked._numbers = asked._number_of_byte()
    assert asked._numbers is None
    image = pictures()[0]
    assert torch.equal(asked([image]), torch.from_numpy(centred(image)))
