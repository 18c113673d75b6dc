"""Images to pixel values, through the checkpoint's own image processor on its Pillow backend.

A picture takes it milliseconds. Half of them go into rescaling and normalising, which map each of
256 bytes of a channel to one number: those are looked up. The rest is Pillow's, which lets other
threads run: the pictures of a batch are processed side by side.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from epd.errors import CheckpointError, MediaError
from epd.models.files import problem, read_json

if TYPE_CHECKING:
    from epd.models.card import ModelCard

__all__ = ["ImageProcessor"]

RGBImage = np.ndarray[Any, np.dtype[np.uint8]]
PixelArray = np.ndarray[Any, np.dtype[np.float32]]

_MAX_RATIO = 200
_MAX_THREADS = 8
_SIZING = ("do_resize", "do_center_crop", "do_pad")
_PROCESSORS = {
    "clip": ("clip.image_processing_pil_clip", "CLIPImageProcessorPil"),
    "siglip": ("siglip.image_processing_pil_siglip", "SiglipImageProcessorPil"),
    "llava": ("llava.image_processing_pil_llava", "LlavaImageProcessorPil"),
}


class ImageProcessor:
    """Callable: images in, `[N, 3, image_size, image_size]` fp32 out.

    Raises `CheckpointError` when built if the processor's output is not what the tower takes.
    """

    def __init__(self, card: ModelCard, image_size: int) -> None:
        self._processor = _load(card, image_size)
        threads = min(_MAX_THREADS, len(os.sched_getaffinity(0)))
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="pixels")
        self._numbers = self._number_of_byte()
        probe = self([np.zeros((31, 47, 3), np.uint8)])
        if probe.shape != (1, 3, image_size, image_size):
            raise problem(
                f"Cannot serve the vision side of {card.name}.",
                f"Its image processor makes {list(probe.shape[1:])} pixels; the vision tower takes "
                f"{[3, image_size, image_size]}.",
                "Use the processor configuration that belongs to this model.",
            )

    def __call__(self, images: Sequence[RGBImage]) -> torch.Tensor:
        """Pixel values of uint8 RGB images `[H, W, 3]`. Raises `MediaError` for anything else."""
        for image in images:
            _check(image)
        run = self._threads.map if len(images) > 1 else map
        return torch.from_numpy(np.concatenate(list(run(self._pixels, images))))

    def _pixels(self, image: RGBImage) -> PixelArray:
        """`[1, 3, image_size, image_size]` of one image, which no other one has a part in."""
        if self._numbers is None:
            return np.ascontiguousarray(self._run(image), np.float32)
        [channels] = self._run(image, do_rescale=False, do_normalize=False)
        return np.stack([n.take(c) for n, c in zip(self._numbers, channels, strict=True)])[None]

    def _run(self, image: RGBImage, **changed: bool) -> np.ndarray[Any, Any]:
        """What the processor makes of one image, with some of its steps `changed`."""
        values = self._processor(
            images=[image], return_tensors="np", input_data_format="channels_last", **changed
        )["pixel_values"]
        return np.stack(values)

    def _number_of_byte(self) -> PixelArray | None:
        """`[3, 256]`; None if this processor does more than map bytes once sizes are right."""
        ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
        noise = np.random.default_rng(0).integers(0, 256, (61, 83, 3), np.uint8)
        raw = self._run(noise, do_rescale=False, do_normalize=False)
        sizing = [name for name in _SIZING if hasattr(self._processor, name)]
        numbers = self._run(ramp, **dict.fromkeys(sizing, False))
        if raw.dtype != np.uint8 or numbers.shape != (1, 3, 1, 256):
            return None
        numbers = np.ascontiguousarray(numbers[0, :, 0], np.float32)
        found = np.stack([n.take(c) for n, c in zip(numbers, raw[0], strict=True)])
        return numbers if np.array_equal(found, self._run(noise)[0]) else None


def _check(image: RGBImage) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise MediaError("an image is a uint8 array of height, width and 3 channels")
    height, width = image.shape[:2]
    if max(height, width) > _MAX_RATIO * min(height, width):
        raise MediaError(f"an image may be at most {_MAX_RATIO} times as long as it is wide")


def _load(card: ModelCard, image_size: int) -> Any:
    """The processor that the checkpoint names, always in its Pillow form.

    AutoImageProcessor is not asked: some releases of transformers refuse it without torchvision,
    and all prefer torchvision, whose resizing differs, where it is installed.
    """
    config = read_json(card.path, "processor_config.json").get("image_processor")
    config = config or read_json(card.path, "preprocessor_config.json")
    if not config and not card.entries:
        # random weights from a bare config.json: any processor of the right size will do
        square = {"height": image_size, "width": image_size}
        config = {"size": square, "crop_size": square}
    tower = (card.config.get("vision_config") or {}).get("model_type", "clip_vision_model")
    named = config.get("image_processor_type") or config.get("feature_extractor_type")
    kind = str(named or tower).lower().removesuffix("fast").removesuffix("imageprocessor")
    kind = kind.removesuffix("featureextractor").removesuffix("_vision_model")
    if not config or kind not in _PROCESSORS:
        raise _unusable(card, f"its image processor is {named!r}" if config else "it names none")
    module, name = _PROCESSORS[kind]
    try:
        return getattr(import_module(f"transformers.models.{module}"), name).from_dict(dict(config))
    except Exception as error:  # transformers raises a dozen unrelated types
        raise _unusable(card, f"transformers rejects it ({type(error).__name__})") from None


def _unusable(card: ModelCard, why: str) -> CheckpointError:
    return problem(
        f"Cannot load the image processor of {card.name}.",
        f"In processor_config.json or preprocessor_config.json: {why[:200]}.",
        f"Supported are the processors of {', '.join(_PROCESSORS)}.",
    )
