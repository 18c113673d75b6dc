"""The child process that decodes images: encoded bytes on stdin, RGB on stdout, under rlimits.

Requests are `[u32 length][bytes]`; replies `[u8 status][u32 width][u32 height]` and, when the
status is OK, `3 * width * height` bytes of RGB. One READY status is sent after start. Run as
`python -m epd_services.gateway.image_child CPU_SECONDS MEMORY_BYTES MAX_PIXELS`.
"""

from __future__ import annotations

import contextlib
import io
import resource
import signal
import struct
import sys
import warnings
from enum import IntEnum
from typing import BinaryIO

from PIL import Image, ImageChops, ImageFile, UnidentifiedImageError

__all__ = ["REPLY", "REQUEST", "ImageRefused", "Status", "decode"]

REQUEST = struct.Struct(">I")
REPLY = struct.Struct(">BII")

MIN_SIDE = 2
MAX_ASPECT = 200
_STRIP_BYTES = 1 << 20
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# PNG states a transparent grey in samples of the file's depth, Pillow hands out 8-bit values
_GREY_SCALE = {"L;2": 85, "L;4": 17}


class Status(IntEnum):
    """What a reply says."""

    OK = 0
    READY = 1
    UNREADABLE = 2
    FORMAT = 3
    TOO_MANY_PIXELS = 4
    TOO_SMALL = 5
    TOO_NARROW = 6
    DEEP_TRANSPARENCY = 7
    OUT_OF_MEMORY = 8


class ImageRefused(Exception):
    """An image we do not decode, and why."""

    def __init__(self, status: Status) -> None:
        super().__init__(status.name)
        self.status = status


def decode(data: bytes, max_pixels: int) -> Image.Image:
    """The first frame of `data` as upright RGB on white.

    Raises `ImageRefused`, and whatever Pillow raises on damaged data.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except UnidentifiedImageError:
        raise ImageRefused(Status.FORMAT) from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise ImageRefused(Status.TOO_MANY_PIXELS) from None
    _check_size(*image.size, max_pixels)
    depth = _png_depth(image)
    # loaded before anything else looks: reading EXIF would load, and hide that it failed
    image.load()
    turn = _TURNS.get(_orientation(image))
    rgb = _to_rgb(image, depth)
    return rgb if turn is None else rgb.transpose(turn)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageRefused(Status.TOO_MANY_PIXELS)
    if min(width, height) < MIN_SIDE:
        raise ImageRefused(Status.TOO_SMALL)
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise ImageRefused(Status.TOO_NARROW)


def _orientation(image: Image.Image) -> int:
    # a damaged EXIF block is no reason to refuse the pixels
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:
        return 1
    return value if isinstance(value, int) else 1


def _png_depth(image: ImageFile.ImageFile) -> str:
    """Pillow's name of the sample layout in a PNG, such as `L;2`; empty for other formats."""
    if image.format != "PNG" or not image.tile:
        return ""
    args = image.tile[0].args
    return args if isinstance(args, str) else str(args[0]) if args else ""


def _to_rgb(image: Image.Image, depth: str) -> Image.Image:
    transparency = image.info.get("transparency")
    if transparency is not None and depth.endswith("16B"):
        raise ImageRefused(Status.DEEP_TRANSPARENCY)
    if image.mode in ("I", "I;16"):
        # to 8 bit by 255/65535 with rounding; convert("RGB") would clip instead
        return image.convert("I").point(lambda v: v * (1 / 257) + 0.5).convert("L").convert("RGB")
    if image.mode in ("1", "L") and isinstance(transparency, int):
        return _grey_on_white(image.convert("L"), transparency * _GREY_SCALE.get(depth, 1))
    if image.mode == "CMYK" and "adobe" not in image.info:
        # Pillow takes every CMYK JPEG for Adobe's inverted kind
        return ImageChops.invert(image).convert("RGB")
    if image.mode == "LA":
        return _on_white(image, "L").convert("RGB")
    if image.mode in ("RGBA", "PA") or transparency is not None:
        return _on_white(_as_mode(image, "RGBA"), "RGB")
    return _as_mode(image, "RGB")


def _as_mode(image: Image.Image, mode: str) -> Image.Image:
    # convert() copies even when there is nothing to do
    return image if image.mode == mode else image.convert(mode)


def _grey_on_white(grey: Image.Image, transparent: int) -> Image.Image:
    return grey.point([255 if v == transparent else v for v in range(256)]).convert("RGB")


def _on_white(image: Image.Image, mode: str) -> Image.Image:
    white = Image.new(mode, image.size, "white")
    opaque = image.getchannel("L") if mode == "L" else image
    white.paste(opaque, mask=image.getchannel("A"))
    return white


def _write(image: Image.Image, out: BinaryIO) -> None:
    """Send the reply in strips, so that a large image is not held twice."""
    width, height = image.size
    out.write(REPLY.pack(Status.OK, width, height))
    rows = max(1, _STRIP_BYTES // (3 * width))
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        out.write(strip.tobytes())
    out.flush()


def _say(status: Status, out: BinaryIO) -> None:
    out.write(REPLY.pack(status, 0, 0))
    out.flush()


def _serve_one(data: bytes, out: BinaryIO, cpu_seconds: float, max_pixels: int) -> None:
    # SIGPROF keeps its default action: the kernel ends a decode that burns its time, even inside C
    signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
    try:
        image = decode(data, max_pixels)
    except ImageRefused as refused:
        _say(refused.status, out)
    except MemoryError:
        _say(Status.OUT_OF_MEMORY, out)
    except Exception:
        _say(Status.UNREADABLE, out)
    else:
        _write(image, out)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)


def _warm_up(max_pixels: int) -> None:
    """Decode one image of each format, so that nothing is imported once files are out of reach."""
    exif = Image.Exif()
    exif[_ORIENTATION_TAG] = 6
    frame = Image.new("RGBA", (2, 2))
    for kind in _FORMATS:
        image = frame.convert("RGB") if kind == "JPEG" else frame
        buffer = io.BytesIO()
        image.save(buffer, kind, exif=exif.tobytes())
        decode(buffer.getvalue(), max_pixels)


def _limit(memory_bytes: int) -> None:
    for what, value in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_NOFILE, 3),
    ):
        resource.setrlimit(what, (value, value))
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))


def main(cpu_seconds: float, memory_bytes: int, max_pixels: int) -> None:
    """Serve requests until stdin ends."""
    source, out = sys.stdin.buffer, sys.stdout.buffer
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    warnings.simplefilter("error")
    Image.MAX_IMAGE_PIXELS = max_pixels
    _warm_up(max_pixels)
    _limit(memory_bytes)
    _say(Status.READY, out)
    while len(prefix := source.read(REQUEST.size)) == REQUEST.size:
        (length,) = REQUEST.unpack(prefix)
        data = source.read(length)
        if len(data) < length:
            return
        _serve_one(data, out, cpu_seconds, max_pixels)


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
