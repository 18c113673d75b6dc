"""The token cache in Redis or Valkey, shared by every process that knows the URL.

A call costs at most `timeout` seconds, and after one timeout or three errors the breaker makes
every call a miss at no cost until a background probe finds the server well again. Only a write
that takes too long counts as a mere error, because nobody waits for it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from redis.exceptions import ResponseError, WatchError
from redis.exceptions import TimeoutError as RedisTimeoutError

from epd.cache.base import HEADER_BYTES, CachedTokens, CacheStats, pack_entry, unpack_entry
from epd.cache.breaker import Breaker
from epd.cache.replies import bytes_reply, int_reply
from epd.cache.sweep import sweep

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

__all__ = ["RedisCache", "RedisClient"]

_LOG = logging.getLogger(__name__)
_T = TypeVar("_T")

# one event loop moves some 500 MB/s: more or larger transfers at once would time each other out
_CONCURRENCY, _LARGE_CONCURRENCY = 4, 2
_HEAD_BYTES, _CHUNK_BYTES = 256 << 10, 2 << 20
_OFF_LOOP_BYTES = 1 << 20  # hashing more than this would hold up the event loop for over 1 ms
_CLOSE_SECONDS = 1.0
_UNUSABLE = b"unusable"  # shorter than a header, so it never passes for an entry


class RedisClient(Protocol):
    """The three calls used of `redis.asyncio.Redis`."""

    def execute_command(self, *args: Any) -> Awaitable[Any]: ...
    def pipeline(self, transaction: bool) -> Any: ...
    async def aclose(self) -> None: ...


class RedisCache:
    """A `TokenCache` over one Redis or Valkey server. Needs a running event loop to be used.

    Entries live `ttl` seconds; the server's own memory limit bounds their sum. Larger ones than
    `max_entry_bytes` are neither written nor read. The write-behind queue holds at most
    `queue_entries` and `queue_bytes`; what waits there already answers `get` in this process.
    """

    def __init__(
        self,
        client: RedisClient,
        *,
        ttl: float = 3600.0,
        max_entry_bytes: int = 32 << 20,
        queue_entries: int = 256,
        queue_bytes: int = 64 << 20,
        timeout: float = 0.2,
        breaker: Breaker | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
        prefix: str = "epd:",
    ) -> None:
        self._client = client
        self._ttl_ms = max(1, round(ttl * 1000))
        self._max_entry_bytes = max_entry_bytes
        self._queue_limits = (queue_entries, queue_bytes)
        self._timeout = timeout
        self._breaker = breaker or Breaker()
        self._sleep = sleep
        self._prefix = prefix
        self._owner = secrets.token_hex(16).encode()
        self._draft_name = f"{prefix}draft:{secrets.token_hex(16)}"
        self._slots = asyncio.Semaphore(_CONCURRENCY)
        self._large_slots = asyncio.Semaphore(_LARGE_CONCURRENCY)
        self._writing = asyncio.Lock()
        self._queue: dict[str, CachedTokens] = {}
        self._drained = asyncio.Event()
        self._drained.set()
        self._writer: asyncio.Task[None] | None = None
        self._prober: asyncio.Task[None] | None = None
        self._accepts = True
        self._closed = False
        self.counters = CacheStats()

    async def get(self, key: str) -> CachedTokens | None:
        """The checked value of `key`. A damaged one is a miss, counted and deleted."""
        value = self._queue.get(key)
        if value is None:
            value = await self._fetch(key)
        if value is None:
            self.counters.misses += 1
        else:
            self.counters.hits += 1
        return value

    async def contains(self, keys: Sequence[str]) -> list[bool]:
        """Whether each key has a value, in one round trip; all false when nobody can be asked."""

        async def ask() -> list[bool]:
            pipe = self._client.pipeline(transaction=False)
            for key in keys:
                pipe.execute_command("EXISTS", self._value_name(key))
            return [reply == 1 for _, reply in zip(keys, await pipe.execute(), strict=True)]

        found = await self._call(ask, [False] * len(keys)) if keys else []
        return [there or key in self._queue for key, there in zip(keys, found, strict=True)]

    def put(self, key: str, value: CachedTokens) -> None:
        """Queue a write and return at once; full queue or open breaker: dropped and counted."""
        if self._too_large(value) or key in self._queue:
            return
        entries, size = self._queue_limits
        full = len(self._queue) >= entries or self.counters.pending_bytes + value.num_bytes > size
        if full or not self._accepts or not self._breaker.admits():
            self.counters.dropped += 1
            return
        self._queue[key] = value
        self.counters.pending_bytes += value.num_bytes
        self._drained.clear()
        if self._writer is None or self._writer.done():
            self._writer = asyncio.get_running_loop().create_task(self._write_behind())

    async def store(self, key: str, value: CachedTokens) -> bool:
        """Write now; true when the server has confirmed it."""
        if self._too_large(value):
            return False
        entry = await _off_loop(value.num_bytes, lambda: pack_entry(key, value))
        async with self._writing:
            stored = await self._write(self._value_name(key), entry)
        self.counters.dropped += not stored
        self.counters.stored_bytes += len(entry) * stored
        return stored

    async def claim(self, key: str, ttl: float) -> bool:
        """True when the claim is won, and when the server cannot be asked: then everybody computes.

        A claim without an expiry is not ours (each of ours has one), so it is removed.
        """
        name, ttl_ms = self._claim_name(key), _milliseconds(ttl)

        async def ask() -> bool:
            pipe = self._client.pipeline(transaction=False)
            pipe.execute_command("SET", name, self._owner, "NX", "PX", ttl_ms)
            pipe.execute_command("PTTL", name)
            won, left = await pipe.execute()
            if left == -1:
                await self._client.execute_command("UNLINK", name)
            self.counters.claims_won += bool(won)
            return bool(won)

        return await self._call(ask, True)

    async def renew(self, key: str, ttl: float) -> None:
        """Let our own claim live for another `ttl` seconds."""
        await self._if_owner(key, "PEXPIRE", _milliseconds(ttl))

    async def unclaim(self, key: str) -> None:
        """Delete the claim if it is still our own."""
        await self._if_owner(key, "UNLINK")

    async def flush(self) -> None:
        """Return once the queue is empty: each write succeeded or was dropped in bounded time."""
        await self._drained.wait()

    async def count(self, *, clear: bool = False) -> int | None:
        """How many values the server holds for us; see the protocol."""
        return await sweep(self._run, f"{self._prefix}tokens:*", remove=clear)

    def stats(self) -> CacheStats:
        """A copy of the counters, with the breaker's state."""
        return replace(self.counters, breaker=self._breaker.state.value)

    async def close(self) -> None:
        """Flush for up to a second, then stop the tasks and close the connections."""
        self._accepts = False
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self.flush()
        self._closed = True
        tasks = [task for task in (self._writer, self._prober) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.counters.dropped += len(self._queue)
        self.counters.pending_bytes = 0
        self._queue.clear()
        self._drained.set()
        with suppress(Exception):
            async with asyncio.timeout(self._timeout):
                await self._client.aclose()

    async def _call(
        self,
        operation: Callable[[], Awaitable[_T]],
        default: _T,
        *,
        on_timeout: Callable[[], None] | None = None,
    ) -> _T:
        """The operation's result, or `default` at once when the server is not well."""
        async with self._slots:
            if self._closed or not self._breaker.admits():
                return default
            try:
                async with asyncio.timeout(self._timeout):
                    result = await operation()
            except (TimeoutError, RedisTimeoutError):
                self._failed(on_timeout or self._breaker.timeout)
            except ResponseError:
                # the server is alive and refused this one command
                self.counters.errors += 1
            except Exception:
                # whatever a broken server makes the client raise, it is no more than a miss
                self._failed(self._breaker.error)
            else:
                self._breaker.success()
                return result
            return default

    def _failed(self, report: Callable[[], None]) -> None:
        self.counters.errors += 1
        report()
        idle = self._prober is None or self._prober.done()
        if idle and not self._breaker.admits() and not self._closed:
            _LOG.warning("token cache server does not answer; continuing without it")
            self._prober = asyncio.get_running_loop().create_task(self._probe())

    async def _probe(self) -> None:
        """Ping in the background until the breaker closes, so that no request waits for it."""
        while not self._breaker.admits():
            await self._sleep(self._breaker.remaining())
            if self._breaker.probe():
                self._breaker.settle(await self._ping())
        _LOG.info("token cache server answers again")

    async def _ping(self) -> bool:
        try:
            async with asyncio.timeout(self._timeout):
                await self._client.execute_command("PING")
        except Exception:
            return False
        return True

    async def _write(self, name: str, entry: bytes) -> bool:
        """Write in chunks that each fit the timeout; a large value appears whole, by renaming."""
        large = len(entry) > _CHUNK_BYTES
        target = self._draft_name if large else name
        sent = await self._send("SET", target, entry[:_CHUNK_BYTES], "PX", self._ttl_ms)
        for start in range(_CHUNK_BYTES, len(entry), _CHUNK_BYTES):
            part = entry[start : start + _CHUNK_BYTES]
            sent = sent and await self._send("APPEND", target, part)
        return sent and (not large or await self._send("RENAME", target, name))

    async def _run(self, *command: str | bytes | int) -> Any:
        return await self._call(partial(self._client.execute_command, *command), None)

    async def _send(self, *command: str | bytes | int) -> bool:
        call = partial(self._client.execute_command, *command)
        return bool(await self._call(call, None, on_timeout=self._breaker.error))

    async def _fetch(self, key: str) -> CachedTokens | None:
        name = self._value_name(key)
        length, head = await self._call(lambda: self._head(name), (0, b""))
        if length <= len(head):
            return await self._unpack(key, [head]) if head else None
        async with self._large_slots:
            parts = [head]
            for start in range(_HEAD_BYTES, length, _CHUNK_BYTES):
                part = await self._call(partial(self._range, name, start), b"")
                if not part:
                    return None
                parts.append(part)
            return await self._unpack(key, parts)

    async def _head(self, name: str) -> tuple[int, bytes]:
        """The length and the first bytes of what is stored, in one round trip."""
        pipe = self._client.pipeline(transaction=False)
        pipe.execute_command("STRLEN", name)
        pipe.execute_command("GETRANGE", name, 0, _HEAD_BYTES - 1)
        length, head = await pipe.execute(raise_on_error=False)
        if isinstance(length, ResponseError):
            if not str(length).startswith("WRONGTYPE"):
                raise length
            return 0, _UNUSABLE
        # what someone else left under our key may be of any size
        fits = int_reply(length) <= self._max_entry_bytes
        return (length, bytes_reply(head)) if fits else (0, _UNUSABLE)

    async def _range(self, name: str, start: int) -> bytes:
        span = (start, start + _CHUNK_BYTES - 1)
        return bytes_reply(await self._client.execute_command("GETRANGE", name, *span))

    async def _unpack(self, key: str, parts: list[bytes]) -> CachedTokens | None:
        size = sum(map(len, parts))
        value = await _off_loop(size, lambda: unpack_entry(key, b"".join(parts)))
        if value is None:
            self.counters.damaged += 1
            await self._run("UNLINK", self._value_name(key))
        return value

    async def _if_owner(self, key: str, command: str, *args: int) -> None:
        """Run `command` on the claim if it is ours; WATCH voids it if the claim changes between."""
        name = self._claim_name(key)

        async def compare_and_run() -> None:
            async with self._client.pipeline(transaction=True) as pipe:
                await pipe.watch(name)
                if await pipe.execute_command("GET", name) == self._owner:
                    pipe.multi()
                    pipe.execute_command(command, name, *args)
                    with suppress(WatchError):
                        await pipe.execute()

        await self._call(compare_and_run, None)

    async def _write_behind(self) -> None:
        while self._queue:
            key, value = next(iter(self._queue.items()))
            try:
                await self.store(key, value)
            finally:
                del self._queue[key]
                self.counters.pending_bytes -= value.num_bytes
        self._drained.set()

    def _too_large(self, value: CachedTokens) -> bool:
        too_large = HEADER_BYTES + value.num_bytes > self._max_entry_bytes
        self.counters.rejected += too_large
        return too_large

    def _value_name(self, key: str) -> str:
        return f"{self._prefix}tokens:{key}"

    def _claim_name(self, key: str) -> str:
        return f"{self._prefix}claim:{key}"


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


async def _off_loop(size: int, work: Callable[[], _T]) -> _T:
    return await asyncio.to_thread(work) if size > _OFF_LOOP_BYTES else work()
