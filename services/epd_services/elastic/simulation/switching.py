"""Role switches in the simulation: hand back, move, drain by a deadline, load, serve again."""

from __future__ import annotations

from dataclasses import dataclass

from epd.roles import Stage
from epd_services.elastic.simulation.events import EventLoop
from epd_services.elastic.simulation.pipeline import Pipeline
from epd_services.elastic.simulation.service_times import ServiceTimes
from epd_services.elastic.simulation.workers import SimWorker

__all__ = ["Switch", "Switcher"]


@dataclass(slots=True)
class Switch:
    """One switch: when it began, and seconds of its drain and of its load."""

    at: float
    worker: str
    old: Stage
    new: Stage
    drain: float = float("nan")
    load: float = float("nan")
    decodes_moved: int = 0


class Switcher:
    """Carries out switches on a pipeline; refuses what would leave a stage empty."""

    def __init__(
        self, loop: EventLoop, pipeline: Pipeline, times: ServiceTimes, *, drain_seconds: float
    ) -> None:
        self.switches: list[Switch] = []
        self._running: dict[str, Switch] = {}
        self._loop = loop
        self._pipeline = pipeline
        self._times = times
        self._drain_seconds = drain_seconds
        pipeline.on_change = self._look

    def start(self, name: str, new: Stage) -> bool:
        """Begin a switch; whether it was possible."""
        worker = next(w for w in self._pipeline.workers if w.name == name)
        peers = [
            w for w in self._pipeline.workers
            if w is not worker and w.stage is worker.stage and w.serving
        ]  # fmt: skip
        if not worker.serving or worker.stage is new or not peers:
            return False
        switch = Switch(self._loop.now, name, worker.stage, new)
        self.switches.append(switch)
        self._running[name] = switch
        worker.leaves_for = new
        self._hand_back(worker, switch)
        self._loop.after(self._drain_seconds, lambda: self._deadline(worker, switch))
        self._look(worker)
        return True

    def _hand_back(self, worker: SimWorker, switch: Switch) -> None:
        """Waiting work goes to peers at once; running decodes are moved with their KV."""
        while worker.images:
            self._pipeline.queue_image(worker.images.popleft())
        while worker.prompts:
            self._pipeline.queue_prompt(worker.prompts.popleft())
        while worker.offers:
            self._pipeline.offer(worker.offers.popleft())
        if worker.stage is Stage.DECODE and not worker.busy:
            self._move(worker, switch)

    def _move(self, worker: SimWorker, switch: Switch) -> None:
        """Between two steps: every running decode is held here and offered to a peer."""
        jobs, worker.decoding = worker.decoding, []
        for job in jobs:
            job.adopted = False
            self._pipeline.hold(job, worker)
            self._pipeline.offer(job)
        switch.decodes_moved += len(jobs)

    def _look(self, worker: SimWorker) -> None:
        """Something changed on a worker: if it is leaving, see whether it is drained."""
        switch = self._running.get(worker.name)
        if switch is None or switch.drain == switch.drain:
            return
        if worker.decoding and not worker.busy:
            self._move(worker, switch)
        if worker.empty:
            switch.drain = self._loop.now - switch.at
            switch.load = self._times.switch(switch.old, switch.new)
            self._loop.after(switch.load, lambda: self._serve(worker, switch))

    def _deadline(self, worker: SimWorker, switch: Switch) -> None:
        """Whose KV still waits here is computed again elsewhere."""
        if switch.drain == switch.drain:
            return
        for job in list(worker.leases):
            if job.decode is not None:
                if job in job.decode.offers:
                    job.decode.offers.remove(job)
                job.decode.pulling.discard(job)
            self._pipeline.recompute(job)

    def _serve(self, worker: SimWorker, switch: Switch) -> None:
        del self._running[worker.name]
        worker.stage, worker.leaves_for = switch.new, None
        self._pipeline.kick(worker)
