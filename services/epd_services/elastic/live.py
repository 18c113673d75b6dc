"""The elastic controller in the gateway: snapshots from ledger and heartbeats in, switches out."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import replace
from statistics import median
from typing import Protocol

import structlog

from epd.errors import EPDError
from epd.membership import Membership, WorkerView
from epd.roles import StageSet, format_stages
from epd_services.elastic.load import Backlog, Balancer, Measured, Move, Snapshot, WorkerLoad
from epd_services.elastic.observer import Observer
from epd_services.gateway.ledger import Record
from epd_services.gateway.switches import SwitchRecord, SwitchState

__all__ = ["ElasticLoop", "Switches", "running"]

_log = structlog.get_logger("epd.elastic")
_PERIOD = 0.5
_GONE = {"drained", "fenced"}
_COSTS = 8
_PRIOR = Measured(
    encode=0.05, prefill=0.05, decode_base=0.01, decode_per_sequence=0.001, switch=1.0
)


class Switches(Protocol):
    """The part of `SwitchCoordinator` that is asked."""

    def start(
        self, worker: str, stages: StageSet, *, drain_seconds: float, force: bool = ...,
        epoch: int | None = ..., reason: str = ...,
    ) -> SwitchRecord:  # fmt: skip
        """Begin a switch. Raises `EPDError` when it is refused."""
        ...

    def history(self) -> list[SwitchRecord]:
        """All switches, oldest first."""
        ...

    def state(self, worker: WorkerView) -> str:
        """One word about a worker."""
        ...


class ElasticLoop:
    """Watches requests (`started`, then their records), asks the balancer, starts its moves.

    Until a prompt and a decode step were measured it decides nothing.
    """

    def __init__(
        self,
        balancer: Balancer,
        switches: Switches,
        membership: Membership,
        records: Mapping[str, Record],
        *,
        clock: Callable[[], float],
        max_num_seqs: int,
        drain_seconds: float,
    ) -> None:
        self.observer = Observer(replace(_PRIOR, decode_batch=max_num_seqs))
        self._balancer = balancer
        self._switches = switches
        self._membership = membership
        self._records = records
        self._clock = clock
        self._drain_seconds = drain_seconds
        self._watched: dict[Record, int] = {}
        self._before = clock()
        self._told = ""

    def started(self, record: Record) -> None:
        """Note a request that enters the ledger."""
        asked = record.request.sampling.max_tokens
        self.observer.arrived(self._clock(), images=len(record.images), asked=asked)
        self._watched[record] = 0

    def turn(self) -> None:
        """Measure what happened since the last turn, decide, act."""
        self._measure()
        if not (self.observer.measured and self._membership.workers):
            return
        decision = self._balancer.decide(self.snapshot())
        if decision.reason != self._told and not decision.moves:
            _log.debug("elastic", decision=decision.reason)
        self._told = decision.reason
        if decision.moves:
            _log.info("elastic", decision=decision.reason)
        for move in decision.moves:
            self._start(move, decision.reason)

    def snapshot(self) -> Snapshot:
        """The pipeline as the ledger and the last heartbeats tell of it."""
        views = sorted(self._membership.workers.values(), key=lambda view: view.worker_id)
        states = {view.worker_id: self._switches.state(view) for view in views}
        self.observer.switch = self._switch_cost()
        return Snapshot(
            at=self._clock(),
            workers=tuple(
                _load(view, serving=states[view.worker_id] == "serving")
                for view in views
                if states[view.worker_id] not in _GONE
            ),
            backlog=self._backlog(),
            rates=self.observer.rates(self._clock()),
            times=self.observer.times(),
        )

    def _backlog(self) -> Backlog:
        records = list(self._records.values())
        prompts = sum(not record.prefilled for record in records)
        expected = self.observer.expected
        return Backlog(
            images=sum(len(record.encoders) for record in records if not record.prefilled),
            prompts=prompts,
            decoding=len(records) - prompts,
            tokens=sum(
                max(0.0, expected(r.request.sampling.max_tokens) - len(r.outputs)) for r in records
            ),
        )

    def _switch_cost(self) -> float:
        """Seconds a worker serves nothing: the median of the last switches."""
        done = [r for r in self._switches.history() if r.state is SwitchState.DONE]
        costs = [r.phases["total"] for r in done[-_COSTS:] if "total" in r.phases]
        return median(costs) if costs else _PRIOR.switch

    def _measure(self) -> None:
        now = self._clock()
        seconds, self._before = now - self._before, now
        tokens: defaultdict[str, int] = defaultdict(int)
        steady: defaultdict[str, int] = defaultdict(int)
        for record, before in list(self._watched.items()):
            count = len(record.outputs)
            if not record.done and record.decoding() and before:
                tokens[record.decode] += count - before
                steady[record.decode] += 1
            self._watched[record] = count
            if record.done:
                self._ended(record)
        for worker, batch in steady.items():
            if tokens[worker]:
                # each of the batch got its share of the tokens: one step a token
                self.observer.stepped(batch, seconds * batch / tokens[worker])

    def _ended(self, record: Record) -> None:
        del self._watched[record]
        took = record.timeline.durations
        for _ in record.images:
            self.observer.encoded(took.get("encode", 0.0) / len(record.images))
        if "prefill" in took:
            self.observer.prefilled(took["prefill"])
        if record.outputs:
            asked = record.request.sampling.max_tokens
            self.observer.finished(asked=asked, produced=len(record.outputs))

    def _start(self, move: Move, reason: str) -> None:
        try:
            self._switches.start(
                move.worker_id, move.stages, drain_seconds=self._drain_seconds,
                reason=f"elastic: {reason}",
            )  # fmt: skip
        except EPDError as error:
            _log.warning(
                "elastic move refused", worker=move.worker_id, stages=format_stages(move.stages),
                why=str(error)[:200],
            )  # fmt: skip


def _load(view: WorkerView, *, serving: bool) -> WorkerLoad:
    stats = view.stats
    return WorkerLoad(
        worker_id=view.worker_id,
        stages=view.stages,
        serving=serving,
        waiting=stats.encode_queue + stats.prefill_waiting,
        handover=stats.handoff_queue + stats.kv_leases,
        running=stats.running,
    )


@asynccontextmanager
async def running(loop: ElasticLoop, *, period: float = _PERIOD) -> AsyncIterator[None]:
    """Take turns while entered; one that breaks is logged and not the last."""

    async def turns() -> None:
        while True:
            await asyncio.sleep(period)
            try:
                loop.turn()
            except Exception:
                _log.exception("elastic turn failed")

    task = asyncio.create_task(turns())
    try:
        yield
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
