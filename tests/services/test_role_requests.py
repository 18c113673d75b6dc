"""Requests while roles move: what a switch does to what runs and waits, and closed admission."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from epd.errors import UnavailableError
from epd.messages import (
    Adopted,
    Cancel,
    EncodeRequest,
    MoveDecode,
    PrefillDone,
    PrefillRequest,
    Returned,
    StepToken,
    SwitchAbort,
    Tokens,
)
from epd.request import TokenOutput
from epd_services.gateway.dispatch_api import Generation
from epd_services.gateway.refusals import (
    LastWorkerError,
    UnknownWorkerError,
)


async def decoding(w: Any, name: str = "q", worker: str = "d") -> Generation:
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


def test_running_answers_move_and_their_tokens_come_once_and_in_order(world: Any) -> None:
    async def check() -> None:
        async with world() as w:
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

    world.run(check())


@pytest.mark.parametrize("victim", ["d", "d2"])
def test_losing_either_side_of_a_move_starts_the_answer_again_from_its_tokens(
    world: Any, victim: str
) -> None:
    async def check() -> None:
        async with world() as w:
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

    world.run(check())


def test_losing_the_last_peer_takes_the_switch_back_and_the_answer_waits_for_it(world: Any) -> None:
    async def check() -> None:
        async with world() as w:
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

    world.run(check())


def test_without_a_peer_the_answer_stays_until_it_is_handed_back(world: Any) -> None:
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

    world.run(check())


def test_an_answer_that_reaches_a_leaving_worker_moves_on(world: Any) -> None:
    async def check() -> None:
        async with world() as w:
            w.ask()
            await w.settle()
            w.dispatcher._attempts.records["q"].decode = "d"
            w.switch("d", "P")
            assert w.worker("d").read(MoveDecode) == []
            w.worker("p").send(prefilled("q"))
            w.worker("d").send(adopted("q"))
            await w.settle()
            assert [m.consumer for m in w.worker("d").read(MoveDecode)] == ["d2"]

    world.run(check())


def test_a_prompt_that_is_prefilled_where_it_would_decode_moves_when_it_is_done(world: Any) -> None:
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

    world.run(check())


def test_returned_images_go_to_another_encoder_without_counting_as_failures(world: Any) -> None:
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

    world.run(check())


def test_a_returned_prompt_goes_to_a_peer_and_the_old_attempt_is_forgotten(world: Any) -> None:
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

    world.run(check())


def test_work_of_stages_that_stay_is_left_alone_by_the_commit(world: Any) -> None:
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

    world.run(check())


def test_what_a_worker_kept_of_an_ended_stage_starts_again_at_the_commit(world: Any) -> None:
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

    world.run(check())


# admission


def test_a_drained_worker_gets_nothing_new_and_keeps_what_it_has(world: Any) -> None:
    async def check() -> None:
        async with world() as w:
            generation = await decoding(w)
            assert w.roles.drain("d") and not w.roles.drain("d")
            assert w.roles.state(w.members.workers["d"]) == "drained"
            assert w.hosting("D") == ["d2"]
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
            assert w.hosting("D") == ["d2"]
            for unknown in (w.roles.drain, w.roles.resume):
                with pytest.raises(UnknownWorkerError):
                    unknown("nobody")

    world.run(check())


def test_a_drain_lasts_as_long_as_the_life_of_its_worker(world: Any) -> None:
    async def check() -> None:
        async with world() as w:
            w.roles.drain("d")
            await w.wait(3.0, "d")
            assert "d" not in w.members.workers
            w.worker("d").beat()
            await w.settle()
            assert w.hosting("D") == ["d2"], "only silent for a while: still drained"
            assert w.roles.state(w.members.workers["d"]) == "drained"
            w.worker("d").restart("D")
            w.worker("d").beat()
            await w.settle()
            assert w.hosting("D") == ["d", "d2"], "a new life is in service"
            assert w.roles.state(w.members.workers["d"]) == "serving"
            assert not w.roles.resume("d")
            assert w.roles.drain("d"), "and may be drained again"

    world.run(check())
