"""Roles that move while requests run: every token of every answer once, equal to the undisturbed
one, and every block back.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import random
import weakref
from collections import Counter
from collections.abc import Coroutine
from typing import Any

import pytest

from epd.config import EngineConfig
from epd.errors import EPDError
from epd.request import TokenOutput
from epd.roles import format_stages
from epd_services.gateway.switches import SwitchRecord, SwitchState

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "top_p": 0.9, "seed": 11},
    "penalties": {
        "temperature": 0.8, "seed": 5, "repetition_penalty": 1.3, "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
    },
    "logprobs": {"logprobs": 3},
}  # fmt: skip


def go(work: Coroutine[object, object, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(90):
            await work

    asyncio.run(bounded())


def ids(answers: list[list[TokenOutput]]) -> list[list[int]]:
    return [[token.token_id for token in tokens] for tokens in answers]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_long_answer_moves_to_a_peer_and_nobody_can_tell(
    switch_bench: Any, sampling: str
) -> None:
    async def run() -> None:
        request = switch_bench.request(1, max_tokens=420, **SAMPLINGS[sampling])
        [expected] = await switch_bench.undisturbed([request])
        async with switch_bench.pipeline("1E1P2D") as pipeline:
            running = asyncio.create_task(switch_bench.ask(pipeline, [request]))
            await switch_bench.produced(pipeline, request, 20)
            record = await switch_bench.switch(pipeline, "w2-D", "P", drain_seconds=1.0)
            assert (record.state, record.moved) == (SwitchState.DONE, 1)
            assert record.phases["drain"] < 0.9
            [got] = await running
            assert len(got) == 420
            assert got == expected
            counters = pipeline.dispatcher.counters
            assert counters["retries"] == counters["returned"] == counters["repeated_tokens"] == 0
            worker = pipeline.workers["w2-D"]
            assert (format_stages(worker.stages), worker.epoch) == ("P", 1)
            await switch_bench.no_leaks(pipeline)

    go(run())


def test_a_moved_answer_moves_on_and_comes_home(switch_bench: Any) -> None:
    """There and back under one attempt: the first worker takes its own request again."""

    async def run() -> None:
        request = switch_bench.request(max_tokens=600)
        expected = await switch_bench.undisturbed([request])
        async with switch_bench.pipeline("1E1P2D") as pipeline:
            running = asyncio.create_task(switch_bench.ask(pipeline, [request]))
            count = 0
            for worker, stages in (("w2-D", "P"), ("w2-D", "D"), ("w3-D", "P"), ("w3-D", "PD"),
                                   ("w2-D", "E")):  # fmt: skip
                count += 10
                await switch_bench.produced(pipeline, request, count)
                record = await switch_bench.switch(pipeline, worker, stages, drain_seconds=1.0)
                assert record.state is SwitchState.DONE, record
            assert pipeline.dispatcher.counters["moved"] == 3
            assert ids(await running) == ids(expected)
            assert pipeline.dispatcher.counters["retries"] == 0
            await switch_bench.no_leaks(pipeline)

    go(run())


ROUTES = [
    ("1E1PD1P1D", "w1-PD", ["D", "PD"]),
    ("2E1P1D", "w0-E", ["PD", "E"]),
    ("1E1P2D", "w2-D", ["EPD", "D"]),
    ("1E2P2D", "w1-P", ["D", "P"]),
    ("1E2P2D", "w3-D", ["P", "D"]),
    ("2EPD", "w0-EPD", ["E", "P", "D", "EP", "PD", "ED", "EPD"]),
]


@pytest.mark.parametrize(("topology", "worker", "route"), ROUTES)
def test_roles_change_while_requests_run_and_every_answer_is_right(
    switch_bench: Any, topology: str, worker: str, route: list[str]
) -> None:
    async def run() -> None:
        requests = [
            switch_bench.request(
                *range(n % 7, n % 7 + n % 3), max_tokens=10 + 7 * (n % 5), seed=n,
                temperature=n % 2 * 0.9,
            )
            for n in range(30)
        ]  # fmt: skip
        expected = await switch_bench.undisturbed(requests)
        async with switch_bench.pipeline(topology) as pipeline:
            running = asyncio.create_task(switch_bench.ask(pipeline, requests, 0.02))
            await switch_bench.produced(pipeline, requests[1], 1)
            for epoch, stages in enumerate(route, 1):
                record = await switch_bench.switch(pipeline, worker, stages)
                assert record.state is SwitchState.DONE, record
                assert format_stages(pipeline.workers[worker].stages) == stages
                assert pipeline.workers[worker].epoch == epoch
            assert ids(await running) == ids(expected)
            assert pipeline.dispatcher.counters["workers_lost"] == 0
            await switch_bench.no_leaks(pipeline)
            host = pipeline.workers[worker].hosted
            assert (host.encode is not None) == ("E" in route[-1])
            assert (host.prefill is not None) == ("P" in route[-1])
            assert (host.decode is not None) == ("D" in route[-1])

    go(run())


def test_what_cannot_move_is_recomputed_elsewhere(switch_bench: Any) -> None:
    async def run() -> None:
        request = switch_bench.request(2, max_tokens=400)
        expected = await switch_bench.undisturbed([request])
        async with switch_bench.pipeline("1E1P2D") as pipeline:
            running = asyncio.create_task(switch_bench.ask(pipeline, [request]))
            await switch_bench.produced(pipeline, request, 10)
            pipeline.failpoints.arm("switch.move", "raise")
            record = await switch_bench.switch(pipeline, "w2-D", "P", drain_seconds=1.0)
            assert record.state is SwitchState.DONE
            assert ids(await running) == ids(expected)
            assert pipeline.dispatcher.counters["returned"] == 1
            await switch_bench.no_leaks(pipeline)

    go(run())


@pytest.mark.parametrize(("worker", "stages"), [("w0-E", "P"), ("w2-P", "D"), ("w4-D", "P")])
def test_waiting_work_goes_back_and_is_placed_elsewhere(
    switch_bench: Any, worker: str, stages: str
) -> None:
    """A burst much longer than the queues drain: images, prompts and offers wait."""

    async def run() -> None:
        tight = EngineConfig(num_blocks=64, max_batched_tokens=32, max_num_seqs=4)
        requests = [switch_bench.request(n, n + 50, max_tokens=30) for n in range(20)]
        expected = await switch_bench.undisturbed(requests)
        async with switch_bench.pipeline("2E2P2D", config=tight) as pipeline:
            running = asyncio.create_task(switch_bench.ask(pipeline, requests))
            stats = pipeline.workers[worker].stats
            await switch_bench.until(
                lambda: stats().encode_queue + stats().prefill_waiting + stats().handoff_queue > 5
            )
            record = await switch_bench.switch(pipeline, worker, stages, drain_seconds=10.0)
            assert record.state is SwitchState.DONE
            assert ids(await running) == ids(expected)
            assert pipeline.dispatcher.counters["returned"] > 2
            await switch_bench.no_leaks(pipeline)

    go(run())


def test_with_nowhere_to_go_an_answer_ends_where_it_is_if_time_allows(switch_bench: Any) -> None:
    async def run() -> None:
        request = switch_bench.request(max_tokens=60)
        expected = await switch_bench.undisturbed([request])
        async with switch_bench.pipeline("1E1P1D") as pipeline:
            running = asyncio.create_task(switch_bench.ask(pipeline, [request]))
            await switch_bench.produced(pipeline, request, 5)
            record = await switch_bench.switch(pipeline, "w2-D", "P", force=True)
            assert record.state is SwitchState.DONE
            assert ids(await running) == ids(expected)
            assert pipeline.dispatcher.counters["retries"] == 0

    go(run())


@pytest.mark.parametrize("worker", ["w1-PD", "w3-D"])
def test_the_kv_pool_of_a_role_that_ended_is_freed_at_once(switch_bench: Any, worker: str) -> None:
    async def run() -> None:
        async with switch_bench.pipeline("1E1PD1P1D") as pipeline:
            await switch_bench.ask(pipeline, [switch_bench.request(n) for n in range(4)])
            loop = pipeline.workers[worker].hosted.loop
            pool = weakref.ref(loop.core.pool)
            del loop
            gc.disable()
            try:
                assert pool() is not None
                record = await switch_bench.switch(pipeline, worker, "E")
                assert (record.state, pool()) == (SwitchState.DONE, None)
            finally:
                gc.enable()

    go(run())


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_random_switches_of_random_workers_lose_and_change_nothing(
    switch_bench: Any, seed: int
) -> None:
    """Two at a time, in any direction; the gateway refuses those that cannot be."""

    async def run() -> None:
        rng = random.Random(seed)
        requests = [
            switch_bench.request(
                *(rng.randrange(9) for _ in range(n % 3)), max_tokens=rng.randrange(5, 70),
                temperature=n % 2 * 1.0, seed=n,
            )
            for n in range(50)
        ]  # fmt: skip
        expected = await switch_bench.undisturbed(requests)
        async with switch_bench.pipeline("2E2P2D") as pipeline:

            async def switching() -> list[SwitchRecord]:
                done: list[SwitchRecord] = []
                while len(done) < 12:
                    worker = rng.choice(sorted(pipeline.workers))
                    stages = rng.choice(["E", "P", "D", "EP", "ED", "PD", "EPD"])
                    limit = rng.choice([0.0, 3.0])
                    with contextlib.suppress(EPDError):
                        record = await switch_bench.switch(
                            pipeline, worker, stages, drain_seconds=limit
                        )
                        done += [record] * (record.state is not SwitchState.UNCHANGED)
                    await asyncio.sleep(0.01)
                return done

            switches = [asyncio.create_task(switching()) for _ in range(2)]
            assert ids(await switch_bench.ask(pipeline, requests, 0.02)) == ids(expected)
            states = Counter(r.state for done in await asyncio.gather(*switches) for r in done)
            assert states[SwitchState.DONE] >= 16
            assert set(states) <= {SwitchState.DONE, SwitchState.FAILED}
            assert pipeline.dispatcher.counters["workers_lost"] == 0
            await switch_bench.no_leaks(pipeline)

    go(run())
