"""The elastic controller in the gateway: what it measures, what it asks of the coordinator."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from epd.errors import RoleError
from epd.membership import Membership, WorkerView
from epd.messages import Heartbeat, WorkerStats
from epd.request import Request, RequestTimeline, SamplingParams, TokenOutput
from epd.roles import StageSet, format_stages, parse_stages
from epd.wire import Envelope
from epd_services.elastic.controller import Controller
from epd_services.elastic.live import ElasticLoop, running
from epd_services.gateway.dispatch_api import ImagePixels
from epd_services.gateway.ledger import Record
from epd_services.gateway.switches import SwitchRecord, SwitchState


class FakeSwitches:
    """Notes what is asked; refuses whom it is told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, str]] = []
        self.records: list[SwitchRecord] = []
        self.states: dict[str, str] = {}
        self.refuses: set[str] = set()

    def start(
        self, worker: str, stages: StageSet, *, drain_seconds: float, force: bool = False,
        epoch: int | None = None, reason: str = "operator",
    ) -> SwitchRecord:  # fmt: skip
        assert not force
        if worker in self.refuses:
            raise RoleError("no")
        self.asked.append((worker, format_stages(stages), reason))
        return switch_record(worker, drain_seconds)

    def history(self) -> list[SwitchRecord]:
        return self.records

    def state(self, worker: WorkerView) -> str:
        return self.states.get(worker.worker_id, "serving")


def switch_record(worker: str, total: float) -> SwitchRecord:
    return SwitchRecord(
        switch_id=worker, worker=worker, old="E", new="D", epoch=0, reason="", drain_seconds=1.0,
        started_at=0.0, state=SwitchState.DONE, phases={"total": total},
    )  # fmt: skip


class World:
    """Five encoders, one prefill and two decode workers, and a clock."""

    def __init__(self) -> None:
        self.now = 100.0
        self.members = Membership("r", lambda: self.now, dead_after=1e9)
        self.records: dict[str, Record] = {}
        self.switches = FakeSwitches()
        for name in ("e0", "e1", "e2", "e3", "e4", "p0", "d0", "d1"):
            self.beat(name, WorkerStats())
        self.loop = ElasticLoop(
            Controller(), self.switches, self.members, self.records, clock=lambda: self.now,
            max_num_seqs=64, drain_seconds=3.0,
        )  # fmt: skip

    def beat(self, name: str, stats: WorkerStats) -> None:
        letters = name[0].upper()
        beat = Heartbeat(
            address=name, revision="r", encoder_revision="e", dtype="float32", stats=stats
        )
        self.members.heard(Envelope(name, 1, 0, letters, "gateway", 1), beat)

    def request(self, name: str, *, tokens: int) -> Record:
        request = Request(
            request_id=name, prompt_token_ids=[1], salt="",
            sampling=SamplingParams(max_tokens=tokens, ignore_eos=True),
        )  # fmt: skip
        record = Record(
            request, [ImagePixels(1, 1, b"abc")], 1e9, RequestTimeline(lambda: self.now)
        )
        record.encoders = {0: "e0"}
        record.prefill = "p0"
        record.decode = f"d{len(self.records) % 2}"
        self.records[name] = record
        self.loop.started(record)
        return record

    def decode(self, record: Record, tokens: int) -> None:
        if not record.outputs:
            record.encoders.clear()
            record.prefilled = record.adopted = True
            record.timeline.add("encode", 0.04)
            record.timeline.add("prefill", 0.08)
        for _ in range(tokens):
            record.outputs.append(TokenOutput(index=len(record.outputs), token_id=7))
        if len(record.outputs) >= record.request.sampling.max_tokens:
            record.done = True
            del self.records[record.request_id]


def overloaded(world: World, *, seconds: float) -> None:
    """Four requests a second for 500 tokens; decode steps of 20 ms plus 1 ms a sequence."""
    done = {0: 0.0, 1: 0.0}
    for tick in range(int(2 * seconds)):
        for n in range(2):
            world.request(f"{tick}-{n}", tokens=500)
        # answered at once, so that a prompt and an encode are measured
        world.decode(world.request(f"{tick}-short", tokens=5), 5)
        world.now += 0.5
        for worker in (0, 1):
            mine = [r for r in world.records.values() if r.decode == f"d{worker}"]
            done[worker] += 0.5 / (0.02 + 0.001 * max(1, len(mine)))
            steps, done[worker] = int(done[worker]), done[worker] % 1
            for record in mine:
                world.decode(record, steps)
        world.loop.turn()


def test_a_decode_overload_moves_encoders_through_the_coordinator() -> None:
    world = World()
    overloaded(world, seconds=6)
    assert world.switches.asked
    workers, stages, reasons = zip(*world.switches.asked, strict=True)
    assert set(workers) <= {"e0", "e1", "e2", "e3", "e4"}
    assert len(set(workers)) == len(workers)
    assert set(stages) == {"D"}
    assert all(r.startswith("elastic: decode is the bottleneck") for r in reasons)
    assert all("\n" not in r for r in reasons)


def test_what_it_measures_is_what_happened() -> None:
    world = World()
    overloaded(world, seconds=20)
    times = world.loop.observer.times()
    assert times.step(20) == pytest.approx(0.04, rel=0.15)
    assert times.encode == pytest.approx(0.04, rel=0.1)
    assert times.prefill == pytest.approx(0.08, rel=0.1)
    assert times.decode_batch == 64
    rates = world.loop.observer.rates(world.now)
    assert rates.requests == pytest.approx(6.0, rel=0.15)
    assert rates.images == pytest.approx(1.0)
    assert rates.tokens == pytest.approx((2 * 500 + 5) / 3, rel=0.05)


def test_the_snapshot_counts_every_queue() -> None:
    world = World()
    world.request("a", tokens=100)
    decoding = world.request("b", tokens=100)
    world.decode(decoding, 40)
    world.beat("e0", WorkerStats(encode_queue=3))
    world.beat("p0", WorkerStats(prefill_waiting=2, kv_leases=4, running=1))
    world.beat("d0", WorkerStats(handoff_queue=5, running=6))
    shot = world.loop.snapshot()
    assert (shot.backlog.images, shot.backlog.prompts, shot.backlog.decoding) == (1, 1, 1)
    assert shot.backlog.tokens == pytest.approx(160.0)
    loads = {w.worker_id: (w.waiting, w.handover, w.running) for w in shot.workers}
    assert loads["e0"] == (3, 0, 0)
    assert loads["p0"] == (2, 4, 1)
    assert loads["d0"] == (0, 5, 6)
    assert {w.worker_id: w.stages for w in shot.workers}["d1"] == parse_stages("D")


def test_nothing_is_decided_before_anything_was_measured() -> None:
    world = World()
    for n in range(100):
        world.request(str(n), tokens=500)
    for _ in range(20):
        world.now += 0.5
        world.loop.turn()
    assert world.switches.asked == []


def test_workers_out_of_service_do_not_count_and_are_not_moved() -> None:
    world = World()
    world.switches.states = {"e1": "drained", "e2": "fenced"}
    assert {"e1", "e2"}.isdisjoint(w.worker_id for w in world.loop.snapshot().workers)
    overloaded(world, seconds=6)
    assert world.switches.asked
    assert {"e1", "e2"}.isdisjoint(name for name, _, _ in world.switches.asked)


@pytest.mark.parametrize("state", ["draining", "switching", "committing"])
def test_it_waits_while_a_switch_is_under_way(state: str) -> None:
    world = World()
    world.switches.states = {"e4": state}
    overloaded(world, seconds=6)
    assert world.switches.asked == []


def test_a_refused_move_does_not_stop_the_others() -> None:
    world = World()
    world.switches.refuses = {"e0"}
    overloaded(world, seconds=6)
    assert world.switches.asked
    assert "e0" not in {name for name, _, _ in world.switches.asked}


def test_the_cost_of_a_switch_is_the_median_of_those_done() -> None:
    world = World()
    assert world.loop.snapshot().times.switch == 1.0
    failed = switch_record("e9", 99.0)
    failed.state = SwitchState.FAILED
    world.switches.records = [*(switch_record("e0", s) for s in (2.0, 3.0, 40.0)), failed]
    assert world.loop.snapshot().times.switch == 3.0


def test_turns_go_on_after_one_breaks(monkeypatch: Any) -> None:
    world, turns = World(), []

    def broken() -> None:
        turns.append(1)
        raise RuntimeError("broken")

    monkeypatch.setattr(world.loop, "turn", broken)

    async def check() -> None:
        async with running(world.loop, period=0.001):
            await asyncio.sleep(0.05)

    asyncio.run(check())
    assert len(turns) > 3
