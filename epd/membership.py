"""Who is alive in which stages, and who may get work: heartbeats in, changes out. Plain Python,
clock injected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from epd.messages import Heartbeat, KVLayout, PeerInfo, WorkerStats
from epd.roles import Stage, StageSet, format_stages, parse_stages
from epd.wire import Envelope

__all__ = ["Change", "Membership", "WorkerView"]

_CORE = frozenset({Stage.PREFILL, Stage.DECODE})


class Change(Enum):
    """What a heartbeat, a farewell or the passing of time did to the membership."""

    JOINED = "joined"
    LOST = "lost"
    SWITCHED = "switched"


@dataclass(slots=True)
class WorkerView:
    """A live worker as last heard. `last_seen` is on the gateway's clock."""

    worker_id: str
    incarnation: int
    epoch: int
    stages: StageSet
    address: str
    encoder_revision: str
    dtype: str
    kv: KVLayout | None
    accepting: bool
    stats: WorkerStats
    last_seen: float
    switch_id: str | None = None


class Membership:
    """Live workers by id, and three reasons to give a live one no work.

    A worker is lost when silent for `dead_after` seconds or heard under a new life. The next epoch
    in the same life is a switch of its role; heartbeats of an older one are dropped and counted.

    `closed` names workers an operator drained, with the life that was meant, `leaving` the stages a
    worker is about to give up, and a fenced worker's state is uncertain: it gets nothing until it
    is heard under another life or epoch.

    Time during which this process itself was stalled (the gap between two `expire` calls) is not
    held against the workers: their heartbeats wait unread.
    """

    def __init__(
        self, revision: str, clock: Callable[[], float], *, dead_after: float = 1.25
    ) -> None:
        self.workers: dict[str, WorkerView] = {}
        self.refused: dict[str, str] = {}
        self.closed: dict[str, int] = {}
        self.leaving: dict[str, StageSet] = {}
        self.stale_epochs = 0
        self._refused_at: dict[str, float] = {}
        self._fenced: dict[str, tuple[int, int]] = {}
        self._revision = revision
        self._clock = clock
        self._dead_after = dead_after
        self._left: dict[str, int] = {}
        self._last_tick = clock()

    def heard(self, envelope: Envelope, beat: Heartbeat) -> list[tuple[Change, str]]:
        """Record a heartbeat; the changes it makes, in order. A worker of another model, or that
        computes otherwise than the live ones it would share work with, is refused.
        """
        name = envelope.sender
        if self._left.get(name, -1) >= envelope.incarnation:
            return []
        if refusal := self._refusal(name, parse_stages(envelope.stages), beat):
            self.refused[name] = refusal
            self._refused_at[name] = self._clock()
            return self.lost(name)
        known = self.workers.get(name)
        life = (envelope.incarnation, envelope.epoch)
        if known and known.incarnation == life[0] and life[1] < known.epoch:
            self.stale_epochs += 1
            return []
        changes: list[tuple[Change, str]] = []
        if known and life == (known.incarnation, known.epoch + 1):
            changes.append((Change.SWITCHED, name))
        elif known and life != (known.incarnation, known.epoch):
            changes += self.lost(name)
            known = None
        if known is None:
            changes.append((Change.JOINED, name))
        if self._fenced.get(name) != life:
            self._fenced.pop(name, None)
        if self.closed.get(name) != envelope.incarnation:
            self.closed.pop(name, None)
        self._forget_refused(name)
        self.workers[name] = WorkerView(
            worker_id=name,
            incarnation=envelope.incarnation,
            epoch=envelope.epoch,
            stages=parse_stages(envelope.stages),
            address=beat.address,
            encoder_revision=beat.encoder_revision,
            dtype=beat.dtype,
            kv=beat.kv,
            accepting=beat.accepting,
            stats=beat.stats,
            last_seen=self._clock(),
            switch_id=beat.switch_id,
        )
        return changes

    def _refusal(self, name: str, stages: StageSet, beat: Heartbeat) -> str | None:
        if beat.revision != self._revision:
            return f"serves model revision {beat.revision[:12]}, not {self._revision[:12]}"
        for other in self.workers.values():
            # KV moves between cores, and one key of the token cache stands for every encoder
            shares_kv = stages & _CORE and other.stages & _CORE
            shares_keys = Stage.ENCODE in stages & other.stages
            if other.worker_id == name or not (shares_kv or shares_keys):
                continue
            if other.dtype != beat.dtype:
                return f"computes in {beat.dtype}, but {other.worker_id} in {other.dtype}"
            if shares_keys and other.encoder_revision != beat.encoder_revision:
                return f"encodes otherwise than {other.worker_id}"
            if shares_kv and beat.kv and other.kv and beat.kv != other.kv:
                return _kv_difference(beat.kv, other.kv, other.worker_id)
        return None

    def close(self, name: str) -> None:
        """Give a worker nothing for the rest of its life, or until it is taken out of `closed`."""
        if worker := self.workers.get(name):
            self.closed[name] = worker.incarnation

    def fence(self, name: str) -> None:
        """Give a worker nothing until it is heard under another life or epoch, or unfenced."""
        if worker := self.workers.get(name):
            self._fenced[name] = (worker.incarnation, worker.epoch)

    def unfence(self, name: str) -> None:
        """Trust a worker's state again."""
        self._fenced.pop(name, None)

    def fenced(self, name: str) -> bool:
        """Whether the worker's state is uncertain."""
        return name in self._fenced

    def left(self, name: str, incarnation: int) -> list[tuple[Change, str]]:
        """Record an orderly farewell; later heartbeats of that life are ignored."""
        self._left[name] = incarnation
        self._forget_refused(name)
        known = self.workers.get(name)
        return self.lost(name) if known and known.incarnation == incarnation else []

    def lost(self, name: str) -> list[tuple[Change, str]]:
        """Drop a worker known to be gone."""
        self._fenced.pop(name, None)
        return [(Change.LOST, name)] if self.workers.pop(name, None) else []

    def expire(self) -> list[tuple[Change, str]]:
        """Drop the workers silent for too long; call it several times within `dead_after`."""
        now = self._clock()
        stall = max(0.0, now - self._last_tick - self._dead_after / 4)
        self._last_tick = now
        changes: list[tuple[Change, str]] = []
        for worker in list(self.workers.values()):
            worker.last_seen = min(now, worker.last_seen + stall)
            if now - worker.last_seen > self._dead_after:
                changes += self.lost(worker.worker_id)
        for name, heard in list(self._refused_at.items()):
            if now - heard > self._dead_after + stall:
                self._forget_refused(name)
        return changes

    def _forget_refused(self, name: str) -> None:
        self.refused.pop(name, None)
        self._refused_at.pop(name, None)

    def hosting(self, stage: Stage) -> list[WorkerView]:
        """The live workers of a stage that may get work, by name; those that end only when there
        is no other.
        """
        live = [w for w in self.workers.values() if stage in w.stages and self._open(w, stage)]
        accepting = [w for w in live if w.accepting]
        return sorted(accepting or live, key=lambda w: w.worker_id)

    def _open(self, worker: WorkerView, stage: Stage) -> bool:
        name = worker.worker_id
        return not (
            name in self.closed
            or name in self._fenced
            or stage in self.leaving.get(name, frozenset())
        )

    def unsettled(self, stage: Stage) -> bool:
        """Whether a fenced worker hosted the stage when last heard: it may be back soon."""
        return any(stage in w.stages and w.worker_id in self._fenced for w in self.workers.values())

    def peers(self) -> list[PeerInfo]:
        """The directory to tell every worker."""
        return [
            PeerInfo(w.worker_id, w.address, format_stages(w.stages), w.epoch, w.incarnation)
            for w in self.workers.values()
        ]


def _kv_difference(own: KVLayout, others: KVLayout, name: str) -> str:
    for layer, (mine, theirs) in enumerate(zip(own.formats, others.formats, strict=False)):
        if mine != theirs:
            return f"holds the KV of layer {layer} as {mine}, but {name} as {theirs}"
    return f"prunes inside the decoder at other layers than {name}"
