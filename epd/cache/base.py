"""What the token cache stores, how an entry looks in bytes, and what every backend promises."""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["HEADER_BYTES", "CacheStats", "CachedTokens", "TokenCache", "pack_entry", "unpack_entry"]

_DTYPES = {"float32": (1, 4), "float16": (2, 2), "bfloat16": (3, 2)}  # name: (code, bytes each)
_NAMES = {code: name for name, (code, _) in _DTYPES.items()}

# magic, version, dtype code, reserved (zero), rows, columns; then the digest, then the payload
_FIELDS = struct.Struct("<4sBBHII")
_MAGIC, _VERSION = b"EPDT", 1
_DIGEST_BYTES = 32
HEADER_BYTES = _FIELDS.size + _DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """The vision tokens of one image: `shape` is [tokens, hidden], `data` row-major little-endian.

    Raises `ValueError` for a dtype outside float32, float16, bfloat16 or a wrong number of bytes.
    """

    dtype: str
    shape: tuple[int, int]
    data: bytes | memoryview

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"vision tokens are {', '.join(_DTYPES)}, not {self.dtype[:32]!r}")
        rows, columns = self.shape
        if not (0 <= rows < 2**32 and 0 <= columns < 2**32):
            raise ValueError("the shape of vision tokens is out of range")
        if self.num_bytes != rows * columns * _DTYPES[self.dtype][1]:
            raise ValueError("the bytes of vision tokens do not match their shape and dtype")

    @property
    def num_bytes(self) -> int:
        """The payload size in bytes."""
        return memoryview(self.data).nbytes


@dataclass(slots=True)
class CacheStats:
    """Counters of one token cache client since it was opened, and its present state.

    `rejected` entries were too large, `dropped` ones met a full queue or a backend that is down;
    `damaged` values were found wrong on reading (each is a miss as well). `shared` counts callers
    that joined a computation of their own process, `claims_waited` those that waited for another.
    """

    hits: int = 0
    misses: int = 0
    damaged: int = 0
    errors: int = 0
    rejected: int = 0
    dropped: int = 0
    stored_bytes: int = 0
    claims_won: int = 0
    claims_waited: int = 0
    shared: int = 0
    pending_bytes: int = 0
    breaker: str = "closed"


class TokenCache(Protocol):
    """A store of vision tokens that may forget anything at any time and never fails.

    Trouble in the backend is a miss: no method but the constructor raises because of it. `counters`
    are live; `stats` returns a copy.
    """

    counters: CacheStats

    async def get(self, key: str) -> CachedTokens | None:
        """The value of `key` after its digest was checked; None on a miss."""

    async def contains(self, keys: Sequence[str]) -> list[bool]:
        """Whether each key has a value, in one round trip. A hint: `get` may still miss."""

    def put(self, key: str, value: CachedTokens) -> None:
        """Queue a write and return at once; drops and counts what does not fit the queue."""

    async def store(self, key: str, value: CachedTokens) -> bool:
        """Write now; true once every process can see the value."""

    async def claim(self, key: str, ttl: float) -> bool:
        """True when the caller should compute `key`: the claim is won, or nobody can be asked."""

    async def renew(self, key: str, ttl: float) -> None:
        """Let our own claim live for another `ttl` seconds."""

    async def unclaim(self, key: str) -> None:
        """Give back our own claim; a claim of another owner stays."""

    async def flush(self) -> None:
        """Return once every write queued so far was tried."""

    def stats(self) -> CacheStats:
        """A copy of the counters."""

    async def close(self) -> None:
        """Flush within a bound, then release connections and tasks. Idempotent."""


def pack_entry(key: str, value: CachedTokens) -> bytes:
    """The bytes stored under `key`: header, digest bound to the key, payload."""
    fields = _FIELDS.pack(_MAGIC, _VERSION, _DTYPES[value.dtype][0], 0, *value.shape)
    return b"".join((fields, _digest(key, fields, value.data), value.data))


def unpack_entry(key: str, entry: bytes) -> CachedTokens | None:
    """The tokens in `entry` (a view, not a copy); None unless every bit is what `key` stored."""
    if len(entry) < HEADER_BYTES:
        return None
    view = memoryview(entry)
    fields, payload = view[: _FIELDS.size], view[HEADER_BYTES:]
    if view[_FIELDS.size : HEADER_BYTES] != _digest(key, fields, payload):
        return None
    magic, version, code, reserved, rows, columns = _FIELDS.unpack(fields)
    if (magic, version, reserved) != (_MAGIC, _VERSION, 0) or code not in _NAMES:
        return None
    try:
        return CachedTokens(_NAMES[code], (rows, columns), payload)
    except ValueError:
        return None


def _digest(key: str, fields: bytes | memoryview, payload: bytes | memoryview) -> bytes:
    name = key.encode()
    state = hashlib.sha256(b"epd-entry-1" + len(name).to_bytes(8, "little") + name)
    state.update(fields)
    state.update(payload)
    return state.digest()
