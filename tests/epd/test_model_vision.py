"""The vision encoder against transformers: pixels, features, token counts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from epd.demo import CHECKPOINT
from epd.errors import CheckpointError, MediaError
from epd.models.card import ModelCard
from epd.models.tiny import write_tiny_llava
from epd.models.vision import VisionEncoder

CONFIGS: dict[str, dict[str, Any]] = {
    "clip": {},
    "clip-crop": {"center_crop": True},
    "clip-full-last": {"feature_layer": -1, "select": "full"},
    "clip-first": {"feature_layer": 1},
    "clip-list": {"feature_layer": [-2, 1, 3]},
    "siglip-full": {"vision": "siglip", "feature_layer": -1, "select": "full"},
    "siglip-default": {"vision": "siglip"},
    "siglip-list": {"vision": "siglip", "feature_layer": [0, -2], "select": "full"},
}
SIZES = [(28, 28, 3), (40, 31, 3), (5, 90, 3), (200, 7, 3), (64, 64, 3), (1, 1, 3), (33, 3, 3)]


def noise(seed: int = 0) -> list[np.ndarray]:
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, size, dtype=np.uint8) for size in SIZES]


def reference(path: Path) -> LlavaForConditionalGeneration:
    model = LlavaForConditionalGeneration.from_pretrained(path, dtype=torch.float32)
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("options", CONFIGS.values(), ids=CONFIGS.keys())
def test_features_equal_transformers_image_by_image(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    path = write_tiny_llava(tmp_path, seed=4, **options)
    encoder, model = VisionEncoder.load(ModelCard.load(path)), reference(path)
    images = noise()
    batched = encoder.encode(images, batch_size=3)
    assert len(batched) == len(images)
    for image, features in zip(images, batched, strict=True):
        expected = model.model.get_image_features(encoder.pixels([image])).pooler_output[0]
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
        assert len(features) == encoder.num_tokens(image.shape[1], image.shape[0])
    assert not torch.allclose(batched[0], batched[1], atol=1e-2)
    assert encoder.encode([]) == []


def test_the_demo_checkpoint() -> None:
    encoder, model = VisionEncoder.load(ModelCard.load(CHECKPOINT)), reference(CHECKPOINT)
    images = noise(1)[:2]
    expected = model.model.get_image_features(encoder.pixels(images)).pooler_output
    torch.testing.assert_close(
        torch.stack(encoder.encode(images)), torch.stack(list(expected)), rtol=1e-5, atol=1e-5
    )
    assert encoder.num_tokens(1920, 1080) == 256


def expected_pixels(image: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """The processor's definition written out: resize with Pillow, crop, rescale, normalise."""
    picture = Image.fromarray(image)
    size = config["size"]
    if "shortest_edge" in size:
        short = min(picture.size)
        width, height = (int(size["shortest_edge"] * side / short) for side in picture.size)
    else:
        width, height = size["width"], size["height"]
    values = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    if config.get("do_center_crop"):
        crop = config["crop_size"]["height"]
        top, left = (values.shape[0] - crop) // 2, (values.shape[1] - crop) // 2
        values = values[top : top + crop, left : left + crop]
    values = (values / 255 - np.array(config["image_mean"])) / np.array(config["image_std"])
    return values.transpose(2, 0, 1)


@pytest.mark.parametrize("options", [{}, {"center_crop": True}, {"vision": "siglip"}])
def test_pixels_are_what_the_processor_config_says(tmp_path: Path, options: dict[str, Any]) -> None:
    path = write_tiny_llava(tmp_path, **options)
    encoder = VisionEncoder.load(ModelCard.load(path))
    config = json.loads((path / "processor_config.json").read_text())["image_processor"]
    images = [image for image in noise(2) if min(image.shape[:2]) > 2]
    expected = np.stack([expected_pixels(image, config) for image in images])
    pixels = encoder.pixels(images)
    assert pixels.dtype == torch.float32
    np.testing.assert_allclose(pixels.numpy(), expected, atol=1e-5)


def test_weights_are_counted(tmp_path: Path) -> None:
    card = ModelCard.load(write_tiny_llava(tmp_path))
    full, half = VisionEncoder.load(card), VisionEncoder.load(card, "cpu", torch.bfloat16)
    sizes = {name: entry.end - entry.start for name, entry in card.entries.items()}
    unused = sum(size for name, size in sizes.items() if "encoder.layers.2" in name)
    vision = sum(
        size for name, size in sizes.items() if "vision_tower" in name or "projector" in name
    )
    assert full.resident_bytes() == vision - unused
    assert half.resident_bytes() * 2 == full.resident_bytes()
    assert half.encode(noise()[:1])[0].dtype == torch.bfloat16


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 4, 3), np.float32), np.zeros((1, 4000, 3), np.uint8),
    ],
)  # fmt: skip
def test_what_is_no_image_is_refused(tmp_path: Path, image: np.ndarray) -> None:
    encoder = VisionEncoder.load(ModelCard.load(write_tiny_llava(tmp_path)))
    with pytest.raises(MediaError):
        encoder.encode([image])
    with pytest.raises(MediaError):
        encoder.num_tokens(0, 4)


def change(path: Path, file: str, section: str | None, **values: Any) -> ModelCard:
    config = json.loads((path / file).read_text())
    (config if section is None else config[section]).update(values)
    (path / file).write_text(json.dumps(config))
    return ModelCard.load(path)


@pytest.mark.parametrize(
    ("file", "section", "values", "named"),
    [
        ("config.json", "vision_config", {"model_type": "pixtral"}, "pixtral"),
        ("config.json", None, {"vision_feature_layer": 9}, "vision_feature_layer"),
        ("config.json", None, {"vision_feature_layer": []}, "vision_feature_layer"),
        ("config.json", None, {"vision_feature_layer": -5}, "vision_feature_layer"),
        ("config.json", "vision_config", {"patch_size": 5}, "patch_size"),
        ("config.json", "vision_config", {"hidden_size": "wide"}, "rejects"),
        ("processor_config.json", "image_processor", {"size": {"height": 14, "width": 14}}, "14"),
        ("processor_config.json", "image_processor", {"image_processor_type": "Evil"}, "Evil"),
        ("processor_config.json", "image_processor", {"size": "big"}, "image processor"),
    ],
)
def test_vision_sides_that_cannot_be_served(
    tmp_path: Path, file: str, section: str | None, values: dict[str, Any], named: str
) -> None:
    card = change(write_tiny_llava(tmp_path), file, section, **values)
    with pytest.raises(CheckpointError, match=named) as raised:
        VisionEncoder.load(card)
    assert len(str(raised.value).splitlines()) == 3


def test_the_older_processor_file_is_read(tmp_path: Path) -> None:
    path = write_tiny_llava(tmp_path)
    images = noise(3)[:2]
    expected = VisionEncoder.load(ModelCard.load(path)).encode(images)
    processor = json.loads((path / "processor_config.json").read_text())["image_processor"]
    processor["image_processor_type"] = "CLIPImageProcessorFast"
    (path / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match="names none"):
        VisionEncoder.load(ModelCard.load(path))
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    again = VisionEncoder.load(ModelCard.load(path)).encode(images)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
