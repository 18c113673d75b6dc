"""A server that answers what it should not: misses, never an exception, never for ever."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from redis.exceptions import NoPermissionError

from epd.cache.base import CachedTokens
from epd.cache.redis_cache import RedisCache

LARGE = 1 << 20  # more than comes with the head


class Pipeline:
    def __init__(self, replies: Any) -> None:
        self._replies = replies

    def execute_command(self, *_: Any) -> None:
        pass

    async def execute(self, raise_on_error: bool = True) -> Any:
        return self._replies


class Client:
    """Answers every pipeline with `replies` and every command with `reply`."""

    def __init__(self, replies: Any = None, reply: Any = None) -> None:
        self._replies, self._reply = replies, reply

    async def execute_command(self, *_: Any) -> Any:
        return self._reply

    def pipeline(self, transaction: bool) -> Pipeline:
        return Pipeline(self._replies)

    async def aclose(self) -> None:
        pass


async def lied_to(method: str, *args: Any, **answers: Any) -> Any:
    cache = RedisCache(Client(**answers))
    try:
        async with asyncio.timeout(5):
            return await getattr(cache, method)(*args)
    finally:
        await cache.close()


@pytest.mark.parametrize(
    "replies",
    [
        [5, NoPermissionError("no GETRANGE for you")], [NoPermissionError("neither"), b""],
        [5, None], [5, 7], [5, "text"], [b"5", b"hello"], [None, None], [-1, b""], [], [5], 3, None,
        [1, b"much more than the length that was named"], [LARGE, b""],
    ],
)  # fmt: skip
def test_a_value_of_the_wrong_kind_is_a_miss(replies: Any) -> None:
    assert asyncio.run(lied_to("get", "k", replies=replies)) is None


@pytest.mark.parametrize("reply", [None, 7, "text", [], b"", b"x", bytes(4 << 20)])
def test_a_wrong_piece_of_a_large_value_is_a_miss(reply: Any) -> None:
    found = lied_to("get", "k", replies=[LARGE, bytes(256 << 10)], reply=reply)
    assert asyncio.run(found) is None


@pytest.mark.parametrize("replies", [[], [1], [1, 1, 1], [b"1", None], [2, -1], None, 4])
def test_wrong_answers_about_presence_are_no_answers(replies: Any) -> None:
    assert asyncio.run(lied_to("contains", ["a", "b"], replies=replies)) == [False, False]


@pytest.mark.parametrize("replies", [[], [True], 5, None, [1, 2, 3]])
def test_wrong_answers_about_a_claim_let_everybody_compute(replies: Any) -> None:
    assert asyncio.run(lied_to("claim", "k", 1.0, replies=replies)) is True


@pytest.mark.parametrize(
    "reply", [5, [], (0,), (b"x", []), (0, None), (0, 3), (None, []), (0, [{}]), b"0"]
)
def test_a_wrong_page_of_keys_counts_nothing(reply: Any) -> None:
    assert asyncio.run(lied_to("count", reply=reply)) is None


def test_a_scan_without_an_end_is_given_up() -> None:
    assert asyncio.run(lied_to("count", reply=(1, [b"epd:tokens:k"]))) is None


@pytest.mark.parametrize("reply", [None, 7, b"OK", [1]])
def test_writes_return_whatever_comes_back(reply: Any) -> None:
    value = CachedTokens("float32", (1, 2), bytes(8))
    assert asyncio.run(lied_to("store", "k", value, reply=reply)) in (True, False)
