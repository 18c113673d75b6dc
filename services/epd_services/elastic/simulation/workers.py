"""A simulated worker and the requests in its queues. Time is the event loop's."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from epd.roles import Stage
from epd_services.elastic.load import WorkerLoad
from epd_services.elastic.simulation.traces import Arrival

__all__ = ["Job", "SimWorker"]


@dataclass(slots=True, eq=False)
class Job:
    """One request. `images_left` are not yet with the prefill worker; `computed` tokens have KV.

    Between its prefill and its adoption by a decode worker the KV is held by `holder`.
    """

    arrival: Arrival
    images_left: int
    prefill: SimWorker | None = None
    decode: SimWorker | None = None
    holder: SimWorker | None = None
    started: bool = False
    adopted: bool = False
    produced: int = 0
    attempt: int = 0
    first_token: float = float("nan")
    finished: float = float("nan")

    @property
    def done(self) -> bool:
        """Whether every token was produced."""
        return self.produced >= self.arrival.tokens

    @property
    def latency(self) -> float:
        """Seconds from arrival to the last token."""
        return self.finished - self.arrival.at

    @property
    def ttft(self) -> float:
        """Seconds from arrival to the first token."""
        return self.first_token - self.arrival.at

    @property
    def tpot(self) -> float:
        """Mean seconds between tokens after the first, waits for a decode worker included."""
        return (self.finished - self.first_token) / max(1, self.arrival.tokens - 1)


@dataclass(slots=True, eq=False)
class SimWorker:
    """One worker of one stage. `leaves_for` is set while a switch drains or loads it.

    `images` and `prompts` are its own queues, `offers` holds what waits to be handed over to it,
    `pulling` is on its way, `decoding` its batch; `leases` are requests whose KV it holds for
    others.
    """

    name: str
    stage: Stage
    leaves_for: Stage | None = None
    busy: bool = False
    images: deque[Job] = field(default_factory=deque)
    prompts: deque[Job] = field(default_factory=deque)
    offers: deque[Job] = field(default_factory=deque)
    pulling: set[Job] = field(default_factory=set)
    decoding: list[Job] = field(default_factory=list)
    leases: set[Job] = field(default_factory=set)
    in_batch: int = 0

    @property
    def serving(self) -> bool:
        """Whether it takes new work."""
        return self.leaves_for is None

    @property
    def empty(self) -> bool:
        """Whether nothing keeps it in its role."""
        held = (self.images, self.prompts, self.offers, self.pulling, self.decoding, self.leases)
        return not self.busy and not any(held)

    def load(self) -> WorkerLoad:
        """What a heartbeat would tell of it."""
        return WorkerLoad(
            worker_id=self.name,
            stages=frozenset((self.stage,)),
            serving=self.serving,
            waiting=len(self.images) + len(self.prompts),
            handover=len(self.offers) + len(self.pulling),
            running=len(self.decoding) + self.in_batch,
        )
