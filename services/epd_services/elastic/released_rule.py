"""The rule of the released EPD code, from its description, as the baseline to compare with.

Queues are sampled every second. Every five seconds the last sample decides: the stage with the
longest queue receives, unless every queue has at least half of it; the stage with the most workers
to spare and a shorter queue gives its last one. What was decided is carried out from a list that
is looked at every two seconds. No hand-over queue is counted, except that what waits for a decode
worker shows up to two batches. There is no margin, cost, cool-down or forecast.
"""

from __future__ import annotations

from epd.roles import Stage
from epd_services.elastic.load import Decision, Move, Snapshot, single_stage

__all__ = ["ReleasedRule"]

_SAMPLE, _DECIDE, _EXECUTE = 1.0, 5.0, 2.0
_EPSILON = 1e-9


class ReleasedRule:
    """A `Balancer` that moves one worker at a time."""

    def __init__(self) -> None:
        self._queues = dict.fromkeys(Stage, 0)
        self._pending: list[tuple[Stage, Stage]] = []
        self._next = {"sample": _SAMPLE, "decide": _DECIDE, "execute": _EXECUTE}

    def decide(self, snapshot: Snapshot) -> Decision:
        """The move that is due, if any."""
        if self._due("sample", snapshot.at, _SAMPLE):
            self._queues = {stage: _queue(snapshot, stage) for stage in Stage}
        if self._due("decide", snapshot.at, _DECIDE):
            self._consider(snapshot)
        if self._due("execute", snapshot.at, _EXECUTE) and self._pending:
            return self._execute(snapshot, *self._pending.pop(0))
        return Decision((), "stay")

    def _due(self, what: str, at: float, every: float) -> bool:
        if at + _EPSILON < self._next[what]:
            return False
        while self._next[what] <= at + _EPSILON:
            self._next[what] += every
        return True

    def _consider(self, snapshot: Snapshot) -> None:
        queues = self._queues
        target = max(Stage, key=lambda stage: queues[stage])
        if all(2 * queue >= queues[target] for queue in queues.values()):
            return
        spare = {stage: len(_workers(snapshot, stage)) - 1 for stage in Stage}
        sources = [s for s in Stage if queues[s] < queues[target] and spare[s] > 0]
        if sources:
            source = max(sources, key=lambda stage: spare[stage])
            self._pending.append((source, target))

    def _execute(self, snapshot: Snapshot, source: Stage, target: Stage) -> Decision:
        workers = _workers(snapshot, source)
        if len(workers) < 2:
            return Decision((), "stay: the last worker of its stage")
        queues = ", ".join(f"{stage.value} {self._queues[stage]}" for stage in Stage)
        move = Move(workers[-1], frozenset((target,)))
        return Decision((move,), f"queues {queues}: moving {workers[-1]} to {target.value}")


def _workers(snapshot: Snapshot, stage: Stage) -> list[str]:
    return [w.worker_id for w in snapshot.workers if single_stage(w) is stage and w.serving]


def _queue(snapshot: Snapshot, stage: Stage) -> int:
    most = 2 * snapshot.times.decode_batch
    return sum(
        worker.waiting + (min(worker.handover, most) if stage is Stage.DECODE else 0)
        for worker in snapshot.workers
        if single_stage(worker) is stage and worker.serving
    )
