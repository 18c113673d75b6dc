"""What the token cache stores, how an entry looks in bytes, and what every backend promises."""

from __future__ import annotations

import hashlib
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["HEADER_BYTES", "CacheStats", "CachedTokens", "TokenCache", "pack_entry", "unpack_entry"]

_DTYPES = {"float32": (1, 4), "float16": (2, 2), "bfloat16": (3, 2)}  # name: (code, bytes each)
_BESIDE = _DTYPES | {"int32": (4, 4)}
_NAMES = {code: name for name, (code, _) in _BESIDE.items()}

# magic, version, dtype code, number of tensors beside, rows, columns; then the digest; then for
# each tensor beside dtype code, dimensions (1 or 2), rows, columns; then the payload
_FIELDS = struct.Struct("<4sBBHII")
_BESIDE_FIELDS = struct.Struct("<BBII")
_MAGIC, _VERSION = b"EPDT", 2
_MOST_BESIDE = 16
_DIGEST_BYTES = 32
HEADER_BYTES = _FIELDS.size + _DIGEST_BYTES


@dataclass(frozen=True, slots=True)
class CachedTokens:
    """The vision tokens of one image: `shape` is [tokens, hidden], `data` row-major little-endian.

    `beside` names dtype and shape, of one or two dimensions, of what pruning needs beside them;
    those tensors follow the tokens in `data`. Raises `ValueError` for a dtype outside float32,
    float16, bfloat16 (beside also int32) or a wrong number of bytes.
    """

    dtype: str
    shape: tuple[int, int]
    data: bytes | memoryview
    beside: tuple[tuple[str, tuple[int, ...]], ...] = ()

    def __post_init__(self) -> None:
        if self.dtype not in _DTYPES:
            raise ValueError(f"vision tokens are {', '.join(_DTYPES)}, not {self.dtype[:32]!r}")
        if len(self.beside) > _MOST_BESIDE or any(d not in _BESIDE for d, _ in self.beside):
            raise ValueError("vision tokens have something beside them that cannot be")
        if len(self.shape) != 2 or any(not 1 <= len(s) <= 2 for _, s in self.beside):
            raise ValueError("the shape of vision tokens is out of range")
        if not all(0 <= size < 2**32 for _, shape in self._layout for size in shape):
            raise ValueError("the shape of vision tokens is out of range")
        if self.num_bytes != sum(self._sizes):
            raise ValueError("the bytes of vision tokens do not match their shape and dtype")

    @property
    def _layout(self) -> list[tuple[str, tuple[int, ...]]]:
        return [(self.dtype, self.shape), *self.beside]

    @property
    def _sizes(self) -> list[int]:
        return [math.prod(shape) * _BESIDE[dtype][1] for dtype, shape in self._layout]

    @property
    def tensors(self) -> list[tuple[str, tuple[int, ...], memoryview]]:
        """Dtype, shape and bytes of the tokens and of every tensor beside them; views."""
        view, start = memoryview(self.data).cast("B"), 0
        parts = []
        for (dtype, shape), size in zip(self._layout, self._sizes, strict=True):
            parts.append((dtype, shape, view[start : start + size]))
            start += size
        return parts

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

    async def count(self, *, clear: bool = False) -> int | None:
        """How many values there are, forgetting each of them if `clear`; None when nobody answers.

        For operators: the time grows with the number of values.
        """

    def stats(self) -> CacheStats:
        """A copy of the counters."""

    async def close(self) -> None:
        """Flush within a bound, then release connections and tasks. Idempotent."""


def pack_entry(key: str, value: CachedTokens) -> bytes:
    """The bytes stored under `key`: header, digest bound to the key, payload."""
    code, count = _DTYPES[value.dtype][0], len(value.beside)
    fields = _FIELDS.pack(_MAGIC, _VERSION, code, count, *value.shape)
    table = b"".join(
        _BESIDE_FIELDS.pack(_BESIDE[dtype][0], len(shape), shape[0], (*shape, 0)[1])
        for dtype, shape in value.beside
    )
    return b"".join((fields, _digest(key, fields, table, value.data), table, value.data))


def unpack_entry(key: str, entry: bytes) -> CachedTokens | None:
    """The tokens in `entry` (a view, not a copy); None unless every bit is what `key` stored."""
    if len(entry) < HEADER_BYTES:
        return None
    view = memoryview(entry)
    fields, payload = view[: _FIELDS.size], view[HEADER_BYTES:]
    if view[_FIELDS.size : HEADER_BYTES] != _digest(key, fields, payload):
        return None
    magic, version, code, count, rows, columns = _FIELDS.unpack(fields)
    if (magic, version) != (_MAGIC, _VERSION) or count > _MOST_BESIDE:
        return None
    table, data = payload[: count * _BESIDE_FIELDS.size], payload[count * _BESIDE_FIELDS.size :]
    try:
        beside = tuple(_described(*item) for item in _BESIDE_FIELDS.iter_unpack(table))
        return CachedTokens(_NAMES[code], (rows, columns), data, beside)
    except (ValueError, KeyError, struct.error):
        return None


def _described(code: int, dimensions: int, rows: int, columns: int) -> tuple[str, tuple[int, ...]]:
    if dimensions == 1 and columns == 0:
        return _NAMES[code], (rows,)
    if dimensions == 2:
        return _NAMES[code], (rows, columns)
    raise ValueError("a tensor beside has one or two dimensions")


def _digest(key: str, *parts: bytes | memoryview) -> bytes:
    name = key.encode()
    state = hashlib.sha256(b"epd-entry-2" + len(name).to_bytes(8, "little") + name)
    for part in parts:
        state.update(part)
    return state.digest()
