"""The token cache inside one process: an LRU bounded in bytes, with a time to live."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import replace
from typing import TYPE_CHECKING

from epd.cache.base import HEADER_BYTES, CachedTokens, CacheStats

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

__all__ = ["MemoryCache"]


class MemoryCache:
    """A `TokenCache` that keeps entries in this process; also the fake of the Redis backend.

    `max_bytes` bounds the sum of all entries, `max_entry_bytes` one entry, `ttl` its age in
    seconds on `clock`. Claims belong to this object: they order callers that share it.
    """

    def __init__(
        self,
        *,
        max_bytes: int = 256 << 20,
        max_entry_bytes: int = 32 << 20,
        ttl: float = 3600.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes = max_bytes
        self._max_entry_bytes = min(max_entry_bytes, max_bytes)
        self._ttl = ttl
        self._clock = clock
        self._entries: OrderedDict[str, tuple[CachedTokens, float]] = OrderedDict()
        self._claims: dict[str, float] = {}
        self.held_bytes = 0
        self.counters = CacheStats()

    async def get(self, key: str) -> CachedTokens | None:
        """The value of `key`, now the most recently used; None on a miss."""
        if not self._alive(key):
            self.counters.misses += 1
            return None
        self._entries.move_to_end(key)
        self.counters.hits += 1
        return self._entries[key][0]

    async def contains(self, keys: Sequence[str]) -> list[bool]:
        """Whether each key has a value; does not count as use."""
        return [self._alive(key) for key in keys]

    def put(self, key: str, value: CachedTokens) -> None:
        """Keep a copy of `value`, forgetting the least recently used entries to make room."""
        size = _size(value)
        if size > self._max_entry_bytes:
            self.counters.rejected += 1
            return
        self._forget(key)
        # the caller may reuse its buffer
        kept = replace(value, data=bytes(value.data))
        self._entries[key] = (kept, self._clock() + self._ttl)
        self.held_bytes += size
        self.counters.stored_bytes += size
        while self.held_bytes > self._max_bytes:
            self._forget(next(iter(self._entries)))

    async def store(self, key: str, value: CachedTokens) -> bool:
        """Like `put`; true when the value was kept."""
        self.put(key, value)
        return key in self._entries

    async def claim(self, key: str, ttl: float) -> bool:
        """True when no live claim on `key` exists; it then is ours for `ttl` seconds."""
        now = self._clock()
        if self._claims.get(key, now) > now:
            return False
        self._claims[key] = now + ttl
        self.counters.claims_won += 1
        return True

    async def renew(self, key: str, ttl: float) -> None:
        """Let a claim that still stands live for another `ttl` seconds."""
        if key in self._claims:
            self._claims[key] = self._clock() + ttl

    async def unclaim(self, key: str) -> None:
        """Give back the claim. Idempotent."""
        self._claims.pop(key, None)

    async def flush(self) -> None:
        """Return at once: every write has happened."""

    async def count(self, *, clear: bool = False) -> int | None:
        """How many values are held."""
        held = [key for key in list(self._entries) if self._alive(key)]
        for key in held if clear else ():
            self._forget(key)
        return len(held)

    def stats(self) -> CacheStats:
        """A copy of the counters."""
        return replace(self.counters)

    async def close(self) -> None:
        """Forget everything."""
        self._entries.clear()
        self._claims.clear()
        self.held_bytes = 0

    def _alive(self, key: str) -> bool:
        entry = self._entries.get(key)
        if entry is not None and entry[1] <= self._clock():
            self._forget(key)
            return False
        return entry is not None

    def _forget(self, key: str) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self.held_bytes -= _size(entry[0])


def _size(value: CachedTokens) -> int:
    return HEADER_BYTES + value.num_bytes
