"""The in-process token cache against a model of it, and its claims."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from epd.cache.base import HEADER_BYTES, CachedTokens
from epd.cache.memory import MemoryCache


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def tokens(rows: int, fill: int = 0) -> CachedTokens:
    return CachedTokens("float16", (rows, 1), bytes([fill]) * (2 * rows))


def test_counting_and_clearing() -> None:
    async def main() -> None:
        clock = Clock()
        cache = MemoryCache(ttl=10.0, clock=clock)
        for name in "abc":
            cache.put(name, tokens(2))
        clock.now = 5.0
        cache.put("d", tokens(2))
        clock.now = 12.0
        assert await cache.count() == 1, "the others have expired"
        assert await cache.count(clear=True) == 1
        assert (await cache.count(), cache.held_bytes) == (0, 0)
        assert await cache.get("d") is None

    asyncio.run(main())


def test_round_trip_keeps_its_own_copy() -> None:
    async def main() -> None:
        cache = MemoryCache()
        buffer = bytearray(b"abcd")
        cache.put("a", CachedTokens("float16", (2, 1), memoryview(buffer)))
        buffer[:] = b"wxyz"
        value = await cache.get("a")
        assert value == CachedTokens("float16", (2, 1), b"abcd")
        assert await cache.get("b") is None
        assert await cache.contains(["a", "b", "a"]) == [True, False, True]
        stats = cache.stats()
        assert (stats.hits, stats.misses, stats.stored_bytes) == (1, 1, HEADER_BYTES + 4)

    asyncio.run(main())


def test_ttl_ends_exactly() -> None:
    async def main() -> None:
        clock = Clock()
        cache = MemoryCache(ttl=10, clock=clock)
        cache.put("a", tokens(4))
        clock.now = 9.99
        assert await cache.get("a") is not None
        clock.now = 10.0
        assert await cache.contains(["a"]) == [False]
        assert await cache.get("a") is None
        assert cache.held_bytes == 0

    asyncio.run(main())


def test_the_least_recently_used_leave_until_the_bytes_fit() -> None:
    async def main() -> None:
        size = HEADER_BYTES + 8
        cache = MemoryCache(max_bytes=3 * size)
        for key in "abc":
            cache.put(key, tokens(4))
        assert await cache.get("a") is not None
        cache.put("d", tokens(4))
        assert await cache.contains(list("abcd")) == [True, False, True, True]
        cache.put("e", tokens(4 + size // 2))  # as large as two
        assert await cache.contains(list("acde")) == [False, False, True, True]
        assert cache.held_bytes == 3 * size

    asyncio.run(main())


def test_an_entry_over_the_cap_is_rejected_and_evicts_nothing() -> None:
    async def main() -> None:
        cache = MemoryCache(max_bytes=1000, max_entry_bytes=HEADER_BYTES + 8)
        assert await cache.store("a", tokens(4))
        assert not await cache.store("b", tokens(5))
        assert await cache.contains(["a", "b"]) == [True, False]
        assert cache.stats().rejected == 1

    asyncio.run(main())


actions = st.one_of(
    st.tuples(st.just("put"), st.sampled_from("abcde"), st.integers(0, 40)),
    st.tuples(st.just("get"), st.sampled_from("abcde"), st.just(0)),
    st.tuples(st.just("wait"), st.just(""), st.integers(1, 6)),
)


@given(st.lists(actions, max_size=60))
def test_it_behaves_like_a_list_of_entries(steps: list[tuple[str, str, int]]) -> None:
    budget, ttl = 4 * HEADER_BYTES, 10.0
    model: list[tuple[str, int, float]] = []  # least recently used first: key, rows, expiry

    def drop(key: str) -> None:
        model[:] = [entry for entry in model if entry[0] != key]

    async def main() -> None:
        clock = Clock()
        cache = MemoryCache(max_bytes=budget, ttl=ttl, clock=clock)
        for action, key, number in steps:
            if action == "wait":
                clock.now += number
            elif action == "put" and HEADER_BYTES + 2 * number <= budget:
                cache.put(key, tokens(number, fill=ord(key)))
                drop(key)
                model.append((key, number, clock.now + ttl))
                while sum(HEADER_BYTES + 2 * rows for _, rows, _ in model) > budget:
                    model.pop(0)
            elif action == "get":
                for entry in [e for e in model if e[0] == key]:
                    model.remove(entry)
                    if entry[2] > clock.now:
                        model.append(entry)
                rows = next((rows for name, rows, _ in model if name == key), None)
                expected = None if rows is None else tokens(rows, fill=ord(key))
                assert await cache.get(key) == expected
            assert cache.held_bytes <= budget

    asyncio.run(main())


def test_a_claim_is_exclusive_until_given_back_or_expired() -> None:
    async def main() -> None:
        clock = Clock()
        cache = MemoryCache(clock=clock)
        assert await cache.claim("a", 5)
        assert not await cache.claim("a", 5)
        assert await cache.claim("b", 5)
        await cache.unclaim("a")
        await cache.unclaim("a")
        assert await cache.claim("a", 5)
        clock.now = 4
        await cache.renew("a", 5)
        clock.now = 8
        assert not await cache.claim("a", 5)
        clock.now = 9
        assert await cache.claim("a", 5)
        assert cache.stats().claims_won == 4

    asyncio.run(main())


def test_close_forgets() -> None:
    async def main() -> None:
        cache = MemoryCache()
        cache.put("a", tokens(4))
        await cache.flush()
        await cache.close()
        assert await cache.get("a") is None

    asyncio.run(main())
