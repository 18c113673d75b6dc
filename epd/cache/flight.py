"""Single flight: many callers ask for one key, one of them computes it, on any number of processes.

Within a process callers share a task. Between processes the task that wins the key's claim
computes; the others look for the value until it appears or the claim is free. The winner makes the
value visible before it gives the claim back, and looks once more after winning: the previous owner
may have finished in between. A claim is renewed while its owner lives and expires soon after it
died. Without a working backend everybody computes: right answers come before saved work.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from epd.cache.base import CachedTokens, TokenCache
from epd.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

__all__ = ["SingleFlight"]

_FIRST_PAUSE, _LONGEST_PAUSE = 0.005, 0.05
_CANCEL_AGAIN = 0.1


@dataclass(slots=True)
class _Flight:
    result: asyncio.Future[CachedTokens]
    task: asyncio.Task[None] | None = None
    waiters: int = 0


class SingleFlight:
    """Computes each missing key once. `claim_ttl` and `max_wait` are seconds.

    After `max_wait` a waiter computes by itself: a stuck owner elsewhere delays, never blocks.
    """

    def __init__(
        self,
        cache: TokenCache,
        *,
        claim_ttl: float = 5.0,
        max_wait: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._cache = cache
        self._claim_ttl = claim_ttl
        self._max_wait = max_wait
        self._clock = clock
        self._sleep = sleep
        self._flights: dict[str, _Flight] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def run(self, key: str, produce: Callable[[], Awaitable[CachedTokens]]) -> CachedTokens:
        """The value of `key` from the cache, from another caller, or from `produce`.

        What `produce` raises reaches every caller that shares it here. A cancelled caller leaves
        the others alone; when the last one leaves, the computation is cancelled.
        """
        flight = self._flights.get(key)
        if flight is None:
            flight = self._start(key, produce)
        else:
            self._cache.counters.shared += 1
        flight.waiters += 1
        try:
            return await asyncio.shield(flight.result)
        finally:
            flight.waiters -= 1
            if not flight.waiters and not flight.result.done():
                self._abandon(key, flight)

    async def close(self) -> None:
        """Cancel what still computes (its callers get `UnavailableError`) and finish the writes."""
        for key, flight in list(self._flights.items()):
            if not flight.result.done():
                self._abandon(key, flight)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _start(self, key: str, produce: Callable[[], Awaitable[CachedTokens]]) -> _Flight:
        loop = asyncio.get_running_loop()
        flight = self._flights[key] = _Flight(loop.create_future())
        flight.task = loop.create_task(self._fly(key, produce, flight.result))
        self._tasks.add(flight.task)
        flight.task.add_done_callback(lambda task: self._landed(key, flight, task))
        return flight

    def _abandon(self, key: str, flight: _Flight) -> None:
        # out of the table at once: nobody may board a flight that is being cancelled
        self._remove(key, flight)
        if flight.task is not None:
            flight.task.cancel()

    def _remove(self, key: str, flight: _Flight) -> None:
        if self._flights.get(key) is flight:
            del self._flights[key]

    def _landed(self, key: str, flight: _Flight, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._remove(key, flight)
        error = None if task.cancelled() else task.exception()
        if flight.result.done():
            return
        if flight.waiters:
            flight.result.set_exception(error or UnavailableError("the encode was cancelled"))
        else:
            flight.result.cancel()

    async def _fly(
        self,
        key: str,
        produce: Callable[[], Awaitable[CachedTokens]],
        result: asyncio.Future[CachedTokens],
    ) -> None:
        value = await self._cache.get(key)
        if value is not None:
            result.set_result(value)
            return
        async with self._turn(key) as value:
            if value is not None:
                result.set_result(value)
                return
            value = await produce()
            # the callers go on while the value is made visible to other processes
            result.set_result(value)
            await self._cache.store(key, value)

    @asynccontextmanager
    async def _turn(self, key: str) -> AsyncIterator[CachedTokens | None]:
        """Yields the value if another owner made it, else None: then it is our turn to compute."""
        renewal: asyncio.Task[None] | None = None
        try:
            if await self._wait_for_claim(key):
                renewal = asyncio.get_running_loop().create_task(self._renew(key))
            yield await self._look(key)
        finally:
            if renewal is not None:
                await _end(renewal)
            await self._cache.unclaim(key)

    async def _wait_for_claim(self, key: str) -> bool:
        """True when the claim is won, False when the value appeared or the wait was too long."""
        deadline, pause = self._clock() + self._max_wait, _FIRST_PAUSE
        while not await self._cache.claim(key, self._claim_ttl):
            if pause == _FIRST_PAUSE:
                self._cache.counters.claims_waited += 1
            if self._clock() >= deadline or (await self._cache.contains([key]))[0]:
                return False
            await self._sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return True

    async def _look(self, key: str) -> CachedTokens | None:
        # asking first keeps expected misses out of the statistics
        return await self._cache.get(key) if (await self._cache.contains([key]))[0] else None

    async def _renew(self, key: str) -> None:
        while True:
            await self._sleep(self._claim_ttl / 3)
            await self._cache.renew(key, self._claim_ttl)


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel until it ends: a client that loses its connection may swallow a cancellation."""
    while not task.done():
        task.cancel()
        await asyncio.wait([task], timeout=_CANCEL_AGAIN)
