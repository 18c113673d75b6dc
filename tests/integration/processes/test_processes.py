"""Real processes over real sockets: accidents under load lose nothing, double nothing, change
nothing.
"""

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from epd.cache.server import find_server


@pytest.fixture(scope="module")
def stack(questions: Any, start_stack: Callable[..., Any]) -> Iterator[Any]:
    with start_stack(model=questions.model, topology="2E2P2D") as running:
        yield running


async def under_load(
    stack: Any, questions: Any, accident: Callable[[], None], victim: str = ""
) -> list[Any]:
    """24 requests at once, and an accident while they run and `victim` has some of them.

    Encoding and prefill take milliseconds: their worker is frozen first, so that it has work.
    """
    quick = victim.startswith(("encode", "prefill"))
    if quick:
        stack.kill(victim, signal.SIGSTOP)
    running = asyncio.create_task(stack.all(questions.bodies(stack, 24)))
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
    stack: Any, questions: Any, victim: str
) -> None:
    stack.wait_ready()
    before = stack.pipeline()["counters"]
    replies = asyncio.run(under_load(stack, questions, lambda: stack.kill(victim), victim))
    questions.check(replies)
    after = stack.pipeline()["counters"]
    assert after["workers_lost"] > before.get("workers_lost", 0)
    if victim != "encode-0":
        assert after["retries"] > before.get("retries", 0)


def test_a_frozen_worker_counts_as_dead_and_its_late_words_are_dropped(
    stack: Any, questions: Any
) -> None:
    stack.wait_ready()
    freeze = under_load(
        stack, questions, lambda: stack.kill("decode-0", signal.SIGSTOP), "decode-0"
    )
    replies = asyncio.run(freeze)
    stack.kill("decode-0", signal.SIGCONT)
    questions.check(replies)
    stack.wait_ready()
    questions.check(asyncio.run(stack.all(questions.bodies(stack, 6))))


@pytest.mark.skipif(find_server() is None, reason="redis-server is not installed")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_losing_redis_under_load_costs_no_answer(
    stack: Any, questions: Any, number: signal.Signals
) -> None:
    stack.wait_ready()
    pid = stack.supervisor.cache_pid
    replies = asyncio.run(under_load(stack, questions, lambda: os.kill(pid, number)))
    questions.check(replies)
    if number is signal.SIGSTOP:
        os.kill(pid, signal.SIGCONT)
    questions.check(asyncio.run(stack.all(questions.bodies(stack, 6))))


def test_clients_that_leave_give_everything_back(stack: Any, questions: Any) -> None:
    stack.wait_ready()

    async def leave() -> None:
        running = [asyncio.create_task(stack.all([body])) for body in questions.bodies(stack, 20)]
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
