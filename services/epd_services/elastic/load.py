"""What a balancer sees and what it answers. Seconds where a time, numbers of requests else."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from epd.roles import Stage, StageSet, format_topology

__all__ = [
    "Backlog",
    "Balancer",
    "Decision",
    "Measured",
    "Move",
    "Rates",
    "Snapshot",
    "WorkerLoad",
    "single_stage",
    "split_name",
]

Split = dict[Stage, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """One worker: its own queue, what waits to be handed over to it, and what it computes."""

    worker_id: str
    stages: StageSet
    serving: bool = True
    waiting: int = 0
    handover: int = 0
    running: int = 0

    @property
    def load(self) -> int:
        """Everything that a switch would have to move or finish."""
        return self.waiting + self.handover + self.running


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """What is in the pipeline and not done, whichever queue holds it.

    `images` are not encoded yet; `prompts` are not prefilled yet, also those whose images are
    not; `decoding` have their first token, also those whose KV waits to be handed over. `tokens`
    are still to come for both kinds of requests together.
    """

    images: int = 0
    prompts: int = 0
    decoding: int = 0
    tokens: float = 0.0

    @property
    def requests(self) -> int:
        """Requests in flight."""
        return self.prompts + self.decoding


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What arrives lately: requests a second, images and output tokens of a request."""

    requests: float = 0.0
    images: float = 0.0
    tokens: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Service times: per image, per prompt, and a decode step of B as `base + per_sequence * B`.

    `decode_batch` is how many sequences a worker decodes at once.
    """

    encode: float
    prefill: float
    decode_base: float
    decode_per_sequence: float
    decode_batch: int = 64
    switch: float = 0.7

    def step(self, batch: float) -> float:
        """Seconds of one decode step; above the largest batch the rest waits for its turn."""
        most = min(max(batch, 1.0), self.decode_batch)
        waves = max(1.0, batch / self.decode_batch)
        return waves * (self.decode_base + self.decode_per_sequence * most)


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The pipeline at one moment of the balancer's clock."""

    at: float
    workers: tuple[WorkerLoad, ...]
    backlog: Backlog
    rates: Rates
    times: Measured

    @cached_property
    def split(self) -> Split:
        """Workers per stage; one of several stages counts as an equal part in each."""
        return {
            stage: sum(1 / len(w.stages) for w in self.workers if stage in w.stages)
            for stage in Stage
        }


@dataclass(frozen=True, slots=True)
class Move:
    """Give a worker another stage set."""

    worker_id: str
    stages: StageSet


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do now (nothing: stay), and why, in one line."""

    moves: tuple[Move, ...]
    reason: str


class Balancer(Protocol):
    """Decides from snapshots, called several times a second; keeps no other clock."""

    def decide(self, snapshot: Snapshot) -> Decision:
        """The decision at this moment."""
        ...


def single_stage(worker: WorkerLoad) -> Stage | None:
    """The stage of a worker that hosts exactly one; None for the others, which are never moved."""
    return next(iter(worker.stages)) if len(worker.stages) == 1 else None


def split_name(workers: list[StageSet]) -> str:
    """The topology of workers in pipeline order: `5E1P2D`."""
    return format_topology(sorted(workers, key=lambda s: sorted("EPD".index(x.value) for x in s)))
