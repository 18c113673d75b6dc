"""The Redis backend against a real server that is killed, stopped, flushed and corrupted."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import statistics
import subprocess
import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
from redis.asyncio import Redis

from epd.cache.base import HEADER_BYTES, CachedTokens, pack_entry
from epd.cache.breaker import Breaker
from epd.cache.factory import open_cache
from epd.cache.redis_cache import RedisCache

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
    from pathlib import Path

BINARY = shutil.which("redis-server") or shutil.which("valkey-server")
needs_server = pytest.mark.skipif(BINARY is None, reason="no redis-server or valkey-server on PATH")
FIRST_CALL, LATER_CALL = 0.25 + 0.2, 0.02  # seconds; the first with slack for a busy machine


class Server:
    """A plain server without access rules, so that the test may do what an operator could."""

    def __init__(self, directory: Path) -> None:
        self.socket = directory / "s"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        assert BINARY is not None
        command = [BINARY, "--port", "0", "--unixsocket", str(self.socket), "--save", ""]
        self.process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, cwd=self.socket.parent, stdin=subprocess.DEVNULL
        )
        client = Redis(unix_socket_path=str(self.socket))

        async def ready() -> None:
            async with client:
                for _ in range(500):
                    with suppress(Exception):
                        await client.ping()
                        return
                    await asyncio.sleep(0.01)
            raise TimeoutError

        asyncio.run(ready())

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()


@pytest.fixture
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("r"))
    server.start()
    yield server
    server.stop()


def tokens(rows: int = 4, fill: int = 1) -> CachedTokens:
    return CachedTokens("float32", (rows, 2), bytes([fill]) * (rows * 8))


def run(main: Coroutine[Any, Any, None]) -> None:
    async def checked() -> None:
        await main
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(checked())


@asynccontextmanager
async def opened(server: Server, **settings: Any) -> AsyncIterator[RedisCache]:
    # generous unless the test is about time: a busy machine must not look like a dead server
    cache = open_cache(f"unix://{server.socket}", **{"timeout": 5.0} | settings)
    assert isinstance(cache, RedisCache)
    try:
        yield cache
    finally:
        await cache.close()


@asynccontextmanager
async def operator(server: Server) -> AsyncIterator[Any]:
    async with Redis(unix_socket_path=str(server.socket)) as client:
        yield client


async def timed(call: Awaitable[Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return await call, time.perf_counter() - started


async def eventually(check: Callable[[], Awaitable[bool]], seconds: float = 6.0) -> None:
    deadline = time.monotonic() + seconds
    while not await check():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


@needs_server
@pytest.mark.parametrize("rows", [0, 1, 6_552, 6_553, 40_000, 130_000])  # one to four reads
def test_round_trip_between_two_clients(server: Server, rows: int) -> None:
    async def main() -> None:
        value = CachedTokens("bfloat16", (rows, 20), os.urandom(rows * 40))
        async with opened(server) as one, opened(server) as two:
            assert await two.get("k") is None
            one.put("k", value)
            assert await one.get("k") == value  # while it still waits in the queue
            await one.flush()
            assert await two.get("k") == value
            assert await two.contains(["j", "k", "l"]) == [False, True, False]
            assert await two.contains([]) == []
            assert (two.stats().hits, two.stats().misses) == (1, 1)
            assert one.stats().stored_bytes == HEADER_BYTES + rows * 40
            assert one.stats().pending_bytes == 0

    run(main())


@needs_server
def test_counting_and_clearing_touch_our_values_only(server: Server) -> None:
    async def main() -> None:
        async with opened(server) as cache, operator(server) as client:
            await client.set("other:tokens:x", "theirs")
            await client.set("epd:claim:x", "ours, and no value")
            for number in range(1200):  # several pages
                await client.set(f"epd:tokens:{number}", "x")
            assert await cache.count() == 1200
            assert await cache.count(clear=True) == 1200
            assert await cache.count() == 0
            assert sorted(await client.keys("*")) == [b"epd:claim:x", b"other:tokens:x"]

    run(main())


@needs_server
def test_a_dead_server_counts_nothing(server: Server) -> None:
    async def main() -> None:
        async with opened(server) as cache:
            server.signal(signal.SIGKILL)
            assert await cache.count() is None
            assert await cache.count(clear=True) is None

    run(main())


@needs_server
def test_a_large_write_that_ends_half_way_is_never_seen(server: Server) -> None:
    async def main() -> None:
        value = CachedTokens("bfloat16", (1024, 4096), os.urandom(8 << 20))
        async with opened(server) as cache, operator(server) as client:
            found: CachedTokens | None = value
            for _ in range(20):  # a busy machine may let a write end before it is cancelled
                await client.flushdb()
                writing = asyncio.ensure_future(cache.store("k", value))
                while not await client.keys("epd:draft:*") and not writing.done():
                    await asyncio.sleep(0)
                writing.cancel()
                await asyncio.gather(writing, return_exceptions=True)
                found = await cache.get("k")
                assert found is None or found == value
                if found is None:
                    break
            assert found is None
            assert await cache.store("k", value)
            assert await cache.get("k") == value
            assert await client.keys() == [b"epd:tokens:k"]
            assert await client.pttl("epd:tokens:k") > 0

    run(main())


@needs_server
def test_entries_expire_and_keys_carry_the_prefix(server: Server) -> None:
    async def main() -> None:
        async with opened(server, ttl=0.2) as cache, operator(server) as client:
            assert await cache.store("k", tokens())
            assert await client.keys() == [b"epd:tokens:k"]
            assert 0 < await client.pttl("epd:tokens:k") <= 200
            await eventually(lambda: _missing(cache))

    async def _missing(cache: RedisCache) -> bool:
        return await cache.get("k") is None

    run(main())


@needs_server
def test_oversized_entries_are_neither_written_nor_read(server: Server) -> None:
    async def main() -> None:
        limit = HEADER_BYTES + tokens().num_bytes
        async with opened(server, max_entry_bytes=limit) as cache, operator(server) as client:
            assert await cache.store("a", tokens())
            cache.put("b", tokens(rows=5))
            assert not await cache.store("b", tokens(rows=5))
            assert cache.stats().rejected == 2
            assert await cache.get("a") == tokens()
            await client.set("epd:tokens:big", pack_entry("big", tokens(rows=100_000)))
            assert await cache.get("big") is None
            assert await client.exists("epd:tokens:big", "epd:tokens:b") == 0

    run(main())


async def _garbage(client: Any) -> None:
    await client.set("epd:tokens:k", b"garbage")


async def _flipped(client: Any) -> None:
    entry = bytearray(await client.get("epd:tokens:k"))
    entry[-1] ^= 1
    await client.set("epd:tokens:k", bytes(entry))


async def _copied(client: Any) -> None:
    await client.set("epd:tokens:k", pack_entry("other", tokens()))


async def _truncated(client: Any) -> None:
    await client.set("epd:tokens:k", pack_entry("k", tokens())[:-1])


async def _list(client: Any) -> None:
    await client.delete("epd:tokens:k")
    await client.rpush("epd:tokens:k", b"x")


async def _hash(client: Any) -> None:
    await client.delete("epd:tokens:k")
    await client.hset("epd:tokens:k", "field", b"x")


@needs_server
@pytest.mark.parametrize(
    "damage", [_garbage, _flipped, _copied, _truncated, _list, _hash], ids=lambda d: d.__name__[1:]
)
def test_damage_is_a_miss_counted_and_cleared(
    server: Server, damage: Callable[[Any], Awaitable[None]]
) -> None:
    async def main() -> None:
        async with opened(server) as cache, operator(server) as client:
            assert await cache.store("k", tokens())
            await damage(client)
            assert await cache.get("k") is None
            assert await client.exists("epd:tokens:k") == 0
            stats = cache.stats()
            assert (stats.damaged, stats.misses, stats.breaker) == (1, 1, "closed")
            assert await cache.store("k", tokens())
            assert await cache.get("k") == tokens()

    run(main())


@needs_server
@pytest.mark.parametrize("position", [60, 300_000, 3_000_000, 5_000_000])
def test_damage_in_any_chunk_is_a_miss(server: Server, position: int) -> None:
    async def main() -> None:
        value = CachedTokens("float16", (2500, 1000), os.urandom(5_000_000))
        async with opened(server) as cache, operator(server) as client:
            assert await cache.store("k", value)
            await client.setrange("epd:tokens:k", position, b"damage")
            assert await cache.get("k") is None
            assert cache.stats().damaged == 1

    run(main())


@needs_server
def test_many_large_reads_at_once_all_hit(server: Server) -> None:
    async def main() -> None:
        value = CachedTokens("bfloat16", (576, 4096), os.urandom(576 * 4096 * 2))
        async with opened(server) as cache:
            assert await cache.store("k", value)
            values = await asyncio.gather(*(cache.get("k") for _ in range(30)))
            assert all(found == value for found in values)

    run(main())


@needs_server
def test_flushed_under_us_is_a_miss(server: Server) -> None:
    async def main() -> None:
        async with opened(server) as cache, operator(server) as client:
            assert await cache.store("k", tokens())
            await client.flushall()
            assert await cache.get("k") is None
            assert await cache.contains(["k"]) == [False]
            assert cache.stats().breaker == "closed"

    run(main())


@needs_server
def test_a_server_that_refuses_commands_costs_errors_only(server: Server) -> None:
    async def main() -> None:
        async with opened(server) as cache, operator(server) as client:
            assert await cache.store("old", tokens())
            await client.config_set("maxmemory", 1)  # noeviction: writes are refused, reads work
            for _ in range(5):
                assert not await cache.store("new", tokens())
            assert await cache.get("old") == tokens()
            stats = cache.stats()
            assert (stats.errors, stats.dropped, stats.breaker) == (5, 5, "closed")

    run(main())


@needs_server
def test_killed_and_restarted(server: Server) -> None:
    async def main() -> None:
        async with opened(server, timeout=0.2) as cache:
            assert await cache.store("k", tokens())
            server.signal(signal.SIGKILL)
            value, first = await timed(cache.get("k"))
            assert value is None
            assert first <= FIRST_CALL
            later = [await timed(cache.get("k")) for _ in range(9)]
            assert all(value is None for value, _ in later)
            assert statistics.median(seconds for _, seconds in later) <= LATER_CALL
            assert cache.stats().breaker == "open"
            cache.put("k", tokens())
            assert cache.stats().dropped == 1
            assert await cache.claim("k", 1.0)
            await asyncio.to_thread(server.start)
            await eventually(lambda: cache.store("k", tokens(fill=2)))
            assert await cache.get("k") == tokens(fill=2)
            assert cache.stats().breaker == "closed"

    run(main())


@needs_server
def test_restarted_between_two_calls_is_not_even_noticed(server: Server) -> None:
    async def main() -> None:
        async with opened(server) as cache:
            assert await cache.store("k", tokens())
            server.signal(signal.SIGKILL)
            await asyncio.to_thread(server.start)
            await asyncio.sleep(0.05)
            assert await cache.get("k") is None
            assert await cache.store("k", tokens())
            assert cache.stats().errors == 0

    run(main())


@needs_server
def test_stopped_costs_one_timeout_for_everybody_together(server: Server) -> None:
    async def main() -> None:
        async with opened(server, timeout=0.2) as cache:
            assert await cache.store("k", tokens())
            server.signal(signal.SIGSTOP)
            values, first = await timed(asyncio.gather(*(cache.get("k") for _ in range(200))))
            assert values == [None] * 200
            assert first <= FIRST_CALL
            later = [(await timed(cache.contains(["k"])))[1] for _ in range(9)]
            assert statistics.median(later) <= LATER_CALL
            await asyncio.sleep(2.5)  # the probe found it still stopped, at nobody's cost
            assert cache.stats().breaker in ("open", "half_open")
            later = [(await timed(cache.get("k")))[1] for _ in range(9)]
            assert statistics.median(later) <= LATER_CALL
            server.signal(signal.SIGCONT)
            await eventually(lambda: _equal(cache))

    async def _equal(cache: RedisCache) -> bool:
        return await cache.get("k") == tokens()

    run(main())


async def _silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.read()
    writer.close()


async def _slow(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(65536):
        await asyncio.sleep(0.5)
        writer.write(b"$-1\r\n")
    writer.close()


async def _babbling(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(65536):
        writer.write(b"\x00\xff not the protocol\r\n" * 3)
    writer.close()


async def _closing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def _alone() -> bool:
    return len(asyncio.all_tasks()) == 1


@pytest.mark.parametrize(
    "behaviour", [_silent, _slow, _babbling, _closing], ids=lambda b: b.__name__[1:]
)
def test_something_else_behind_the_socket(tmp_path: Path, behaviour: Any) -> None:
    async def main() -> None:
        listener = await asyncio.start_unix_server(behaviour, tmp_path / "s")
        cache = open_cache(f"unix://{tmp_path}/s")
        spent = []
        for _ in range(4):
            value, seconds = await timed(cache.get("k"))
            assert value is None
            spent.append(seconds)
            assert await cache.contains(["k"]) == [False]
            assert await cache.claim("k", 1.0)
            assert not await cache.store("k", tokens())
        await cache.unclaim("k")
        await cache.renew("k", 1.0)
        assert sum(spent) <= FIRST_CALL
        assert cache.stats().breaker == "open"
        await cache.close()
        listener.close()
        await eventually(_alone)  # the slow one needs a while to see that its client has left

    run(main())


def test_one_unanswered_read_opens_the_breaker(tmp_path: Path) -> None:
    async def main() -> None:
        listener = await asyncio.start_unix_server(_silent, tmp_path / "s")
        cache = open_cache(f"unix://{tmp_path}/s")
        assert await cache.get("k") is None
        assert (cache.stats().errors, cache.stats().breaker) == (1, "open")
        await cache.close()
        listener.close()
        await eventually(_alone)

    run(main())


class GatedClient:
    """A client whose SET waits until the gate opens."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.written: list[str] = []

    async def execute_command(self, *args: Any) -> Any:
        if args[0] == "SET":
            await self.gate.wait()
            self.written.append(args[1])
            return True
        return b""

    def pipeline(self, transaction: bool) -> Any:
        raise ConnectionError

    async def aclose(self) -> None:
        self.gate.set()


def test_write_behind_never_blocks_and_drops_what_does_not_fit() -> None:
    async def main() -> None:
        client = GatedClient()
        cache = RedisCache(client, timeout=60.0, queue_entries=3, queue_bytes=100)
        for key in ("a", "b", "b", "c", "d"):  # the second b is the same content
            cache.put(key, tokens())
        assert cache.stats().dropped == 1
        assert cache.stats().pending_bytes == 96
        client.gate.set()
        await cache.flush()
        assert client.written == ["epd:tokens:a", "epd:tokens:b", "epd:tokens:c"]
        client.gate.clear()
        cache.put("e", tokens(rows=10))
        cache.put("f", tokens(rows=3))  # room for an entry, not for its bytes
        assert cache.stats().dropped == 2
        assert await cache.get("e") == tokens(rows=10)
        assert await cache.contains(["e"]) == [True]
        client.gate.set()
        await cache.close()
        assert client.written[3:] == ["epd:tokens:e"]
        cache.put("g", tokens())
        assert cache.stats().dropped == 3
        assert await cache.get("g") is None

    run(main())


def test_close_is_bounded_when_writes_hang() -> None:
    async def main() -> None:
        cache = RedisCache(GatedClient(), timeout=60.0)
        cache.put("a", tokens())
        cache.put("b", tokens())
        _, seconds = await timed(cache.close())
        assert 0.9 < seconds < 1.5
        await cache.flush()
        assert cache.stats().dropped == 1
        await cache.close()

    run(main())


def test_writes_that_take_too_long_are_errors_and_three_of_them_open_the_breaker() -> None:
    async def main() -> None:
        client = GatedClient()
        cache = RedisCache(client, timeout=0.02)
        for expected in ("closed", "closed", "open"):
            assert not await cache.store("a", tokens())
            assert cache.stats().breaker == expected
        await cache.close()

    run(main())


class BrokenClient(GatedClient):
    """Every command fails until `well`; counts the pings."""

    well = False
    pings = 0

    async def execute_command(self, *args: Any) -> Any:
        self.pings += args[0] == "PING"
        if not self.well:
            raise ConnectionError
        return b"PONG"


def test_only_the_background_probe_asks_while_the_breaker_is_open() -> None:
    async def main() -> None:
        now = [0.0]
        wake = asyncio.Event()

        async def sleep(seconds: float) -> None:
            await wake.wait()
            wake.clear()
            now[0] += seconds

        client = BrokenClient()
        cache = RedisCache(client, breaker=Breaker(clock=lambda: now[0]), sleep=sleep)
        for _ in range(5):
            assert await cache.get("k") is None
        assert cache.stats().errors == 3
        for expected in (1, 2):
            wake.set()
            await asyncio.sleep(0.01)
            assert (client.pings, cache.stats().breaker) == (expected, "open")
        client.well = True
        wake.set()
        await asyncio.sleep(0.01)
        assert (client.pings, cache.stats().breaker, now[0]) == (3, "closed", 6.0)
        await cache.close()

    run(main())


@needs_server
def test_a_claim_belongs_to_its_owner(server: Server) -> None:
    async def main() -> None:
        async with opened(server) as one, opened(server) as two, operator(server) as client:
            assert await one.claim("k", 30)
            assert not await two.claim("k", 30)
            await two.unclaim("k")
            await two.renew("k", 90)
            assert 20_000 < await client.pttl("epd:claim:k") <= 30_000
            await one.renew("k", 90)
            assert 80_000 < await client.pttl("epd:claim:k") <= 90_000
            await one.unclaim("k")
            await one.unclaim("k")
            assert await two.claim("k", 0.05)
            await asyncio.sleep(0.1)
            assert await one.claim("k", 30)
            await two.unclaim("k")  # its own claim has expired: the new owner keeps its own
            assert not await two.claim("k", 30)
            assert (one.stats().claims_won, two.stats().claims_won) == (2, 1)

    run(main())


@needs_server
def test_a_claim_that_never_expires_is_foreign_and_removed(server: Server) -> None:
    async def main() -> None:
        async with opened(server) as cache, operator(server) as client:
            for plant in (client.set("epd:claim:k", b"x"), client.rpush("epd:claim:k", b"x")):
                await plant
                assert not await cache.claim("k", 30)
                assert await cache.claim("k", 30)
                await cache.unclaim("k")
            assert await client.exists("epd:claim:k") == 0

    run(main())


@needs_server
def test_cancelled_calls_leave_the_client_usable(server: Server) -> None:
    async def main() -> None:
        async with opened(server) as cache:
            assert await cache.store("k", tokens())
            server.signal(signal.SIGSTOP)
            calls = [asyncio.ensure_future(cache.get("k")) for _ in range(100)]
            await asyncio.sleep(0.05)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
            server.signal(signal.SIGCONT)
            assert all([await cache.get("k") == tokens() for _ in range(100)])
            assert cache.stats().errors == 0

    run(main())
