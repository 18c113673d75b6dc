"""Pictures as upright 8-bit RGB arrays, for the caller's own process. No torch.

The gateway decodes strangers' bytes in a bounded child; this is for files the caller trusts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from epd.errors import MediaError

__all__ = ["ImageInput", "RGBArray", "rgb_array"]

RGBArray = np.ndarray[Any, np.dtype[np.uint8]]
ImageInput = Image.Image | str | Path | np.ndarray[Any, Any]


def rgb_array(image: ImageInput) -> RGBArray:
    """uint8 [height, width, 3]: turned upright by EXIF, transparency on white, 16 bit scaled down.

    Takes a Pillow image, a path or an RGB array. Raises `MediaError` for anything else.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
            raise MediaError("an image array is uint8 of shape [height, width, 3]", "images")
        return np.ascontiguousarray(image)
    if isinstance(image, str | Path):
        return _read(Path(image))
    if not isinstance(image, Image.Image):
        raise MediaError("an image is a Pillow image, a path or an RGB array", "images")
    return _flatten(image)


def _read(path: Path) -> RGBArray:
    try:
        with Image.open(path) as image:
            return _flatten(image)
    except UnidentifiedImageError:
        raise MediaError(f"{path.name} is no image that can be read", "images") from None
    except (OSError, SyntaxError) as error:
        raise MediaError(f"cannot read {path.name}: {error.__class__.__name__}", "images") from None


def _flatten(image: Image.Image) -> RGBArray:
    upright = ImageOps.exif_transpose(image)
    if upright.mode in ("I", "I;16"):
        # convert("RGB") would clip at 255
        scaled = (np.asarray(upright, np.float64) / 257 + 0.5).clip(0, 255).astype(np.uint8)
        return np.repeat(scaled[:, :, None], 3, axis=2)
    if "transparency" in upright.info or upright.mode in ("RGBA", "LA", "PA"):
        layered = upright.convert("RGBA")
        white = Image.new("RGBA", layered.size, "white")
        upright = Image.alpha_composite(white, layered)
    return np.array(upright.convert("RGB"))
