"""Runs a trace through a split of workers under a balancer and says how it went."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from statistics import fmean

from epd.roles import Stage, parse_topology
from epd_services.bench_rows import percentile
from epd_services.elastic.load import Backlog, Balancer, Snapshot, split_name
from epd_services.elastic.observer import Observer
from epd_services.elastic.simulation.events import EventLoop
from epd_services.elastic.simulation.pipeline import Pipeline
from epd_services.elastic.simulation.service_times import ServiceTimes
from epd_services.elastic.simulation.switching import Switch, Switcher
from epd_services.elastic.simulation.traces import Trace
from epd_services.elastic.simulation.workers import Job, SimWorker

__all__ = ["Outcome", "simulate"]

_TICK = 0.5


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a trace. `reasons` pairs the moment of each decision to move with its line."""

    jobs: tuple[Job, ...]
    switches: tuple[Switch, ...]
    reasons: tuple[tuple[float, str], ...]
    recomputed: int
    last_split: str

    @property
    def latency(self) -> float:
        """Mean seconds of a request."""
        return fmean(job.latency for job in self.jobs)

    @property
    def ttft(self) -> float:
        """Mean seconds to the first token."""
        return fmean(job.ttft for job in self.jobs)

    @property
    def tpot(self) -> float:
        """Mean over the requests of the mean seconds between their tokens."""
        return fmean(job.tpot for job in self.jobs if job.arrival.tokens > 1)

    @property
    def latency_p99(self) -> float:
        """The latency that 99 % of the requests do not exceed."""
        return percentile((job.latency for job in self.jobs), 99)

    @property
    def most_switches(self) -> int:
        """Switches of the worker that switched most often."""
        return max(Counter(switch.worker for switch in self.switches).values(), default=0)

    def switched_back(self, within: float) -> int:
        """How often a worker went back to the stage it came from within so many seconds."""
        last: dict[str, Switch] = {}
        count = 0
        for switch in self.switches:
            before = last.get(switch.worker)
            if before and before.old is switch.new and switch.at - before.at < within:
                count += 1
            last[switch.worker] = switch
        return count


def simulate(
    trace: Trace,
    split: str,
    *,
    times: ServiceTimes,
    balancer: Balancer | None = None,
    drain_seconds: float = 5.0,
) -> Outcome:
    """The outcome of a trace on single-stage workers; without a balancer nothing moves.

    The balancer sees measured times only, its prior being right in scale but not exact.
    """
    loop = EventLoop()
    observer = Observer(times.measured())
    pipeline = Pipeline(loop, _workers(split), times, observer)
    switcher = Switcher(loop, pipeline, times, drain_seconds=drain_seconds)
    reasons: list[tuple[float, str]] = []
    for arrival in trace.arrivals:
        loop.at(arrival.at, lambda arrival=arrival: pipeline.submit(arrival))  # type: ignore[misc]

    def tick() -> None:
        assert balancer is not None
        decision = balancer.decide(_snapshot(loop.now, pipeline, observer))
        started = [switcher.start(m.worker_id, next(iter(m.stages))) for m in decision.moves]
        if any(started):
            reasons.append((loop.now, decision.reason))
        if pipeline.live or len(pipeline.jobs) < len(trace.arrivals):
            loop.after(_TICK, tick)

    if balancer is not None:
        loop.after(_TICK, tick)
    loop.run()
    return Outcome(
        tuple(pipeline.jobs), tuple(switcher.switches), tuple(reasons), pipeline.recomputed,
        split_name([frozenset((worker.stage,)) for worker in pipeline.workers]),
    )  # fmt: skip


def _workers(split: str) -> list[SimWorker]:
    counts: Counter[Stage] = Counter()
    workers = []
    for stages in parse_topology(split):
        (stage,) = stages
        workers.append(SimWorker(f"{stage.name.lower()}-{counts[stage]}", stage))
        counts[stage] += 1
    return workers


def _snapshot(now: float, pipeline: Pipeline, observer: Observer) -> Snapshot:
    live = pipeline.live
    prompts = sum(job.produced == 0 for job in live)
    encoders = [worker for worker in pipeline.workers if worker.stage is Stage.ENCODE]
    return Snapshot(
        at=now,
        workers=tuple(worker.load() for worker in pipeline.workers),
        backlog=Backlog(
            images=sum(len(w.images) + w.in_batch for w in encoders),
            prompts=prompts,
            decoding=len(live) - prompts,
            tokens=sum(max(0.0, observer.expected(j.arrival.tokens) - j.produced) for j in live),
        ),
        rates=observer.rates(now),
        times=observer.times(),
    )  # fmt: skip
