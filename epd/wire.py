"""Frames on the wire: `[tag, header, *buffers]`, plus a keyed MAC as the last frame when a key is
set.

The header is MessagePack: who speaks, in which epoch, to whom, the shapes of the buffers, and the
message itself. Nothing is trusted before it is checked: part count, frame sizes, MAC, header
types, addressee, message schema, and that dtype and shape of each buffer account for every byte of
it. All failures are one error, `WireError`.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import msgspec
from msgspec import Meta

from epd.errors import WireError
from epd.messages import MESSAGES, Message

__all__ = ["DTYPE_BYTES", "Blob", "Codec", "Envelope", "Frame", "Incoming", "WireLimits"]

Frame = bytes | memoryview

DTYPE_BYTES = {
    "uint8": 1,
    "int8": 1,
    "float8_e4m3fn": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "int32": 4,
    "int64": 8,
}
_MAC_BYTES = 32
_Int63 = Annotated[int, Meta(ge=0, le=(1 << 63) - 1)]
_Name = Annotated[str, Meta(min_length=1, max_length=128)]


@dataclass(frozen=True, slots=True)
class WireLimits:
    """The largest message a node accepts: the KV of a long prompt, one frame a layer."""

    frame_bytes: int = 1 << 30
    message_bytes: int = 16 << 30
    header_bytes: int = 8 << 20
    buffers: int = 256


@dataclass(frozen=True, slots=True)
class Blob:
    """A tensor as bytes: dtype name, shape, row-major data."""

    dtype: str
    shape: tuple[int, ...]
    data: Frame


class BlobMeta(msgspec.Struct, frozen=True, array_like=True):
    """Shape of one buffer."""

    dtype: str
    shape: Annotated[list[Annotated[int, Meta(ge=0, lt=1 << 40)]], Meta(max_length=8)]


class Envelope(msgspec.Struct, frozen=True, array_like=True):
    """Who speaks and to whom.

    `incarnation` tells the lives of one worker apart, `seq` rises within a life.
    """

    sender: _Name
    incarnation: _Int63
    epoch: _Int63
    stages: Annotated[str, Meta(max_length=3)]
    to: _Name
    seq: _Int63


class _Header(msgspec.Struct, frozen=True, array_like=True):
    envelope: Envelope
    blobs: list[BlobMeta]
    body: msgspec.Raw


@dataclass(frozen=True, slots=True)
class Incoming:
    """One received message with its checked buffers."""

    envelope: Envelope
    message: Message
    blobs: tuple[Blob, ...]


class Codec:
    """Encodes and decodes messages; one instance per thread. With a key every message carries a
    MAC.
    """

    def __init__(self, key: bytes | None = None, limits: WireLimits | None = None) -> None:
        if key is not None and not 16 <= len(key) <= 64:
            raise WireError("a wire key has 16 to 64 bytes")
        self._key = key
        self.limits = limits or WireLimits()
        self._encoder = msgspec.msgpack.Encoder()
        self._header = msgspec.msgpack.Decoder(_Header)
        self._bodies = {tag: msgspec.msgpack.Decoder(cls) for tag, cls in MESSAGES.items()}

    @property
    def keyed(self) -> bool:
        """Whether messages carry a MAC."""
        return self._key is not None

    def encode(
        self, envelope: Envelope, message: Message, blobs: Sequence[Blob] = ()
    ) -> list[Frame]:
        """The frames of a message; buffers are passed on, not copied."""
        tag = type(message).__name__.encode()
        metas = [BlobMeta(blob.dtype, list(blob.shape)) for blob in blobs]
        body = msgspec.Raw(self._encoder.encode(message))
        header = self._encoder.encode(_Header(envelope, metas, body))
        frames: list[Frame] = [tag, header, *(blob.data for blob in blobs)]
        self._check_sizes(frames)
        if self._key is not None:
            frames.append(self._mac(frames))
        return frames

    def decode(self, frames: Sequence[Frame], to: str) -> Incoming:
        """The message in `frames`, addressed to `to`. Raises `WireError` for anything else."""
        frames = self._authenticate(list(frames))
        self._check_sizes(frames)
        body_decoder = self._bodies.get(bytes(frames[0]))
        if body_decoder is None:
            raise WireError("unknown tag")
        try:
            header = self._header.decode(frames[1])
            if header.envelope.to != to:
                raise WireError("addressed to another node")
            pairs = zip(header.blobs, frames[2:], strict=True)
            blobs = tuple(_checked_blob(meta, frame) for meta, frame in pairs)
            return Incoming(header.envelope, body_decoder.decode(header.body), blobs)
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:
            raise WireError(f"malformed header ({type(error).__name__})") from None

    def _authenticate(self, frames: list[Frame]) -> list[Frame]:
        if len(frames) > self.limits.buffers + 3:
            raise WireError("too many parts")
        if self._key is not None:
            mac = frames.pop() if frames else b""
            if not hmac.compare_digest(bytes(mac[: _MAC_BYTES + 1]), self._mac(frames)):
                raise WireError("bad authentication")
        return frames

    def _check_sizes(self, frames: Sequence[Frame]) -> None:
        if not 2 <= len(frames) <= self.limits.buffers + 2:
            raise WireError("wrong number of parts")
        sizes = [_nbytes(frame) for frame in frames]
        if sizes[0] > 64 or sizes[1] > self.limits.header_bytes:
            raise WireError("oversized header")
        if max(sizes) > self.limits.frame_bytes or sum(sizes) > self.limits.message_bytes:
            raise WireError("oversized message")

    def _mac(self, frames: Sequence[Frame]) -> bytes:
        mac = hashlib.blake2b(key=self._key or b"", digest_size=_MAC_BYTES)
        for frame in frames:
            mac.update(_nbytes(frame).to_bytes(8, "little"))
            mac.update(frame)
        return mac.digest()


def _checked_blob(meta: BlobMeta, frame: Frame) -> Blob:
    itemsize = DTYPE_BYTES.get(meta.dtype)
    if itemsize is None:
        raise WireError("unknown dtype")
    if math.prod(meta.shape) * itemsize != _nbytes(frame):
        raise WireError("shape and bytes disagree")
    return Blob(meta.dtype, tuple(meta.shape), frame)


def _nbytes(frame: Frame) -> int:
    return frame.nbytes if isinstance(frame, memoryview) else len(frame)
