"""Real processes over real sockets: accidents under load lose nothing, double nothing, change
nothing.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from epd import LLM, SamplingParams
from epd.cache.server import find_server
from epd.models.tiny import write_tiny_llava

QUESTION = "what is it"
TOKENS = 400


def pictures(count: int) -> list[Image.Image]:
    rng = np.random.default_rng(11)
    return [
        Image.fromarray(rng.integers(0, 255, (40, 56, 3), dtype=np.uint8)) for _ in range(count)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llava(tmp_path_factory.mktemp("tiny"), seed=3)


@pytest.fixture(scope="module")
def expected(model: Path) -> list[str]:
    """The one-process answers, image by image."""
    llm = LLM(str(model))
    sampling = SamplingParams(max_tokens=TOKENS, ignore_eos=True)
    return [llm.chat(QUESTION, images=[image], sampling=sampling).text for image in pictures(6)]


@pytest.fixture(scope="module")
def stack(model: Path, start_stack: Callable[..., Any]) -> Iterator[Any]:
    with start_stack(model=str(model), topology="2E2P2D") as running:
        yield running


def bodies(stack: Any, count: int) -> list[dict[str, Any]]:
    images = pictures(6)
    return [
        stack.body([images[n % 6]], QUESTION, max_tokens=TOKENS, ignore_eos=True, cache_salt=str(n))
        for n in range(count)
    ]


def check(replies: list[Any], expected: list[str]) -> None:
    for number, reply in enumerate(replies):
        assert (reply.status, reply.error) == (200, None)
        assert reply.text == expected[number % 6]
        assert reply.finish_reason == "length"
        assert reply.usage["completion_tokens"] == TOKENS


async def under_load(
    stack: Any, count: int, accident: Callable[[], None], victim: str = ""
) -> list[Any]:
    """`count` requests at once, and an accident while they run and `victim` has some of them.

    Encoding and prefill take milliseconds: their worker is frozen first, so that it has work.
    """
    quick = victim.startswith(("encode", "prefill"))
    if quick:
        stack.kill(victim, signal.SIGSTOP)
    running = asyncio.create_task(stack.all(bodies(stack, count)))
    while not running.done():
        seen = await asyncio.to_thread(stack.pipeline)
        busy = {w["name"] for w in seen["workers"] if w["running"]}
        if seen["inflight"] and (quick or not victim or victim in busy):
            break
    assert not running.done()
    accident()
    replies: list[Any] = await running
    return replies


@pytest.mark.parametrize("victim", ["encode-0", "prefill-0", "decode-0", "decode-1"])
def test_killing_a_worker_with_a_peer_alive_is_invisible(
    stack: Any, expected: list[str], victim: str
) -> None:
    stack.wait_ready()
    before = stack.pipeline()["counters"]
    replies = asyncio.run(under_load(stack, 24, lambda: stack.kill(victim), victim))
    check(replies, expected)
    after = stack.pipeline()["counters"]
    assert after["workers_lost"] > before.get("workers_lost", 0)
    if victim != "encode-0":
        assert after["retries"] > before.get("retries", 0)


def test_a_frozen_worker_counts_as_dead_and_its_late_words_are_dropped(
    stack: Any, expected: list[str]
) -> None:
    stack.wait_ready()
    freeze = under_load(stack, 24, lambda: stack.kill("decode-0", signal.SIGSTOP), "decode-0")
    replies = asyncio.run(freeze)
    stack.kill("decode-0", signal.SIGCONT)
    check(replies, expected)
    stack.wait_ready()
    check(asyncio.run(stack.all(bodies(stack, 6))), expected)


@pytest.mark.skipif(find_server() is None, reason="redis-server is not installed")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_losing_redis_under_load_costs_no_answer(
    stack: Any, expected: list[str], number: signal.Signals
) -> None:
    stack.wait_ready()
    pid = stack.supervisor.cache_pid
    replies = asyncio.run(under_load(stack, 24, lambda: os.kill(pid, number)))
    check(replies, expected)
    if number is signal.SIGSTOP:
        os.kill(pid, signal.SIGCONT)
    check(asyncio.run(stack.all(bodies(stack, 6))), expected)


def test_clients_that_leave_give_everything_back(stack: Any) -> None:
    stack.wait_ready()

    async def leave() -> None:
        running = [asyncio.create_task(stack.all([body])) for body in bodies(stack, 20)]
        await asyncio.sleep(0.4)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    asyncio.run(leave())
    until = time.monotonic() + 5
    while time.monotonic() < until:
        seen = stack.pipeline()
        if not seen["inflight"] and all(
            not w["running"] and not w["kv_leases"] and not w["encode_queue"]
            and w["blocks_free"] == w["blocks_total"] for w in seen["workers"]
        ):  # fmt: skip
            return
        time.sleep(0.1)
    raise AssertionError(seen)


def test_no_frame_was_refused_and_no_token_came_twice(stack: Any) -> None:
    seen = stack.pipeline()
    odd = {k: v for k, v in seen["frames_rejected"].items() if k not in _AFTER_ACCIDENTS}
    assert odd == {}
    assert seen["counters"].get("repeated_tokens", 0) == 0


# a worker declared dead may still speak until it hears of it
_AFTER_ACCIDENTS = {"unknown sender", "unknown_receiver", "earlier life of the sender"}
