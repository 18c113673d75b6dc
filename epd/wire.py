"""Frames on the wire: `[tag, header, *buffers]`, plus a seal as the last frame when a key is set.

The seal is a version, a keyed MAC, and a digest of each buffer; the MAC covers tag, header and
digests. So the buffers, which may take seconds, are digested and checked apart from the rest.

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
from dataclasses import dataclass, replace
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
_SEAL_VERSION = b"\x02"
_MAC_BYTES = _DIGEST_BYTES = 32
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
    """A tensor as bytes: dtype name, shape, row-major data.

    `digest` is that of the data: computed by `Codec.digested`, or what a seal says it is.
    """

    dtype: str
    shape: tuple[int, ...]
    data: Frame
    digest: bytes | None = None


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
    """One received message with its buffers."""

    envelope: Envelope
    message: Message
    blobs: tuple[Blob, ...]


class Codec:
    """Encodes and decodes messages. With a key every message carries a MAC.

    One instance per thread, but `digested` and `check` may run in any.
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

    def digested(self, blobs: Sequence[Blob]) -> list[Blob]:
        """The blobs as `encode` needs them: with a key each carries its digest.

        A second for every gigabyte or so, without the lock of the interpreter.
        """
        if self._key is None:
            return list(blobs)
        return [blob if blob.digest else replace(blob, digest=_digest(blob.data)) for blob in blobs]

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
            digests = [blob.digest or b"" for blob in self.digested(blobs)]
            mac = self._mac(tag, header, digests)
            frames.append(b"".join((_SEAL_VERSION, mac, *digests)))
        return frames

    def decode(self, frames: Sequence[Frame], to: str) -> Incoming:
        """The message in `frames`, addressed to `to`. Raises `WireError` for anything else."""
        incoming = self.open(frames, to)
        self.check(incoming.blobs)
        return incoming

    def open(self, frames: Sequence[Frame], to: str) -> Incoming:
        """As `decode`, but the data of the buffers counts only after `check`."""
        frames, digests = self._authenticate(list(frames))
        self._check_sizes(frames)
        body_decoder = self._bodies.get(bytes(frames[0]))
        if body_decoder is None:
            raise WireError("unknown tag")
        try:
            header = self._header.decode(frames[1])
            if header.envelope.to != to:
                raise WireError("addressed to another node")
            parts = zip(header.blobs, frames[2:], digests, strict=True)
            blobs = tuple(_checked_blob(*part) for part in parts)
            return Incoming(header.envelope, body_decoder.decode(header.body), blobs)
        except (ValueError, msgspec.MsgspecError, RecursionError) as error:
            raise WireError(f"malformed header ({type(error).__name__})") from None

    def check(self, blobs: Sequence[Blob]) -> None:
        """Raise `WireError` unless each buffer is what was sent. Takes as long as `digested`."""
        if self._key is None:
            return
        for blob in blobs:
            if not hmac.compare_digest(blob.digest or b"", _digest(blob.data)):
                raise WireError("bad authentication")

    def _authenticate(self, frames: list[Frame]) -> tuple[list[Frame], Sequence[bytes | None]]:
        """The frames without their seal, and the digest of each buffer."""
        if len(frames) > self.limits.buffers + 3:
            raise WireError("too many parts")
        if self._key is None:
            return frames, [None] * max(0, len(frames) - 2)
        if len(frames) < 3:
            raise WireError("wrong number of parts")
        seal, buffers = frames.pop(), len(frames) - 2
        if _nbytes(seal) != 1 + _MAC_BYTES + buffers * _DIGEST_BYTES or seal[:1] != _SEAL_VERSION:
            raise WireError("not sealed, or by another version of the wire")
        starts = range(1 + _MAC_BYTES, _nbytes(seal), _DIGEST_BYTES)
        digests = [bytes(seal[at : at + _DIGEST_BYTES]) for at in starts]
        mac = self._mac(frames[0], frames[1], digests)
        if not hmac.compare_digest(bytes(seal[1 : 1 + _MAC_BYTES]), mac):
            raise WireError("bad authentication")
        return frames, digests

    def _check_sizes(self, frames: Sequence[Frame]) -> None:
        if not 2 <= len(frames) <= self.limits.buffers + 2:
            raise WireError("wrong number of parts")
        sizes = [_nbytes(frame) for frame in frames]
        if sizes[0] > 64 or sizes[1] > self.limits.header_bytes:
            raise WireError("oversized header")
        if max(sizes) > self.limits.frame_bytes or sum(sizes) > self.limits.message_bytes:
            raise WireError("oversized message")

    def _mac(self, tag: Frame, header: Frame, digests: Sequence[bytes]) -> bytes:
        mac = hashlib.blake2b(key=self._key or b"", digest_size=_MAC_BYTES, person=b"epd-wire-2")
        for frame in (tag, header, *digests):
            mac.update(_nbytes(frame).to_bytes(8, "little"))
            mac.update(frame)
        return mac.digest()


def _digest(data: Frame) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST_BYTES).digest()


def _checked_blob(meta: BlobMeta, frame: Frame, digest: bytes | None) -> Blob:
    itemsize = DTYPE_BYTES.get(meta.dtype)
    if itemsize is None:
        raise WireError("unknown dtype")
    if math.prod(meta.shape) * itemsize != _nbytes(frame):
        raise WireError("shape and bytes disagree")
    return Blob(meta.dtype, tuple(meta.shape), frame, digest)


def _nbytes(frame: Frame) -> int:
    return frame.nbytes if isinstance(frame, memoryview) else len(frame)
