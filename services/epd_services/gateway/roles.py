"""Roles that move: one switch from an operator's wish to its final state, and closed admission.

The worker drains, unloads and loads; this side checks, moves running answers to peers, and commits.
Every wait has a limit, and every way a switch can end is one of its final states.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from epd.errors import UnavailableError
from epd.membership import Membership, WorkerView
from epd.messages import (
    Heartbeat,
    SwitchAbort,
    SwitchCommit,
    SwitchFailed,
    SwitchPhase,
    SwitchReady,
    SwitchRole,
)
from epd.node import Node
from epd.roles import Stage, StageSet, format_stages
from epd.wire import Blob, Envelope
from epd_services.gateway.attempts import Attempts
from epd_services.gateway.role_checks import RoleChecks
from epd_services.gateway.switches import SwitchHistory, SwitchPreview, SwitchRecord, SwitchState

__all__ = ["SwitchCoordinator", "SwitchLimits"]

_log = structlog.get_logger("epd.roles")


@dataclass(frozen=True, slots=True)
class SwitchLimits:
    """Seconds a worker may take to show that it began, to load after its drain, and to appear in
    its new role once that is committed.
    """

    begin: float = 5.0
    load: float = 60.0
    commit: float = 15.0


@dataclass(slots=True)
class _Run:
    """A switch under way."""

    record: SwitchRecord
    began: float
    stages: StageSet
    forced: bool
    seen: bool = False
    ready: float | None = None
    moved_before: int = 0


class SwitchCoordinator:
    """Starts switches and brings each to its end. One at a time per worker.

    `failpoint` is called with the name of every step that must survive an accident; `wall` tells
    seconds since 1970 for the history, `clock` everything else.
    """

    def __init__(
        self,
        node: Node,
        membership: Membership,
        attempts: Attempts,
        *,
        clock: Callable[[], float],
        wall: Callable[[], float] = time.time,
        limits: SwitchLimits | None = None,
        failpoint: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._node = node
        self._membership = membership
        self._attempts = attempts
        self._clock = clock
        self._wall = wall
        self._limits = limits or SwitchLimits()
        self._failpoint = failpoint
        self._history = SwitchHistory()
        self._runs: dict[str, _Run] = {}
        self._numbers = itertools.count(1)
        self._checks = RoleChecks(membership, attempts.records, self._history)
        node.on(SwitchPhase, self._phase)
        node.on(SwitchReady, self._ready)
        node.on(SwitchFailed, self._failed)

    # what operators ask

    def history(self) -> list[SwitchRecord]:
        """The switches so far, oldest first."""
        return self._history.records()

    def get(self, switch_id: str) -> SwitchRecord:
        """The switch of that id. Raises `UnknownSwitchError`."""
        return self._history.get(switch_id)

    def preview(self, worker: str, stages: StageSet, *, force: bool = False) -> SwitchPreview:
        """What a switch would do, what it would cost, and why it would be refused."""
        return self._checks.preview(worker, stages, self._running(worker), force=force)

    def start(
        self,
        worker: str,
        stages: StageSet,
        *,
        drain_seconds: float,
        force: bool = False,
        epoch: int | None = None,
        reason: str = "operator",
    ) -> SwitchRecord:
        """The switch that takes `worker` to `stages`, begun now unless it is under way already.

        A worker that is there needs none: the record then says `unchanged`. Raises the refusals of
        `gateway.refusals`, and `UnavailableError` when the worker cannot be reached.
        """
        running = self._running(worker)
        if running is not None and running.new == format_stages(stages):
            return running
        known = self._membership.workers.get(worker)
        if known is not None and known.stages == stages and running is None:
            return self._record(known, stages, 0.0, reason, SwitchState.UNCHANGED)
        checks = self._checks.refusals(
            worker, stages, running, force=force, epoch=epoch, drain_seconds=drain_seconds
        )
        if refusal := next(checks, None):
            _log.warning("switch refused", worker=worker, code=refusal.code, reason=reason)
            raise refusal
        assert known is not None
        record = self._record(known, stages, drain_seconds, reason, SwitchState.DRAINING)
        return self._begin(known, record, stages, forced=force)

    def drain(self, worker: str, *, force: bool = False) -> bool:
        """Close the admission of a worker; whether that changed anything.

        It gets no new work until `resume` or its next life; what it has goes on. Raises as `start`
        does.
        """
        if worker in self._membership.closed and worker in self._membership.workers:
            return False
        if refusal := self._checks.cannot_close(worker, force=force):
            raise refusal
        self._membership.close(worker)
        _log.info("admission closed", worker=worker)
        return True

    def resume(self, worker: str) -> bool:
        """Open the admission of a worker; whether that changed anything."""
        closed = worker in self._membership.closed
        if not closed and (refusal := self._checks.unknown(worker)):
            raise refusal
        self._membership.closed.pop(worker, None)
        if closed:
            _log.info("admission opened", worker=worker)
        return closed

    def state(self, worker: WorkerView) -> str:
        """One word for people: serving, drained, draining, switching, committing or fenced."""
        name = worker.worker_id
        if run := self._runs.get(name):
            return run.record.state.value
        if self._membership.fenced(name):
            return "fenced"
        if name in self._membership.closed:
            return "drained"
        return "serving" if worker.accepting else "draining"

    # what the dispatcher sees

    def heard(self, envelope: Envelope, beat: Heartbeat) -> None:
        """Take in a heartbeat, after the membership did."""
        name, run = envelope.sender, self._runs.get(envelope.sender)
        if run is None:
            self._settle(name, beat)
        elif beat.switch_id == run.record.switch_id:
            run.seen = True
        elif beat.switch_id is None and run.seen and envelope.epoch == run.record.epoch:
            self._end(run, SwitchState.FAILED, "the worker went back to its old role")
            self._membership.unfence(name)

    def _settle(self, name: str, beat: Heartbeat) -> None:
        """A worker in a switch that is not ours to finish is sent back, and fenced till then."""
        if beat.switch_id is None:
            self._membership.unfence(name)
        elif name in self._membership.workers:
            self._membership.fence(name)
            self._node.post(name, SwitchAbort(switch_id=beat.switch_id))

    def switched(self, name: str) -> None:
        """A worker was heard under its next epoch."""
        worker, run = self._membership.workers[name], self._runs.get(name)
        last = run.record if run else self._history.last(name)
        if run is not None:
            kept = worker.stages
            if run.ready is not None:
                run.record.phases["commit"] = self._clock() - run.ready
            if format_stages(kept) == run.record.new:
                self._end(run, SwitchState.DONE)
            else:
                self._end(run, SwitchState.FAILED, f"it came back as {format_stages(kept)}")
        elif last is not None and (last.new, last.epoch + 1) == (
            format_stages(worker.stages),
            worker.epoch,
        ):
            last.state, last.error = SwitchState.DONE, None
        if last is not None:
            old = frozenset(map(Stage, last.old))
            self._attempts.left_stages(name, old - worker.stages, worker.stages)

    def lost(self, name: str) -> None:
        """A worker is gone, and so is its switch; one that would now leave a stage without any
        worker is taken back.
        """
        if run := self._runs.get(name):
            self._end(run, SwitchState.LOST, f"the worker was lost while {run.record.state.value}")
        for run in list(self._runs.values()):
            record = run.record
            gone = frozenset(map(Stage, record.old)) - run.stages
            if run.ready is None and not run.forced and self._checks.alone(record.worker, gone):
                self._give_up(run, f"taken back: {name} was lost")

    def tick(self) -> None:
        """End what waited too long; call several times a second."""
        now, limits = self._clock(), self._limits
        for run in list(self._runs.values()):
            record = run.record
            if run.ready is not None:
                if now - run.ready > limits.commit:
                    self._end(run, SwitchState.FAILED, "silent after the commit: fenced")
            elif not run.seen and now - run.began > limits.begin:
                self._give_up(run, "the worker did not begin")
            elif now - run.began > record.drain_seconds + limits.load:
                self._give_up(run, "the new role was not loaded in time")

    # the steps of one switch

    def _running(self, worker: str) -> SwitchRecord | None:
        run = self._runs.get(worker)
        return run.record if run else None

    def _record(
        self,
        worker: WorkerView,
        stages: StageSet,
        drain_seconds: float,
        reason: str,
        state: SwitchState,
    ) -> SwitchRecord:
        return SwitchRecord(
            switch_id=f"{self._node.identity.incarnation:x}-{next(self._numbers)}",
            worker=worker.worker_id,
            old=format_stages(worker.stages),
            new=format_stages(stages),
            epoch=worker.epoch,
            reason=reason,
            drain_seconds=drain_seconds,
            started_at=self._wall(),
            state=state,
        )

    def _begin(
        self, worker: WorkerView, record: SwitchRecord, stages: StageSet, *, forced: bool
    ) -> SwitchRecord:
        name = worker.worker_id
        message = SwitchRole(
            switch_id=record.switch_id,
            stages=record.new,
            epoch=record.epoch,
            drain_seconds=record.drain_seconds,
        )
        self._failpoint("admin.accepted")
        if not self._node.post(name, message):
            raise UnavailableError(f"the worker {name} cannot be reached; nothing was changed")
        self._history.add(record)
        run = _Run(record, self._clock(), stages, forced, moved_before=self._attempts.moved[name])
        self._runs[name] = run
        self._membership.leaving[name] = worker.stages - stages
        _log.info(
            "switch begins", worker=name, old=record.old, new=record.new, reason=record.reason
        )
        if Stage.DECODE in worker.stages - stages:
            self._attempts.move_all(name)
            record.moved = self._attempts.moved[name] - run.moved_before
        return record

    def _current(self, envelope: Envelope, switch_id: str) -> _Run | None:
        run = self._runs.get(envelope.sender)
        return run if run and run.record.switch_id == switch_id else None

    def _phase(self, envelope: Envelope, message: SwitchPhase, _: tuple[Blob, ...]) -> None:
        if run := self._current(envelope, message.switch_id):
            run.seen = True
            run.record.phases[message.phase] = message.seconds
            if run.record.state is SwitchState.DRAINING:
                run.record.state = SwitchState.SWITCHING

    def _ready(self, envelope: Envelope, message: SwitchReady, _: tuple[Blob, ...]) -> None:
        run = self._current(envelope, message.switch_id)
        if run is None or run.ready is not None:
            return
        run.seen, run.ready = True, self._clock()
        run.record.state = SwitchState.COMMITTING
        run.record.resident_bytes = message.resident_bytes
        # from here until it is heard again nobody knows which of its two roles it has
        self._membership.fence(envelope.sender)
        self._failpoint("admin.ready")
        self._node.post(envelope.sender, SwitchCommit(switch_id=message.switch_id))
        self._failpoint("admin.committed")

    def _failed(self, envelope: Envelope, message: SwitchFailed, _: tuple[Blob, ...]) -> None:
        if run := self._current(envelope, message.switch_id):
            self._end(run, SwitchState.FAILED, f"{message.phase}: {message.message}")
            self._membership.unfence(envelope.sender)

    def _give_up(self, run: _Run, why: str) -> None:
        """Send the worker back; it is fenced until it says that it is there."""
        name = run.record.worker
        self._end(run, SwitchState.FAILED, why)
        if run.seen:
            self._membership.fence(name)
        self._node.post(name, SwitchAbort(switch_id=run.record.switch_id))

    def _end(self, run: _Run, state: SwitchState, error: str | None = None) -> None:
        record = run.record
        record.state, record.error = state, error
        record.phases["total"] = self._clock() - run.began
        record.moved = self._attempts.moved[record.worker] - run.moved_before
        del self._runs[record.worker]
        self._membership.leaving.pop(record.worker, None)
        tell = _log.info if state is SwitchState.DONE else _log.warning
        tell(
            "switch ended", worker=record.worker, old=record.old, new=record.new,
            state=state.value, error=error, **{k: round(v, 3) for k, v in record.phases.items()},
        )  # fmt: skip
