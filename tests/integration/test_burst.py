"""The built-in model behind 1E1P1D: a burst, one image for everybody, a drain, a dead gateway."""

import asyncio
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from epd import LLM, SamplingParams
from epd.demo.examples import held_out

BURST = 200


@pytest.fixture(scope="module")
def stack(start_stack: Callable[..., Any]) -> Iterator[Any]:
    with start_stack(topology="1E1P1D", max_inflight=150) as running:
        yield running


@pytest.mark.timeout(300)
def test_a_burst_of_200_image_requests_loses_none(stack: Any) -> None:
    examples = held_out(20, seed=77)
    llm = LLM()
    sampling = SamplingParams(max_tokens=12)
    expected = [llm.chat(e.question, images=e.images, sampling=sampling).text for e in examples]
    bodies = [stack.body(e.images, e.question, max_tokens=12) for e in (examples * 10)[:BURST]]
    replies = asyncio.run(stack.all(bodies))
    answered = [n for n, r in enumerate(replies) if r.status == 200]
    shed = [r for r in replies if r.status == 429]
    assert len(answered) + len(shed) == BURST
    assert len(answered) >= 150
    assert all(r.retry_after is not None and int(r.retry_after) >= 1 for r in shed)
    for n in answered:
        assert replies[n].error is None
        assert replies[n].text == expected[n % 20]
    assert stack.pipeline()["inflight"] == 0


def test_a_hundred_askers_of_one_new_image_cause_one_encode(stack: Any) -> None:
    image = held_out(1, seed=991)[0].images[:1]
    before = encodes(stack)
    bodies = [stack.body(image, "What do you see?", max_tokens=2) for _ in range(100)]
    assert {r.status for r in asyncio.run(stack.all(bodies))} == {200}
    time.sleep(0.5)
    assert encodes(stack) == before + 1


def encodes(stack: Any) -> int:
    return sum(w["encoded_total"] for w in stack.pipeline()["workers"])


def test_pickles_and_noise_on_every_socket_change_nothing(stack: Any, tmp_path: Any) -> None:
    target = tmp_path / "touched"
    pickled = b"\x80\x04cposix\nsystem\n(S'touch " + str(target).encode() + b"'\ntR."
    for path in stack.supervisor.run_dir.glob("*.sock"):
        for noise in (
            pickled,
            b"\x00" * 4096,
            b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f" + pickled,
        ):
            with socket.socket(socket.AF_UNIX) as raw:
                raw.connect(str(path))
                raw.sendall(noise)
    image = held_out(1, seed=5)[0]
    (reply,) = asyncio.run(stack.all([stack.body(image.images, image.question, max_tokens=4)]))
    assert reply.status == 200
    assert not target.exists()


def test_a_dead_gateway_comes_back_and_workers_forget_its_requests(stack: Any) -> None:
    image = held_out(1, seed=6)[0]
    body = stack.body(image.images, image.question, max_tokens=1500, ignore_eos=True)

    async def cut() -> None:
        asking = asyncio.create_task(stack.all([body]))
        await asyncio.sleep(1.0)
        stack.kill("gateway")
        with pytest.raises(httpx.HTTPError):
            await asking

    asyncio.run(cut())
    stack.wait_ready()
    until = time.monotonic() + 6
    while any(w["running"] for w in stack.pipeline()["workers"]) and time.monotonic() < until:
        time.sleep(0.1)
    assert not any(w["running"] for w in stack.pipeline()["workers"])
    (reply,) = asyncio.run(stack.all([stack.body(image.images, image.question, max_tokens=4)]))
    assert reply.status == 200


def test_sigterm_finishes_what_runs_and_ends_every_process(start_stack: Callable[..., Any]) -> None:
    with start_stack(topology="1EPD") as stack:
        image = held_out(1, seed=8)[0]
        body = stack.body(image.images, image.question, max_tokens=60, ignore_eos=True)

        async def drain() -> Any:
            asking = asyncio.create_task(stack.all([body]))
            await asyncio.sleep(0.6)
            stack.kill("gateway", signal.SIGTERM)
            return (await asking)[0]

        pids = [pid for pid in stack.supervisor.children.values() if pid]
        reply = asyncio.run(drain())
        assert (reply.status, reply.error, reply.finish_reason) == (200, None, "length")
        assert reply.usage["completion_tokens"] == 60
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
