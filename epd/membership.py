"""Who is alive in which stages: heartbeats in, joined and lost workers out. Plain Python, clock
injected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from epd.messages import Heartbeat, PeerInfo, WorkerStats
from epd.roles import Stage, StageSet, format_stages, parse_stages
from epd.wire import Envelope

__all__ = ["Change", "Membership", "WorkerView"]


class Change(Enum):
    """What a heartbeat, a farewell or the passing of time did to the membership."""

    JOINED = "joined"
    LOST = "lost"


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
    accepting: bool
    stats: WorkerStats
    last_seen: float


class Membership:
    """Live workers by id.

    A worker is lost when silent for `dead_after` seconds or heard under a new life.

    Time during which this process itself was stalled (the gap between two `expire` calls) is not
    held against the workers: their heartbeats wait unread.
    """

    def __init__(
        self, revision: str, clock: Callable[[], float], *, dead_after: float = 1.25
    ) -> None:
        self.workers: dict[str, WorkerView] = {}
        self.refused: dict[str, str] = {}
        self._revision = revision
        self._clock = clock
        self._dead_after = dead_after
        self._left: dict[str, int] = {}
        self._last_tick = clock()

    def heard(self, envelope: Envelope, beat: Heartbeat) -> list[tuple[Change, str]]:
        """Record a heartbeat; the changes it makes, in order. A worker of another model is
        refused.
        """
        name = envelope.sender
        if self._left.get(name, -1) >= envelope.incarnation:
            return []
        if beat.revision != self._revision:
            self.refused[name] = (
                f"serves model revision {beat.revision[:12]}, not {self._revision[:12]}"
            )
            return self.lost(name)
        known = self.workers.get(name)
        changes: list[tuple[Change, str]] = []
        if known and (known.incarnation, known.epoch) != (envelope.incarnation, envelope.epoch):
            changes += self.lost(name)
            known = None
        if known is None:
            changes.append((Change.JOINED, name))
        self.refused.pop(name, None)
        self.workers[name] = WorkerView(
            worker_id=name,
            incarnation=envelope.incarnation,
            epoch=envelope.epoch,
            stages=parse_stages(envelope.stages),
            address=beat.address,
            encoder_revision=beat.encoder_revision,
            dtype=beat.dtype,
            accepting=beat.accepting,
            stats=beat.stats,
            last_seen=self._clock(),
        )
        return changes

    def left(self, name: str, incarnation: int) -> list[tuple[Change, str]]:
        """Record an orderly farewell; later heartbeats of that life are ignored."""
        self._left[name] = incarnation
        known = self.workers.get(name)
        return self.lost(name) if known and known.incarnation == incarnation else []

    def lost(self, name: str) -> list[tuple[Change, str]]:
        """Drop a worker known to be gone."""
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
        return changes

    def hosting(self, stage: Stage) -> list[WorkerView]:
        """The live workers of a stage, by name; those draining only when there is no other."""
        live = [w for w in self.workers.values() if stage in w.stages]
        accepting = [w for w in live if w.accepting]
        return sorted(accepting or live, key=lambda w: w.worker_id)

    def peers(self) -> list[PeerInfo]:
        """The directory to tell every worker."""
        return [
            PeerInfo(w.worker_id, w.address, format_stages(w.stages), w.epoch, w.incarnation)
            for w in self.workers.values()
        ]
