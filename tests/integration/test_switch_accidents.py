"""Accidents in the middle of a switch: the old role again under the old epoch, nothing lost, and
nothing of what came too late counts.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

import pytest

from epd.messages import Heartbeat, SwitchAbort, SwitchCommit, SwitchRole, WorkerStats
from epd.node import GATEWAY, Identity, Node
from epd.request import TokenOutput
from epd.roles import format_stages, parse_stages
from epd.transport import InMemoryTransport
from epd.wire import Codec
from epd_services.gateway.switches import SwitchState

if TYPE_CHECKING:
    from epd_services.local_pipeline import LocalPipeline

PHASES = {
    "switch.received": "drain", "switch.drain": "drain", "switch.unload": "unload",
    "switch.load": "load", "switch.ready": "ready", "switch.commit": "commit",
}  # fmt: skip


def go(work: Coroutine[object, object, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(90):
            await work

    asyncio.run(bounded())


def ids(answers: list[list[TokenOutput]]) -> list[list[int]]:
    return [[token.token_id for token in tokens] for tokens in answers]


def tell(pipeline: LocalPipeline, *orders: SwitchRole | SwitchAbort | SwitchCommit) -> None:
    for order in orders:
        pipeline.dispatcher._node.post("w2-D", order)


@pytest.mark.parametrize(
    ("worker", "stages"),
    [("w2-D", "EP"), *(pytest.param("w0-EPD", s, marks=pytest.mark.slow) for s in ("E", "PD"))],
)
def test_an_accident_in_any_phase_ends_in_the_old_role_under_the_old_epoch(
    switch_bench: Any, worker: str, stages: str
) -> None:
    async def run() -> None:
        requests = [switch_bench.request(*[n] * (n % 2), max_tokens=150 + 30 * n) for n in range(6)]
        expected = await switch_bench.undisturbed(requests)
        async with switch_bench.pipeline("1EPD1EPD1D") as pipeline:
            running = asyncio.create_task(switch_bench.ask(pipeline, requests))
            await switch_bench.produced(pipeline, requests[0], 5)
            host = pipeline.workers[worker]
            for point, phase in PHASES.items():
                pipeline.failpoints.arm(point, "raise")
                record = await switch_bench.switch(pipeline, worker, stages)
                assert record.state is SwitchState.FAILED
                assert record.error is not None
                assert record.error.startswith(f"{phase}: failpoint {point}")
                assert (format_stages(host.stages), host.epoch) == (worker.partition("-")[2], 0)
                pipeline.failpoints.disarm()
            assert ids(await running) == ids(expected)
            record = await switch_bench.switch(pipeline, worker, stages)
            assert (record.state, record.epoch, host.epoch) == (SwitchState.DONE, 0, 1)
            after = [switch_bench.request(1)]
            assert ids(await switch_bench.ask(pipeline, after)) == ids(
                await switch_bench.undisturbed(after)
            )
            await switch_bench.no_leaks(pipeline)

    go(run())


def test_without_a_commit_the_worker_goes_back(switch_bench: Any) -> None:
    async def run() -> None:
        async with switch_bench.pipeline("1E1P2D", commit_seconds=0.2) as pipeline:
            node, worker = pipeline.dispatcher._node, pipeline.workers["w2-D"]
            post = node.post
            node.post = lambda to, message, *rest: (
                isinstance(message, SwitchCommit) or post(to, message, *rest)
            )
            record = await switch_bench.switch(pipeline, "w2-D", "P")
            assert record.state is SwitchState.FAILED
            assert "no commit came in time" in (record.error or "")
            assert (format_stages(worker.stages), worker.epoch) == ("D", 0)
            await switch_bench.ask(pipeline, [switch_bench.request(1)])

    go(run())


def test_an_abort_or_a_new_gateway_sends_the_worker_home_from_any_phase(switch_bench: Any) -> None:
    async def run() -> None:
        async with switch_bench.pipeline("1E1P2D") as pipeline:
            worker, points = pipeline.workers["w2-D"], pipeline.failpoints
            roles = pipeline.dispatcher.roles
            for point in [name for name in PHASES if name != "switch.commit"]:
                points.arm(point, "pause:0.1")
                for why in ("the gateway called it off", "the gateway restarted"):
                    seen = points.hits[point]
                    record = roles.start("w2-D", parse_stages("E"), drain_seconds=5.0)
                    await switch_bench.until(lambda p=point, n=seen: points.hits[p] > n)
                    if "restarted" in why:
                        worker._gateway_life = -1  # as if it had heard another life of it
                        pipeline.dispatcher._announce()
                    else:
                        tell(pipeline, SwitchAbort(switch_id="another"))
                        tell(pipeline, SwitchAbort(switch_id=record.switch_id))
                    await switch_bench.until(lambda r=record: r.final)
                    assert (record.state, why in (record.error or "")) == (SwitchState.FAILED, True)
                    assert (format_stages(worker.stages), worker.epoch) == ("D", 0)
                points.disarm()
            await switch_bench.ask(pipeline, [switch_bench.request(1)])
            await switch_bench.no_leaks(pipeline)

    go(run())


def test_a_worker_refuses_what_it_cannot_do_and_ignores_what_is_not_its_switch(
    switch_bench: Any,
) -> None:
    async def run() -> None:
        async with switch_bench.pipeline("1E1P2D") as pipeline:
            worker = pipeline.workers["w2-D"]
            tell(pipeline, SwitchCommit(switch_id="nothing"), SwitchAbort(switch_id="nothing"))
            for stages, epoch in (("P", 7), ("D", 0), ("EE", 0)):
                order = SwitchRole(switch_id="x", stages=stages, epoch=epoch, drain_seconds=1.0)
                tell(pipeline, order)
            await switch_bench.ask(pipeline, [switch_bench.request(1)])
            assert (format_stages(worker.stages), worker.epoch) == ("D", 0)
            assert worker._switcher.switch_id is None
            assert sum(pipeline.failpoints.hits.values()) == 0

    go(run())


def test_late_frames_of_an_old_epoch_are_dropped_and_counted(switch_bench: Any) -> None:
    async def run() -> None:
        async with switch_bench.pipeline("1E1P2D") as pipeline:
            worker = pipeline.workers["w2-D"]
            old = worker._node.identity
            record = await switch_bench.switch(pipeline, "w2-D", "P")
            assert record.state is SwitchState.DONE
            late = Node(
                Identity(old.name, old.incarnation, old.stages, old.epoch),
                InMemoryTransport("elsewhere", pipeline._network), Codec(),
            )  # fmt: skip
            late._seq = itertools.count(1_000_000)
            beat = Heartbeat(
                address="elsewhere", revision=pipeline.card.revision, encoder_revision="e",
                dtype="float32", stats=WorkerStats(),
            )  # fmt: skip
            for _ in range(3):
                late.post_address(GATEWAY, GATEWAY, beat)
            rejected = pipeline.dispatcher._node.rejected
            await switch_bench.until(lambda: rejected["stale epoch"] == 3)
            known = pipeline.dispatcher._membership.workers["w2-D"]
            assert (known.epoch, format_stages(known.stages)) == (1, "P")
            await switch_bench.ask(pipeline, [switch_bench.request(1)])

    go(run())
