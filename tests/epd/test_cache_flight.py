"""Single flight: one computation per key, within a process and between processes."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import epd.cache
from epd.cache import CachedTokens, MemoryCache, PrivateServer, SingleFlight, open_cache
from epd.errors import CapacityError, UnavailableError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

needs_server = pytest.mark.skipif(
    not (shutil.which("redis-server") or shutil.which("valkey-server")),
    reason="no redis-server or valkey-server on PATH",
)
VALUE = CachedTokens("float16", (2, 1), b"abcd")


def run(main: Coroutine[Any, Any, None]) -> None:
    async def checked() -> None:
        await main
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(checked())


class Producer:
    """Counts its calls; each waits for `gate` (open unless closed by the test)."""

    def __init__(self, error: Exception | None = None) -> None:
        self.calls = self.cancelled = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error = error

    async def __call__(self) -> CachedTokens:
        self.calls += 1
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.error:
            raise self.error
        return VALUE


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_a_hundred_callers_share_one_computation() -> None:
    async def main() -> None:
        cache, produce = MemoryCache(), Producer()
        flight = SingleFlight(cache)
        values = await asyncio.gather(*(flight.run("k", produce) for _ in range(100)))
        assert values == [VALUE] * 100
        assert await flight.run("k", produce) == VALUE
        assert produce.calls == 1
        await flight.run("other", produce)
        assert produce.calls == 2
        await flight.close()
        stats = cache.stats()
        assert (stats.shared, stats.hits, stats.misses, stats.claims_won) == (99, 1, 2, 2)

    run(main())


def test_two_flights_on_one_cache_compute_once_and_the_other_waits() -> None:
    async def main() -> None:
        cache, produce = MemoryCache(), Producer()
        produce.gate.clear()
        one, two = SingleFlight(cache), SingleFlight(cache)
        calls = asyncio.gather(one.run("k", produce), two.run("k", produce))
        await asyncio.sleep(0.05)
        produce.gate.set()
        assert await calls == [VALUE, VALUE]
        assert produce.calls == 1
        assert cache.stats().claims_waited == 1
        await one.close()
        await two.close()

    run(main())


def test_an_error_reaches_every_caller_and_frees_the_claim() -> None:
    async def main() -> None:
        cache, produce = MemoryCache(), Producer(CapacityError("the encoder is full", 3.0))
        flight = SingleFlight(cache)
        results = await asyncio.gather(
            *(flight.run("k", produce) for _ in range(5)), return_exceptions=True
        )
        assert [type(result) for result in results] == [CapacityError] * 5
        assert all(result is produce.error for result in results)
        assert produce.calls == 1
        assert await cache.claim("k", 1.0)
        await cache.unclaim("k")
        produce.error = None
        assert await flight.run("k", produce) == VALUE
        await flight.close()

    run(main())


def test_a_cancelled_caller_leaves_the_others_alone() -> None:
    async def main() -> None:
        cache, produce = MemoryCache(), Producer()
        produce.gate.clear()
        flight = SingleFlight(cache)
        callers = [asyncio.ensure_future(flight.run("k", produce)) for _ in range(3)]
        await settle()
        callers[0].cancel()
        callers[1].cancel()
        await settle()
        assert (callers[0].cancelled(), callers[1].cancelled()) == (True, True)
        produce.gate.set()
        assert await callers[2] == VALUE
        assert (produce.calls, produce.cancelled) == (1, 0)
        await flight.close()

    run(main())


def test_the_last_caller_to_leave_cancels_and_the_next_starts_anew() -> None:
    async def main() -> None:
        cache, produce = MemoryCache(), Producer()
        produce.gate.clear()
        flight = SingleFlight(cache)
        callers = [asyncio.ensure_future(flight.run("k", produce)) for _ in range(3)]
        await settle()
        for caller in callers:
            caller.cancel()
        await asyncio.sleep(0)
        fresh = asyncio.ensure_future(flight.run("k", produce))  # while the old one still lands
        await asyncio.gather(*callers, return_exceptions=True)
        await settle()
        assert produce.cancelled == 1
        produce.gate.set()
        assert await fresh == VALUE
        assert produce.calls == 2
        await flight.close()
        assert await cache.claim("k", 1.0)

    run(main())


def test_closing_ends_callers_with_a_typed_error_and_frees_the_claim() -> None:
    async def main() -> None:
        cache, produce = MemoryCache(), Producer()
        produce.gate.clear()
        flight = SingleFlight(cache)
        callers = [asyncio.ensure_future(flight.run("k", produce)) for _ in range(3)]
        await settle()
        await flight.close()
        results = await asyncio.gather(*callers, return_exceptions=True)
        assert [type(result) for result in results] == [UnavailableError] * 3
        assert await cache.claim("k", 1.0)

    run(main())


class SlowStore(MemoryCache):
    """Notes the order of events; a write takes until the gate opens."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = asyncio.Event()
        self.events: list[str] = []

    async def store(self, key: str, value: CachedTokens) -> bool:
        await self.gate.wait()
        self.events.append("store")
        return await super().store(key, value)

    async def unclaim(self, key: str) -> None:
        self.events.append("unclaim")
        await super().unclaim(key)


def test_callers_go_on_before_the_write_and_the_claim_stays_until_after_it() -> None:
    async def main() -> None:
        cache, produce = SlowStore(), Producer()
        flight = SingleFlight(cache)
        assert await flight.run("k", produce) == VALUE
        assert await flight.run("k", produce) == VALUE  # boards the flight that is still writing
        assert not await cache.claim("k", 1.0)
        cache.gate.set()
        await flight.close()
        assert cache.events == ["store", "unclaim"]
        assert produce.calls == 1

    run(main())


class LateStore(MemoryCache):
    """Another owner finishes exactly between our miss and our claim."""

    async def claim(self, key: str, ttl: float) -> bool:
        self.put(key, VALUE)
        return await super().claim(key, ttl)


def test_a_value_that_appears_just_before_our_claim_is_used() -> None:
    async def main() -> None:
        cache, produce = LateStore(), Producer()
        flight = SingleFlight(cache)
        assert await flight.run("k", produce) == VALUE
        assert produce.calls == 0
        await flight.close()
        assert await MemoryCache.claim(cache, "k", 1.0)

    run(main())


class SwallowingRenewals(MemoryCache):
    """Loses the first cancellation, as a client may whose connection breaks at that moment."""

    def __init__(self) -> None:
        super().__init__()
        self.renewing = asyncio.Event()
        self.swallowed = 0

    async def renew(self, key: str, ttl: float) -> None:
        self.renewing.set()
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            self.swallowed += 1
            if self.swallowed > 1:
                raise


def test_closing_ends_a_renewal_that_lost_its_cancellation() -> None:
    async def main() -> None:
        cache, produce = SwallowingRenewals(), Producer()
        flight = SingleFlight(cache, claim_ttl=0.03)
        produce.gate.clear()
        caller = asyncio.create_task(flight.run("k", produce))
        await cache.renewing.wait()
        async with asyncio.timeout(5):
            await flight.close()
        with pytest.raises(UnavailableError):
            await caller
        assert cache.swallowed >= 1
        assert await cache.claim("k", 1.0), "the claim was given back"

    run(main())


def test_a_stuck_owner_elsewhere_delays_but_does_not_block() -> None:
    async def main() -> None:
        cache, produce = MemoryCache(), Producer()
        assert await cache.claim("k", 60)
        flight = SingleFlight(cache, max_wait=0.1)
        started = time.monotonic()
        assert await flight.run("k", produce) == VALUE
        assert 0.1 <= time.monotonic() - started < 1.0
        await flight.close()

    run(main())


def test_a_computation_longer_than_its_claim_keeps_it() -> None:
    async def main() -> None:
        cache, produce = MemoryCache(), Producer()
        produce.gate.clear()
        one, two = SingleFlight(cache, claim_ttl=0.3), SingleFlight(cache, claim_ttl=0.3)
        calls = asyncio.gather(one.run("k", produce), two.run("k", produce))
        await asyncio.sleep(0.9)
        produce.gate.set()
        assert await calls == [VALUE, VALUE]
        assert produce.calls == 1
        await one.close()
        await two.close()

    run(main())


def test_without_a_server_everybody_computes(tmp_path: Path) -> None:
    async def main() -> None:
        caches = [open_cache(f"unix://{tmp_path}/nothing") for _ in range(3)]
        flights, produce = [SingleFlight(cache) for cache in caches], Producer()
        values = await asyncio.gather(*(flight.run("k", produce) for flight in flights))
        assert values == [VALUE] * 3
        assert produce.calls == 3
        for flight, cache in zip(flights, caches, strict=True):
            await flight.close()
            await cache.close()

    run(main())


@needs_server
def test_a_server_that_stops_under_a_waiter_makes_it_compute() -> None:
    async def main() -> None:
        server = PrivateServer()
        await server.start()
        caches = [open_cache(server.url) for _ in range(2)]
        one, two = (SingleFlight(cache) for cache in caches)
        stuck, produce = Producer(), Producer()
        stuck.gate.clear()
        first = asyncio.ensure_future(one.run("k", stuck))
        await asyncio.sleep(0.05)
        second = asyncio.ensure_future(two.run("k", produce))
        await asyncio.sleep(0.05)
        assert produce.calls == 0
        assert server.pid is not None
        os.kill(server.pid, signal.SIGSTOP)
        assert await asyncio.wait_for(second, 2.0) == VALUE
        stuck.gate.set()
        assert await first == VALUE
        assert (stuck.calls, produce.calls) == (1, 1)
        for closing in (one, two, *caches):
            await closing.close()
        await server.stop()

    run(main())


WORKER = """
import asyncio, os, sys, time
from epd.cache import CachedTokens, SingleFlight, open_cache

async def main(url, log, start, calls, seconds, claim_ttl):
    cache = open_cache(url, timeout=10.0)  # a busy machine must not look like a dead server
    flight = SingleFlight(cache, claim_ttl=claim_ttl)

    async def produce():
        with open(log, "a") as file:
            file.write(f"{os.getpid()}\\n")
        await asyncio.sleep(seconds)
        return CachedTokens("float32", (300, 400), bytes(range(240)) * 2000)

    await cache.contains(["warm"])
    print("ready", flush=True)
    await asyncio.sleep(float(start) - time.time()) if start != "now" else None
    values = await asyncio.gather(*(flight.run("k", produce) for _ in range(calls)))
    assert all(bytes(value.data) == bytes(range(240)) * 2000 for value in values)
    await flight.close()
    await cache.close()
    print("done", len(values), flush=True)

url, log, start, calls, seconds, claim_ttl = sys.argv[1:]
asyncio.run(main(url, log, start, int(calls), float(seconds), float(claim_ttl)))
"""


def worker(*arguments: object) -> subprocess.Popen[str]:
    root = str(Path(epd.cache.__file__).parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *map(str, arguments)],
        stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": root},
    )  # fmt: skip


def with_server(test: Callable[[str], Awaitable[None]]) -> None:
    async def main() -> None:
        server = PrivateServer()
        await server.start()
        try:
            await test(server.url)
        finally:
            await server.stop()

    run(main())


@needs_server
def test_a_hundred_calls_over_four_processes_compute_once(tmp_path: Path) -> None:
    async def test(url: str) -> None:
        log, start = tmp_path / "log", time.time() + 2.5
        workers = [worker(url, log, start, 25, 0.3, 5.0) for _ in range(4)]
        outputs = [(await asyncio.to_thread(w.communicate, timeout=30))[0] for w in workers]
        assert outputs == ["ready\ndone 25\n"] * 4
        assert len(log.read_text().split()) == 1

    with_server(test)


@needs_server
def test_when_the_computing_process_is_killed_another_takes_over(tmp_path: Path) -> None:
    async def test(url: str) -> None:
        log = tmp_path / "log"
        doomed = worker(url, log, "now", 5, 60, 0.6)
        while not log.exists():
            await asyncio.sleep(0.02)
        others = [worker(url, log, "now", 5, 0.1, 0.6) for _ in range(2)]
        for other in others:
            assert other.stdout is not None
            assert await asyncio.to_thread(other.stdout.readline) == "ready\n"
        doomed.kill()
        killed = time.monotonic()
        outputs = [(await asyncio.to_thread(w.communicate, timeout=30))[0] for w in others]
        assert time.monotonic() - killed < 5.0
        assert outputs == ["done 5\n"] * 2
        pids = log.read_text().split()
        assert len(pids) == 2
        assert pids[0] == str(doomed.pid)
        doomed.communicate()

    with_server(test)
