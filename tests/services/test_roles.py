"""The gateway's half of a role switch against scripted workers, on a fake clock."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from epd.errors import EPDError, UnavailableError
from epd.membership import Membership
from epd.messages import (
    Adopted,
    Cancel,
    Encoded,
    EncodeRequest,
    MoveDecode,
    PrefillDone,
    PrefillRequest,
    Returned,
    StepToken,
    SwitchAbort,
    SwitchRole,
    Tokens,
)
from epd.node import GATEWAY, Identity, Node
from epd.request import SamplingParams, TokenOutput
from epd.roles import parse_stages
from epd.transport import InMemoryTransport
from epd.wire import Codec
from epd_services.gateway.dispatch_api import Generation, ImagePixels, Submission
from epd_services.gateway.dispatcher import PipelineDispatcher
from epd_services.gateway.fake_worker import FakeWorker
from epd_services.gateway.refusals import (
    ImpossibleStagesError,
    LastWorkerError,
    OperatorError,
    StaleEpochError,
    SwitchUnderWayError,
    UnknownSwitchError,
    UnknownWorkerError,
    UnsettledWorkerError,
)
from epd_services.gateway.switches import SwitchRecord

E, P, D, PD, EPD = map(parse_stages, ("E", "P", "D", "PD", "EPD"))


class World:
    """A gateway without sockets, its clock, and the workers around it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.steps: list[str] = []
        self.network: dict[str, Any] = {}
        self.workers: dict[str, FakeWorker] = {}
        self.members = Membership("r", self.clock)
        self.node = Node(Identity(GATEWAY, 7), InMemoryTransport(GATEWAY, self.network), Codec())
        self.dispatcher = PipelineDispatcher(
            self.node, self.members, None, clock=self.clock, failpoint=self.steps.append
        )
        self.roles = self.dispatcher.roles

    def clock(self) -> float:
        return self.now

    def worker(self, name: str) -> FakeWorker:
        return self.workers[name]

    async def join(self, **stages: str) -> None:
        for name, letters in stages.items():
            self.workers[name] = FakeWorker(self.network, name, letters)
            self.workers[name].beat()
        await self.settle()

    async def settle(self) -> None:
        """Let every message that is under way arrive."""
        for _ in range(20):
            await asyncio.sleep(0)
        while not self.network[GATEWAY].empty():
            await asyncio.sleep(0)
        await asyncio.sleep(0)

    async def wait(self, seconds: float, *silent: str) -> None:
        """Let time pass; everybody but the `silent` goes on sending heartbeats."""
        until = self.now + seconds
        while self.now < until:
            self.now = min(until, self.now + 0.25)
            for name, worker in self.workers.items():
                if name not in silent:
                    worker.read(SwitchRole)
                    worker.beat()
            await self.settle()
            self.dispatcher._apply(self.members.expire())
            self.roles.tick()

    def ask(self, images: int = 0, name: str = "q") -> Generation:
        pixels = [ImagePixels(1, 1, bytes([n, 0, 0])) for n in range(images)]
        return self.dispatcher.submit(
            Submission(
                request_id=name, prompt_token_ids=[1], images=pixels, timeout_s=60.0,
                sampling=SamplingParams(max_tokens=8, ignore_eos=True), salt="",
            )
        )  # fmt: skip

    def switch(self, worker: str, stages: str, **options: Any) -> SwitchRecord:
        return self.roles.start(worker, parse_stages(stages), drain_seconds=2.0, **options)


@asynccontextmanager
async def world(**stages: str) -> AsyncIterator[World]:
    made = World()
    listening = asyncio.create_task(made.node.run())
    await made.join(**stages)
    try:
        yield made
    finally:
        await made.dispatcher._attempts.stop()
        listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await listening


def run(work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await work

    asyncio.run(bounded())


FOUR = {"e": "E", "p": "P", "d": "D", "d2": "D"}


def names(world: World, stages: str) -> list[str]:
    return [w.worker_id for w in world.members.hosting(*parse_stages(stages))]


def test_a_switch_from_wish_to_done() -> None:
    async def check() -> None:
        async with world(**FOUR) as w:
            record = w.switch("d", "P")
            assert (record.state, record.old, record.new, record.epoch) == ("draining", "D", "P", 0)
            assert names(w, "D") == ["d2"], "an ending stage gets nothing from the start"
            order = w.worker("d").read(SwitchRole)
            assert [(o.switch_id, o.stages, o.epoch, o.drain_seconds) for o in order] == [
                (record.switch_id, "P", 0, 2.0)
            ]
            w.worker("d").obey("drain")
            await w.settle()
            assert record.state == "switching"
            w.now += 0.25
            w.worker("d").obey("ready")
            await w.settle()
            assert record.state == "committing"
            assert names(w, "P") == ["p"]
            w.now += 0.25
            w.worker("d").commit()
            await w.settle()
            assert record.state == "done" and record.error is None and record.final
            assert record.phases == {
                "drain": 0.5, "unload": 0.5, "load": 0.5, "commit": 0.25, "total": 0.5
            }  # fmt: skip
            assert record.resident_bytes == 1000
            assert names(w, "P") == ["d", "p"] and names(w, "D") == ["d2"]
            assert w.steps == ["admin.accepted", "admin.ready", "admin.committed"]
            assert w.roles.history() == [record] and w.roles.get(record.switch_id) is record
            told = {p.worker_id: (p.stages, p.epoch) for p in w.members.peers()}
            assert told["d"] == ("P", 1)
            assert w.dispatcher.counters["workers_lost"] == 0

    run(check())


def test_the_same_wish_twice_is_one_switch() -> None:
    async def check() -> None:
        async with world(**FOUR) as w:
            record = w.switch("d", "P")
            assert w.switch("d", "P", epoch=0) is record
            assert len(w.worker("d").read(SwitchRole)) == 1
            w.worker("d").obey("ready")
            await w.settle()
            w.worker("d").commit()
            await w.settle()
            again = w.switch("d", "P")
            assert again.state == "unchanged" and again.final
            assert w.worker("d").read(SwitchRole) == []
            assert w.roles.history() == [record]

    run(check())


def refused_with(w: World, kind: type[OperatorError], worker: str, stages: str, **more: Any) -> str:
    """The text of a refusal that changed nothing."""
    before = (dict(w.members.leaving), set(w.members.closed), len(w.roles.history()))
    with pytest.raises(kind) as caught:
        w.switch(worker, stages, **more)
    assert (dict(w.members.leaving), set(w.members.closed), len(w.roles.history())) == before
    assert len(str(caught.value).splitlines()) == 3
    return str(caught.value)


def test_every_refusal_changes_nothing_and_says_what_next() -> None:
    async def check() -> None:
        async with world(**FOUR) as w:
            assert "d, d2, e, p" in refused_with(w, UnknownWorkerError, "nobody", "P")
            assert "epoch 0" in refused_with(w, StaleEpochError, "d", "P", epoch=3)
            assert "last worker of P" in refused_with(w, LastWorkerError, "p", "D")
            assert "last worker of E" in refused_with(w, LastWorkerError, "e", "PD")
            with pytest.raises(ImpossibleStagesError):
                w.roles.start("d", frozenset(), drain_seconds=1.0)
            for seconds in (-1.0, 1e9, float("nan"), float("inf")):
                with pytest.raises(ImpossibleStagesError):
                    w.roles.start("d", P, drain_seconds=seconds)
            record = w.switch("d", "P")
            assert "draining" in refused_with(w, SwitchUnderWayError, "d", "E")
            assert "last worker of D" in refused_with(w, LastWorkerError, "d2", "P")
            w.worker("d2").accepting = False
            w.worker("d2").beat()
            await w.settle()
            refused_with(w, UnsettledWorkerError, "d2", "P", force=True)
            with pytest.raises(UnknownSwitchError):
                w.roles.get("nothing")
            for worker in w.workers.values():
                orders = worker.read(SwitchRole)
                assert [o.switch_id for o in orders] == [record.switch_id] * (worker.name == "d")

    run(check())


def test_the_last_worker_moves_when_forced_and_others_hear_a_typed_error() -> None:
    async def check() -> None:
        async with world(e="E", p="P", d="D") as w:
            record = w.switch("d", "P", force=True)
            assert record.state == "draining"
            with pytest.raises(UnavailableError, match="decode"):
                w.ask()

    run(check())


@pytest.mark.parametrize("phase", ["begin", "drain", "unload", "load", "ready"])
def test_a_worker_that_goes_back_serves_its_old_role_again(phase: str) -> None:
    async def check() -> None:
        async with world(**FOUR) as w:
            record = w.switch("d", "P")
            w.worker("d").obey(phase)
            await w.settle()
            w.worker("d").fail(phase, "no room")
            await w.settle()
            assert record.state == "failed" and record.error == f"{phase}: no room"
            assert names(w, "D") == ["d", "d2"] and names(w, "P") == ["p"]
            assert w.roles.state(w.members.workers["d"]) == "serving"
            assert w.switch("d", "P").state == "draining", "and may be asked again"

    run(check())


def test_going_back_without_a_word_shows_in_the_heartbeat() -> None:
    async def check() -> None:
        async with world(**FOUR) as w:
            record = w.switch("d", "P")
            w.worker("d").obey("ready")
            await w.settle()
            w.worker("d").switch = None
            w.worker("d").beat()
            await w.settle()
            assert record.state == "failed" and names(w, "D") == ["d", "d2"]

    run(check())


@pytest.mark.parametrize("phase", ["begin", "drain", "load", "ready"])
def test_a_worker_lost_in_the_middle_ends_its_switch(phase: str) -> None:
    async def check() -> None:
        async with world(**FOUR) as w:
            record = w.switch("d", "P")
            w.worker("d").obey(phase)
            await w.wait(2.0, "d")
            assert record.state == "lost" and "lost while" in str(record.error)
            assert "d" not in w.members.workers and not w.members.leaving
            w.worker("d").restart("D")
            w.worker("d").beat()
            await w.settle()
            assert names(w, "D") == ["d", "d2"]
            assert w.roles.state(w.members.workers["d"]) == "serving"

    run(check())


def test_a_restart_before_the_silence_was_noticed_ends_the_switch_too() -> None:
    async def check() -> None:
        async with world(**FOUR) as w:
            record = w.switch("d", "P")
            w.worker("d").obey("ready")
            await w.settle()
            w.worker("d").restart("D")
            w.worker("d").beat()
            await w.settle()
            assert record.state == "lost"
            assert names(w, "D") == ["d", "d2"] and not w.members.fenced("d")

    run(check())


def test_a_worker_that_never_begins_is_given_up() -> None:
    async def check() -> None:
        async with world(**FOUR) as w:
            record = w.switch("d", "P")
            w.worker("d").read(SwitchRole)
            w.worker("d").switch = None
            for _ in range(24):
                w.now += 0.25
                for worker in w.workers.values():
                    worker.beat()
                await w.settle()
                w.roles.tick()
            assert record.state == "failed" and "did not begin" in str(record.error)
            assert [a.switch_id for a in w.worker("d").read(SwitchAbort)] == [record.switch_id]
            assert names(w, "D") == ["d", "d2"]

    run(check())


def test_a_load_that_takes_too_long_is_aborted_and_fenced_until_the_worker_is_back() -> None:
    async def check() -> None:
        async with world(**FOUR) as w:
            record = w.switch("d", "P")
            w.worker("d").obey("unload")
            await w.wait(63.0)
            assert record.state == "failed" and "in time" in str(record.error)
            assert record.switch_id in w.worker("d").aborted
            assert names(w, "D") == ["d2"]
            assert w.roles.state(w.members.workers["d"]) == "fenced"
            refused_with(w, UnsettledWorkerError, "d", "P")
            w.worker("d").fail("load", "aborted")
            await w.settle()
            assert names(w, "D") == ["d", "d2"]
            assert record.error == "the new role was not loaded in time"

    run(check())


def test_silence_after_the_commit_fences_until_the_new_epoch_is_heard() -> None:
    async def check() -> None:
        async with world(**FOUR) as w:
            record = w.switch("d", "P")
            w.worker("d").obey("ready")
            await w.wait(16.0)
            assert record.state == "failed" and "fenced" in str(record.error)
            assert names(w, "D") == ["d2"] and names(w, "P") == ["p"]
            w.worker("d").commit()
            await w.settle()
            assert record.state == "done" and record.error is None
            assert names(w, "P") == ["d", "p"] and names(w, "D") == ["d2"]

    run(check())


def test_a_frozen_worker_comes_back_in_one_role_only() -> None:
    """Declared lost after the commit was sent; then it takes that commit after all."""

    async def check() -> None:
        async with world(**FOUR) as w:
            record = w.switch("d", "P")
            w.worker("d").obey("ready")
            await w.wait(2.0, "d")
            assert record.state == "lost"
            w.worker("d").beat()
            await w.settle()
            assert w.roles.state(w.members.workers["d"]) == "fenced"
            assert names(w, "D") == ["d2"] and names(w, "P") == ["p"]
            w.worker("d").commit()
            await w.settle()
            assert names(w, "D") == ["d2"] and names(w, "P") == ["d", "p"]

    run(check())


def test_a_switch_of_an_earlier_gateway_is_sent_back() -> None:
    async def check() -> None:
        async with world(**FOUR) as w:
            stray = w.worker("d")
            stray.switch = SwitchRole(switch_id="old-1", stages="P", epoch=0, drain_seconds=1.0)
            stray.beat()
            await w.settle()
            assert names(w, "D") == ["d2"]
            assert [a.switch_id for a in stray.read(SwitchAbort)] == ["old-1"]
            stray.switch = None
            stray.beat()
            await w.settle()
            assert names(w, "D") == ["d", "d2"]

    run(check())


def test_late_words_of_an_old_epoch_are_dropped_and_counted() -> None:
    async def check() -> None:
        async with world(**FOUR) as w:
            w.switch("d", "P")
            w.worker("d").obey("ready")
            await w.settle()
            w.worker("d").commit()
            await w.settle()
            w.worker("d").epoch, w.worker("d").stages = 0, "D"
            w.worker("d").beat()
            await w.settle()
            assert names(w, "P") == ["d", "p"] and names(w, "D") == ["d2"]
            assert w.members.stale_epochs + w.node.rejected["stale epoch"] == 1

    run(check())


def test_unreachable_means_nothing_changed() -> None:
    async def check() -> None:
        async with world(**FOUR) as w:
            w.node.know([])
            with pytest.raises(UnavailableError, match="nothing was changed"):
                w.switch("d", "P")
            assert w.roles.history() == [] and w.members.leaving == {}

    run(check())


# requests


async def decoding(w: World, name: str = "q", worker: str = "d") -> Generation:
    """A request that `worker` decodes, two tokens into its answer."""
    generation = w.ask(name=name)
    await w.settle()
    record = w.dispatcher._attempts.records[name]
    record.decode = worker
    w.worker(record.prefill).send(prefilled(name))
    w.worker(record.prefill).send(tokens(name, 0))
    w.worker(worker).send(adopted(name))
    w.worker(worker).send(tokens(name, 1))
    await w.settle()
    return generation


def prefilled(name: str, attempt: int = 1) -> PrefillDone:
    return PrefillDone(
        request_id=name, attempt=attempt, prompt_tokens=1, image_tokens=0, cached_tokens=0,
        queue_seconds=0.0, prefill_seconds=0.0,
    )  # fmt: skip


def adopted(name: str, attempt: int = 1) -> Adopted:
    return Adopted(request_id=name, attempt=attempt, transfer_seconds=0.0, transfer_bytes=0)


def tokens(name: str, index: int, attempt: int = 1, end: str | None = None) -> Tokens:
    return Tokens(tokens=[StepToken(name, attempt, TokenOutput(index, 40 + index), end)])


async def answer(generation: Generation) -> list[int]:
    return [token.token_id async for event in generation for token in event.tokens]


def test_running_answers_move_and_their_tokens_come_once_and_in_order() -> None:
    async def check() -> None:
        async with world(**FOUR) as w:
            generation = await decoding(w)
            record = w.switch("d", "P")
            assert record.moved == 1
            moves = w.worker("d").read(MoveDecode)
            assert [(m.request_id, m.attempt, m.consumer) for m in moves] == [("q", 1, "d2")]
            # the last token of the old worker and the first of the new one overtake each other
            w.worker("d2").send(adopted("q"))
            w.worker("d2").send(tokens("q", 3))
            w.worker("d").send(tokens("q", 2))
            w.worker("d2").send(tokens("q", 4, end="length"))
            await w.settle()
            assert await answer(generation) == [40, 41, 42, 43, 44]
            assert w.dispatcher.counters["retries"] == 0
            assert w.dispatcher.counters["moved"] == 1

    run(check())


@pytest.mark.parametrize("victim", ["d", "d2"])
def test_losing_either_side_of_a_move_starts_the_answer_again_from_its_tokens(victim: str) -> None:
    async def check() -> None:
        async with world(**FOUR) as w:
            generation = await decoding(w)
            await w.join(d3="D")
            w.switch("d", "P")
            w.worker("p").read(PrefillRequest)
            await w.wait(1.5, victim)
            await asyncio.sleep(0.05)
            record = w.dispatcher._attempts.records["q"]
            assert (record.attempt, record.prefill) == (2, "p")
            assert record.decode == ("d3" if victim == "d2" else "d2")
            w.worker(record.decode).send(tokens("q", 2, attempt=2, end="length"))
            await w.settle()
            assert await answer(generation) == [40, 41, 42]

    run(check())


def test_losing_the_last_peer_takes_the_switch_back_and_the_answer_waits_for_it() -> None:
    async def check() -> None:
        async with world(**FOUR) as w:
            generation = await decoding(w)
            record = w.switch("d", "P")
            w.worker("d").obey("drain")
            await w.wait(1.5, "d2")
            assert record.state == "failed" and record.error == "taken back: d2 was lost"
            assert [a.switch_id for a in w.worker("d").read(SwitchAbort)] == [record.switch_id]
            w.ask(name="new")
            w.worker("d").fail("load", "aborted")
            await w.settle()
            await asyncio.sleep(0.1)
            again = w.dispatcher._attempts.records
            assert [(again[n].attempt, again[n].decode) for n in ("q", "new")] == [
                (2, "d"), (1, "d")
            ]  # fmt: skip
            w.worker("d").send(tokens("q", 2, attempt=2, end="length"))
            await w.settle()
            assert await answer(generation) == [40, 41, 42]

    run(check())


def test_without_a_peer_the_answer_stays_until_it_is_handed_back() -> None:
    async def check() -> None:
        async with world(e="E", p="P", d="D") as w:
            generation = await decoding(w)
            record = w.switch("d", "P", force=True)
            assert record.moved == 0 and w.worker("d").read(MoveDecode) == []
            w.worker("d").send(tokens("q", 2))
            w.worker("d").send(Returned(request_id="q", attempt=1))
            await w.settle()
            await asyncio.sleep(0.05)
            with pytest.raises(UnavailableError, match="decode"):
                await answer(generation)
            assert w.dispatcher._attempts.records == {}

    run(check())


def test_an_answer_that_reaches_a_leaving_worker_moves_on() -> None:
    async def check() -> None:
        async with world(**FOUR) as w:
            w.ask()
            await w.settle()
            w.dispatcher._attempts.records["q"].decode = "d"
            w.switch("d", "P")
            assert w.worker("d").read(MoveDecode) == []
            w.worker("p").send(prefilled("q"))
            w.worker("d").send(adopted("q"))
            await w.settle()
            assert [m.consumer for m in w.worker("d").read(MoveDecode)] == ["d2"]

    run(check())


def test_a_prompt_that_is_prefilled_where_it_would_decode_moves_when_it_is_done() -> None:
    async def check() -> None:
        async with world(e="E", pd="PD", d="D") as w:
            w.ask()
            await w.settle()
            record = w.dispatcher._attempts.records["q"]
            assert (record.prefill, record.decode) == ("pd", "pd")
            w.switch("pd", "P")
            assert w.worker("pd").read(MoveDecode) == []
            w.worker("pd").send(prefilled("q"))
            await w.settle()
            assert [m.consumer for m in w.worker("pd").read(MoveDecode)] == ["d"]
            w.ask(name="next")
            await w.settle()
            fresh = w.dispatcher._attempts.records["next"]
            assert (fresh.prefill, fresh.decode) == ("pd", "d"), "P stays, D does not"

    run(check())


def test_returned_images_go_to_another_encoder_without_counting_as_failures() -> None:
    async def check() -> None:
        async with world(e="E", e2="E", p="P", d="D") as w:
            w.ask(images=4)
            await w.settle()
            mine = [m.item for m in w.worker("e").read(EncodeRequest)]
            w.worker("e2").read(EncodeRequest)
            assert mine
            w.switch("e", "P")
            w.worker("e").send(Returned(request_id="q", attempt=1, items=mine))
            await w.settle()
            assert [m.item for m in w.worker("e2").read(EncodeRequest)] == mine
            record = w.dispatcher._attempts.records["q"]
            assert record.failures == 0 and set(record.encoders.values()) == {"e2"}
            # handed back twice: the second time it is somebody else's
            w.worker("e").send(Returned(request_id="q", attempt=1, items=mine))
            await w.settle()
            assert w.worker("e2").read(EncodeRequest) == []

    run(check())


def test_a_returned_prompt_goes_to_a_peer_and_the_old_attempt_is_forgotten() -> None:
    async def check() -> None:
        async with world(e="E", p="P", p2="P", d="D") as w:
            w.ask()
            await w.settle()
            first = w.dispatcher._attempts.records["q"].prefill
            other = "p2" if first == "p" else "p"
            w.switch(first, "D")
            w.worker(first).send(Returned(request_id="q", attempt=1))
            await w.settle()
            await asyncio.sleep(0.05)
            assert [m.attempt for m in w.worker(other).read(PrefillRequest)] == [2]
            w.worker(first).send(Returned(request_id="q", attempt=1))
            await w.settle()
            assert [c.attempt for c in w.worker(first).read(Cancel)][-1] == 1
            assert w.dispatcher._attempts.records["q"].attempt == 2

    run(check())


def test_work_of_stages_that_stay_is_left_alone_by_the_commit() -> None:
    async def check() -> None:
        async with world(e="E", p="P", pd="PD", d="D") as w:
            generation = await decoding(w, worker="pd")
            w.switch("pd", "D")
            assert w.worker("pd").read(MoveDecode) == []
            w.worker("pd").obey("ready")
            await w.settle()
            w.worker("pd").commit()
            await w.settle()
            assert w.dispatcher.counters["retries"] == 0
            w.worker("pd").send(tokens("q", 2, end="length"))
            await w.settle()
            assert await answer(generation) == [40, 41, 42]

    run(check())


def test_what_a_worker_kept_of_an_ended_stage_starts_again_at_the_commit() -> None:
    async def check() -> None:
        async with world(e="E", e2="E", p="P", d="D") as w:
            w.ask(images=4)
            await w.settle()
            mine = [m.item for m in w.worker("e").read(EncodeRequest)]
            w.worker("e2").read(EncodeRequest)
            w.switch("e", "P")
            w.worker("e").obey("ready")
            await w.settle()
            w.worker("e").commit()
            await w.settle()
            assert [m.item for m in w.worker("e2").read(EncodeRequest)] == mine

    run(check())


# admission


def test_a_drained_worker_gets_nothing_new_and_keeps_what_it_has() -> None:
    async def check() -> None:
        async with world(**FOUR) as w:
            generation = await decoding(w)
            assert w.roles.drain("d") and not w.roles.drain("d")
            assert w.roles.state(w.members.workers["d"]) == "drained"
            assert names(w, "D") == ["d2"]
            w.worker("d").send(tokens("q", 2, end="length"))
            await w.settle()
            assert await answer(generation) == [40, 41, 42]
            with pytest.raises(LastWorkerError):
                w.roles.drain("d2")
            assert w.roles.drain("d2", force=True)
            with pytest.raises(UnavailableError):
                w.ask(name="late")
            assert w.dispatcher.ready() == (False, "no live worker hosts decode")
            assert w.roles.resume("d2") and not w.roles.resume("d2")
            assert names(w, "D") == ["d2"]
            for unknown in (w.roles.drain, w.roles.resume):
                with pytest.raises(UnknownWorkerError):
                    unknown("nobody")

    run(check())


# previews


def test_a_preview_tells_moves_refusals_and_what_it_cost_before() -> None:
    async def check() -> None:
        async with world(e="E", e2="E", p="P", d="D", d2="D") as w:
            await decoding(w)
            seen = w.roles.preview("d", P)
            assert (seen.old, seen.new, seen.refused, seen.cost) == ("D", "P", (), {})
            assert any("1 running answers move" in line and "d2" in line for line in seen.moves)
            assert [r.code for r in w.roles.preview("p", D).refused] == ["last_worker"]
            assert w.roles.preview("p", D, force=True).refused == ()
            assert [r.code for r in w.roles.preview("x", D).refused] == ["unknown_worker"]
            assert w.roles.history() == [] and w.worker("d").read(SwitchRole) == []
            for _ in range(2):
                w.switch("d", "P")
                w.worker("d").obey("ready")
                await w.settle()
                w.now += 0.5
                w.worker("d").commit()
                await w.settle()
                w.switch("d", "D")
                w.worker("d").obey("ready")
                await w.settle()
                w.worker("d").commit()
                await w.settle()
            cost = w.roles.preview("d2", P)
            assert cost.measured == 2 and cost.cost["drain"] == 0.5 and cost.cost["commit"] == 0.5
            assert w.roles.preview("d", PD).measured == 4, "the same weights come and go"
            assert w.roles.preview("e", P).measured == 0

    run(check())


def test_records_are_plain_data() -> None:
    async def check() -> None:
        async with world(**FOUR) as w:
            data = w.switch("d", "P", reason="elastic: decode idle").as_json()
            assert data["state"] == "draining" and data["reason"] == "elastic: decode idle"
            assert data["final"] is False and data["phases"] == {}
            assert w.roles.preview("d2", EPD).refused == (), "no stage ends"
            preview = w.roles.preview("d2", E).as_json()
            assert preview["refused"][0]["code"] == "last_worker"
            assert set(preview["refused"][0]) == {"code", "what", "why", "next"}

    run(check())


def test_encoded_images_of_a_switched_encoder_are_not_asked_again() -> None:
    async def check() -> None:
        async with world(e="E", e2="E", p="P", d="D") as w:
            w.ask(images=2)
            await w.settle()
            for name in ("e", "e2"):
                for order in w.worker(name).read(EncodeRequest):
                    w.worker(name).send(
                        Encoded(
                            request_id="q", attempt=1, item=order.item, cached=False,
                            queue_seconds=0.0, encode_seconds=0.0, transfer_seconds=0.0,
                        )
                    )  # fmt: skip
            w.switch("e", "P")
            w.worker("e").obey("ready")
            await w.settle()
            w.worker("e").commit()
            await w.settle()
            assert w.worker("e2").read(EncodeRequest) == []

    run(check())


def test_errors_are_of_the_one_hierarchy() -> None:
    kinds: list[Callable[..., OperatorError]] = [
        UnknownWorkerError, LastWorkerError, StaleEpochError, ImpossibleStagesError,
        SwitchUnderWayError, UnsettledWorkerError, UnknownSwitchError,
    ]  # fmt: skip
    codes = [kind("a", "b", "c").code for kind in kinds]
    assert len(set(codes)) == len(codes)
    assert all(isinstance(kind("a", "b", "c"), EPDError) for kind in kinds)
