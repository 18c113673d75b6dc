"""The gateway's half of a role switch against scripted workers, on a fake clock."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from epd.errors import EPDError, UnavailableError
from epd.messages import (
    Encoded,
    EncodeRequest,
    SwitchAbort,
    SwitchRole,
)
from epd.roles import parse_stages
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

E, P, D, PD, EPD = map(parse_stages, ("E", "P", "D", "PD", "EPD"))


def test_a_switch_from_wish_to_done(world: Any) -> None:
    async def check() -> None:
        async with world() as w:
            record = w.switch("d", "P")
            assert (record.state, record.old, record.new, record.epoch) == ("draining", "D", "P", 0)
            assert w.hosting("D") == ["d2"], "an ending stage gets nothing from the start"
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
            assert w.hosting("P") == ["p"]
            w.now += 0.25
            w.worker("d").commit()
            await w.settle()
            assert record.state == "done" and record.error is None and record.final
            assert record.phases == {
                "drain": 0.5, "unload": 0.5, "load": 0.5, "commit": 0.25, "total": 0.5
            }  # fmt: skip
            assert record.resident_bytes == 1000
            assert w.hosting("P") == ["d", "p"] and w.hosting("D") == ["d2"]
            assert w.steps == ["admin.accepted", "admin.ready", "admin.committed"]
            assert w.roles.history() == [record] and w.roles.get(record.switch_id) is record
            told = {p.worker_id: (p.stages, p.epoch) for p in w.members.peers()}
            assert told["d"] == ("P", 1)
            assert w.dispatcher.counters["workers_lost"] == 0

    world.run(check())


def test_the_same_wish_twice_is_one_switch(world: Any) -> None:
    async def check() -> None:
        async with world() as w:
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

    world.run(check())


def refused_with(w: Any, kind: type[OperatorError], worker: str, stages: str, **more: Any) -> str:
    """The text of a refusal that changed nothing."""
    before = (dict(w.members.leaving), set(w.members.closed), len(w.roles.history()))
    with pytest.raises(kind) as caught:
        w.switch(worker, stages, **more)
    assert (dict(w.members.leaving), set(w.members.closed), len(w.roles.history())) == before
    assert len(str(caught.value).splitlines()) == 3
    return str(caught.value)


def test_every_refusal_changes_nothing_and_says_what_next(world: Any) -> None:
    async def check() -> None:
        async with world() as w:
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

    world.run(check())


def test_the_last_worker_moves_when_forced_and_others_hear_a_typed_error(world: Any) -> None:
    async def check() -> None:
        async with world(e="E", p="P", d="D") as w:
            record = w.switch("d", "P", force=True)
            assert record.state == "draining"
            with pytest.raises(UnavailableError, match="decode"):
                w.ask()

    world.run(check())


@pytest.mark.parametrize("phase", ["begin", "drain", "unload", "load", "ready"])
def test_a_worker_that_goes_back_serves_its_old_role_again(world: Any, phase: str) -> None:
    async def check() -> None:
        async with world() as w:
            record = w.switch("d", "P")
            w.worker("d").obey(phase)
            await w.settle()
            w.worker("d").fail(phase, "no room")
            await w.settle()
            assert record.state == "failed" and record.error == f"{phase}: no room"
            assert w.hosting("D") == ["d", "d2"] and w.hosting("P") == ["p"]
            assert w.roles.state(w.members.workers["d"]) == "serving"
            assert w.switch("d", "P").state == "draining", "and may be asked again"

    world.run(check())


def test_going_back_without_a_word_shows_in_the_heartbeat(world: Any) -> None:
    async def check() -> None:
        async with world() as w:
            record = w.switch("d", "P")
            w.worker("d").obey("ready")
            await w.settle()
            w.worker("d").switch = None
            w.worker("d").beat()
            await w.settle()
            assert record.state == "failed" and w.hosting("D") == ["d", "d2"]

    world.run(check())


@pytest.mark.parametrize("phase", ["begin", "drain", "load", "ready"])
def test_a_worker_lost_in_the_middle_ends_its_switch(world: Any, phase: str) -> None:
    async def check() -> None:
        async with world() as w:
            record = w.switch("d", "P")
            w.worker("d").obey(phase)
            await w.wait(2.0, "d")
            assert record.state == "lost" and "lost while" in str(record.error)
            assert "d" not in w.members.workers and not w.members.leaving
            w.worker("d").restart("D")
            w.worker("d").beat()
            await w.settle()
            assert w.hosting("D") == ["d", "d2"]
            assert w.roles.state(w.members.workers["d"]) == "serving"

    world.run(check())


def test_a_restart_before_the_silence_was_noticed_ends_the_switch_too(world: Any) -> None:
    async def check() -> None:
        async with world() as w:
            record = w.switch("d", "P")
            w.worker("d").obey("ready")
            await w.settle()
            w.worker("d").restart("D")
            w.worker("d").beat()
            await w.settle()
            assert record.state == "lost"
            assert w.hosting("D") == ["d", "d2"] and not w.members.fenced("d")

    world.run(check())


def test_a_worker_that_never_begins_is_given_up(world: Any) -> None:
    async def check() -> None:
        async with world() as w:
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
            assert w.hosting("D") == ["d", "d2"]

    world.run(check())


def test_a_load_that_takes_too_long_is_aborted_and_fenced_until_the_worker_is_back(
    world: Any,
) -> None:
    async def check() -> None:
        async with world() as w:
            record = w.switch("d", "P")
            w.worker("d").obey("unload")
            await w.wait(63.0)
            assert record.state == "failed" and "in time" in str(record.error)
            assert record.switch_id in w.worker("d").aborted
            assert w.hosting("D") == ["d2"]
            assert w.roles.state(w.members.workers["d"]) == "fenced"
            refused_with(w, UnsettledWorkerError, "d", "P")
            w.worker("d").fail("load", "aborted")
            await w.settle()
            assert w.hosting("D") == ["d", "d2"]
            assert record.error == "the new role was not loaded in time"

    world.run(check())


def test_silence_after_the_commit_fences_until_the_new_epoch_is_heard(world: Any) -> None:
    async def check() -> None:
        async with world() as w:
            record = w.switch("d", "P")
            w.worker("d").obey("ready")
            await w.wait(16.0)
            assert record.state == "failed" and "fenced" in str(record.error)
            assert w.hosting("D") == ["d2"] and w.hosting("P") == ["p"]
            w.worker("d").commit()
            await w.settle()
            assert record.state == "done" and record.error is None
            assert w.hosting("P") == ["d", "p"] and w.hosting("D") == ["d2"]

    world.run(check())


def test_a_frozen_worker_comes_back_in_one_role_only(world: Any) -> None:
    """Declared lost after the commit was sent; then it takes that commit after all."""

    async def check() -> None:
        async with world() as w:
            record = w.switch("d", "P")
            w.worker("d").obey("ready")
            await w.wait(2.0, "d")
            assert record.state == "lost"
            w.worker("d").beat()
            await w.settle()
            assert w.roles.state(w.members.workers["d"]) == "fenced"
            assert w.hosting("D") == ["d2"] and w.hosting("P") == ["p"]
            w.worker("d").commit()
            await w.settle()
            assert w.hosting("D") == ["d2"] and w.hosting("P") == ["d", "p"]

    world.run(check())


def test_a_switch_of_an_earlier_gateway_is_sent_back(world: Any) -> None:
    async def check() -> None:
        async with world() as w:
            stray = w.worker("d")
            stray.switch = SwitchRole(switch_id="old-1", stages="P", epoch=0, drain_seconds=1.0)
            stray.beat()
            await w.settle()
            assert w.hosting("D") == ["d2"]
            assert [a.switch_id for a in stray.read(SwitchAbort)] == ["old-1"]
            stray.switch = None
            stray.beat()
            await w.settle()
            assert w.hosting("D") == ["d", "d2"]

    world.run(check())


def test_late_words_of_an_old_epoch_are_dropped_and_counted(world: Any) -> None:
    async def check() -> None:
        async with world() as w:
            w.switch("d", "P")
            w.worker("d").obey("ready")
            await w.settle()
            w.worker("d").commit()
            await w.settle()
            w.worker("d").epoch, w.worker("d").stages = 0, "D"
            w.worker("d").beat()
            await w.settle()
            assert w.hosting("P") == ["d", "p"] and w.hosting("D") == ["d2"]
            assert w.members.stale_epochs + w.node.rejected["stale epoch"] == 1

    world.run(check())


def test_unreachable_means_nothing_changed(world: Any) -> None:
    async def check() -> None:
        async with world() as w:
            w.node.know([])
            with pytest.raises(UnavailableError, match="nothing was changed"):
                w.switch("d", "P")
            assert w.roles.history() == [] and w.members.leaving == {}

    world.run(check())


# previews


def test_a_preview_tells_moves_refusals_and_what_it_cost_before(world: Any) -> None:
    async def check() -> None:
        async with world(e="E", e2="E", p="P", d="D", d2="D") as w:
            w.ask()
            await w.settle()
            record = w.dispatcher._attempts.records["q"]
            record.decode, record.adopted = "d", True
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

    world.run(check())


def test_records_are_plain_data(world: Any) -> None:
    async def check() -> None:
        async with world() as w:
            data = w.switch("d", "P", reason="elastic: decode idle").as_json()
            assert data["state"] == "draining" and data["reason"] == "elastic: decode idle"
            assert data["final"] is False and data["phases"] == {}
            assert w.roles.preview("d2", EPD).refused == (), "no stage ends"
            preview = w.roles.preview("d2", E).as_json()
            assert preview["refused"][0]["code"] == "last_worker"
            assert set(preview["refused"][0]) == {"code", "what", "why", "next"}

    world.run(check())


def test_encoded_images_of_a_switched_encoder_are_not_asked_again(world: Any) -> None:
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

    world.run(check())


def test_errors_are_of_the_one_hierarchy() -> None:
    kinds: list[Callable[..., OperatorError]] = [
        UnknownWorkerError, LastWorkerError, StaleEpochError, ImpossibleStagesError,
        SwitchUnderWayError, UnsettledWorkerError, UnknownSwitchError,
    ]  # fmt: skip
    codes = [kind("a", "b", "c").code for kind in kinds]
    assert len(set(codes)) == len(codes)
    assert all(isinstance(kind("a", "b", "c"), EPDError) for kind in kinds)
