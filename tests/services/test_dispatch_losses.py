"""What one accident may cost a request: one attempt, whatever it took down, however it is told."""

from __future__ import annotations

import asyncio

import pytest

from epd.errors import WorkerFailedError
from epd.messages import Evicted, PrefillRequest, RequestFailed, StepToken, Tokens
from epd.request import TokenOutput

FOUR = {"p": "P", "p2": "P", "d": "D", "d2": "D"}


def test_workers_lost_together_cost_one_failure(world):
    async def scenario():
        async with world(**FOUR) as w:
            generation = w.ask()
            await w.settle()
            (record,) = w.dispatcher.attempts.records.values()
            assert (record.prefill, record.decode) == ("p", "d")
            await w.wait(1.5, "p", "d")
            await asyncio.sleep(0.05)
            await w.settle()
            assert (record.failures, record.attempt) == (1, 2)
            assert (record.prefill, record.decode) == ("p2", "d2")
            assert [m.attempt for m in w.worker("p2").read(PrefillRequest)] == [2]
            generation.cancel()

    world.run(scenario())


def test_an_attempt_that_ends_twice_is_repeated_once(world):
    async def scenario():
        async with world(**FOUR) as w:
            generation = w.ask()
            await w.settle()
            (record,) = w.dispatcher.attempts.records.values()
            failed = RequestFailed(
                request_id="q", attempt=1, code="internal_error", message="x", retryable=True
            )
            for message in (Evicted(request_id="q", attempt=1), failed, failed):
                w.worker("d").send(message)
            await w.settle()
            await asyncio.sleep(0.1)
            await w.settle()
            assert (record.failures, record.attempt) == (0, 2)
            assert w.dispatcher.counters["retries"] == 1
            generation.cancel()

    world.run(scenario())


@pytest.mark.parametrize(("index", "reason"), [(0, "exhausted"), (1 << 30, None), (8, None)])
def test_a_token_that_cannot_be_ends_its_request_and_no_other(world, index, reason):
    async def scenario():
        async with world(**FOUR) as w:
            broken, whole = w.ask(name="broken"), w.ask(name="whole")
            await w.settle()
            step = [
                StepToken("broken", 1, TokenOutput(index, 40), reason),
                StepToken("whole", 1, TokenOutput(0, 41), "length"),
            ]
            w.worker("p").send(Tokens(tokens=step))
            await w.settle()
            assert [t.token_id async for event in whole for t in event.tokens] == [41]
            with pytest.raises(WorkerFailedError):
                async with asyncio.timeout(5):
                    async for _ in broken:
                        pass
            assert not w.dispatcher.attempts.records

    world.run(scenario())
