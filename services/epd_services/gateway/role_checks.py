"""What speaks against a switch, and what it would move: for the preview and for the start."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from epd.membership import Membership
from epd.roles import Stage, StageSet, format_stages
from epd_services.gateway.ledger import Record
from epd_services.gateway.refusals import (
    ImpossibleStagesError,
    LastWorkerError,
    OperatorError,
    StaleEpochError,
    SwitchUnderWayError,
    UnknownWorkerError,
    UnsettledWorkerError,
)
from epd_services.gateway.switches import SwitchHistory, SwitchPreview, SwitchRecord

__all__ = ["MAX_DRAIN_SECONDS", "RoleChecks"]

MAX_DRAIN_SECONDS = 3600.0
_STATUS = "epd admin status"
_CORE = frozenset({Stage.PREFILL, Stage.DECODE})


class RoleChecks:
    """Looks at the live workers and the requests in flight; changes nothing."""

    def __init__(
        self, membership: Membership, records: Mapping[str, Record], history: SwitchHistory
    ) -> None:
        self._membership = membership
        self._records = records
        self._history = history

    def unknown(self, worker: str) -> OperatorError | None:
        """Why the worker cannot be meant, if it is not alive."""
        live = sorted(self._membership.workers)
        if worker in live:
            return None
        names = ", ".join(live[:8]) or "none"
        return UnknownWorkerError(
            f"There is no live worker {worker[:64]!r}.", f"Those alive are: {names}.", _STATUS
        )

    def refusals(
        self,
        worker: str,
        stages: StageSet,
        running: SwitchRecord | None,
        *,
        force: bool,
        epoch: int | None = None,
        drain_seconds: float = 0.0,
    ) -> Iterator[OperatorError]:
        """Everything that speaks against the switch, the most basic first."""
        if unknown := self.unknown(worker):
            yield unknown
            return
        yield from self._malformed(stages, drain_seconds)
        yield from self._unsettled(worker, running)
        known = self._membership.workers[worker]
        if epoch is not None and epoch != known.epoch:
            yield StaleEpochError(
                f"Cannot switch {worker} from epoch {epoch}.",
                f"It is at epoch {known.epoch}: its role changed since you looked.",
                _STATUS,
            )
        if not force and (last := self._last(worker, known.stages - stages)):
            yield last

    def cannot_close(self, worker: str, *, force: bool) -> OperatorError | None:
        """Why admission to the worker should stay open."""
        if unknown := self.unknown(worker):
            return unknown
        return None if force else self._last(worker, self._membership.workers[worker].stages)

    def _malformed(self, stages: StageSet, drain_seconds: float) -> Iterator[OperatorError]:
        if not stages:
            yield ImpossibleStagesError(
                "Cannot switch to no stage at all.",
                "A worker hosts at least one of E, P and D.",
                "epd admin drain WORKER takes a worker out of service",
            )
        if not 0.0 <= drain_seconds <= MAX_DRAIN_SECONDS:
            yield ImpossibleStagesError(
                f"Cannot drain for {drain_seconds:g} s.",
                f"The limit lies between 0 and {MAX_DRAIN_SECONDS:g} s.",
                "epd admin switch --help",
            )

    def _unsettled(self, worker: str, running: SwitchRecord | None) -> Iterator[OperatorError]:
        if running is not None:
            yield SwitchUnderWayError(
                f"{worker} is switching already.",
                f"It goes from {running.old} to {running.new} and is {running.state.value}.",
                "epd admin history says when that has ended",
            )
        elif self._membership.fenced(worker):
            yield UnsettledWorkerError(
                f"The state of {worker} is uncertain.",
                "It is fenced until it reports its role again.",
                _STATUS,
            )
        elif not self._membership.workers[worker].accepting:
            yield UnsettledWorkerError(
                f"{worker} is about to end.", "It finishes what it has and takes no more.", _STATUS
            )

    def _peers(self, worker: str, stage: Stage) -> list[str]:
        """Other workers of a stage that take new work now."""
        hosting = self._membership.hosting(stage)
        return [w.worker_id for w in hosting if w.accepting and w.worker_id != worker]

    def alone(self, worker: str, stages: StageSet) -> StageSet:
        """Those of the stages that no other worker serves now."""
        return frozenset(stage for stage in stages if not self._peers(worker, stage))

    def _last(self, worker: str, gone: StageSet) -> OperatorError | None:
        alone = self.alone(worker, gone)
        if not alone:
            return None
        return LastWorkerError(
            f"{worker} is the last worker of {format_stages(alone)}.",
            "Without another one, requests that need it get a 503.",
            "switch another worker to it first, or say --force",
        )

    def preview(
        self, worker: str, stages: StageSet, running: SwitchRecord | None, *, force: bool
    ) -> SwitchPreview:
        """What a switch would do."""
        refused = tuple(self.refusals(worker, stages, running, force=force))
        known = self._membership.workers.get(worker)
        old = known.stages if known else frozenset()
        cost, measured = self._history.cost(old, stages)
        moves = (*self._work(worker, old - stages), *_weights(old, stages)) if known else ()
        return SwitchPreview(
            worker=worker,
            old=format_stages(old),
            new=format_stages(stages),
            epoch=known.epoch if known else 0,
            refused=refused,
            moves=moves if old != stages else (),
            cost=cost,
            measured=measured,
        )

    def _work(self, worker: str, gone: StageSet) -> Iterator[str]:
        """One line for each kind of work that the ending stages have."""
        records = self._records.values()
        mine = [r for r in records if worker in (r.prefill, r.decode)]
        if Stage.ENCODE in gone:
            images = sum(list(r.encoders.values()).count(worker) for r in records)
            yield f"{images} waiting images go to {self._words(worker, Stage.ENCODE)}"
        if Stage.PREFILL in gone:
            prompts = sum(r.prefill == worker and not r.decoding() for r in mine)
            where = self._words(worker, Stage.PREFILL)
            yield f"{prompts} prompts are finished here or go to {where}"
        if Stage.DECODE in gone:
            answers = sum(r.decode == worker and r.decoding() for r in mine)
            if peers := self._peers(worker, Stage.DECODE):
                yield f"{answers} running answers move with their KV to {_some(peers)}"
            else:
                yield f"{answers} running answers may finish in time; the others end in a 503"

    def _words(self, worker: str, stage: Stage) -> str:
        return _some(self._peers(worker, stage)) or "nobody: they end in a 503"


def _weights(old: StageSet, new: StageSet) -> Iterator[str]:
    """Which weights a switch unloads and loads."""
    for name, side in (("vision encoder", frozenset({Stage.ENCODE})), ("language model", _CORE)):
        if old & side and not new & side:
            yield f"the {name} is unloaded"
        elif new & side and not old & side:
            yield f"the {name} is loaded"
    if old & _CORE and new & _CORE:
        yield "the language model and its KV cache stay"


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
