"""Content keys: they name everything a cached value depends on, in full 256-bit digests.

Every field enters the digest with its length in front, so no two different field lists can
produce the same bytes (30x100 and 100x30 pixels of the same bytes are two images).
"""

from __future__ import annotations

import hashlib

from epd.errors import MediaError

__all__ = ["pixel_digest", "token_cache_key"]

_BYTES_PER_PIXEL = 3


def pixel_digest(width: int, height: int, rgb: bytes | memoryview) -> str:
    """The `mm_hash` of canonical 8-bit RGB pixels, row-major: 64 hexadecimal digits.

    Raises `MediaError` when the bytes are not exactly `width * height` pixels.
    """
    pixels = memoryview(rgb).cast("B")
    if width < 1 or height < 1 or len(pixels) != width * height * _BYTES_PER_PIXEL:
        raise MediaError("the pixel bytes do not match the image's width and height")
    return _digest(b"epd-pixels-1", b"RGB8", str(width).encode(), str(height).encode(), pixels)


def token_cache_key(
    *, mm_hash: str, encoder_revision: str, pruner_fingerprint: str, dtype: str, salt: str
) -> str:
    """The token cache key of one image's vision tokens: 64 hexadecimal digits.

    `salt` keeps tenants apart: with another salt the same image has another key, so nobody can
    find out by timing what someone else has sent.
    """
    fields = (mm_hash, encoder_revision, pruner_fingerprint, dtype, salt)
    return _digest(b"epd-tokens-1", *(field.encode() for field in fields))


def _digest(*fields: bytes | memoryview) -> str:
    state = hashlib.sha256()
    for field in fields:
        state.update(len(field).to_bytes(8, "little"))
        state.update(field)
    return state.hexdigest()
