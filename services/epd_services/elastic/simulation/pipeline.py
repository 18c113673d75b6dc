"""The simulated pipeline: the stages, their batches, the hand-overs between them.

As in the real one a request gets its prefill and its decode worker when it is dispatched, each
image the least busy encoder, and KV is held where it was computed until the decode worker has room.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from epd.roles import Stage
from epd_services.elastic.observer import Observer
from epd_services.elastic.simulation.events import EventLoop
from epd_services.elastic.simulation.service_times import ServiceTimes
from epd_services.elastic.simulation.traces import Arrival
from epd_services.elastic.simulation.workers import Job, SimWorker

__all__ = ["Pipeline"]


class Pipeline:
    """Workers and the requests among them. `observer` is told what a gateway could measure."""

    def __init__(
        self, loop: EventLoop, workers: Iterable[SimWorker], times: ServiceTimes, observer: Observer
    ) -> None:
        self.workers = list(workers)
        self.jobs: list[Job] = []
        self.live: set[Job] = set()
        self.recomputed = 0
        self.on_change: Callable[[SimWorker], None] = lambda _: None
        self._loop = loop
        self._times = times
        self._observer = observer

    def submit(self, arrival: Arrival) -> None:
        """Take in a request and dispatch it."""
        job = Job(arrival, images_left=arrival.images)
        self.jobs.append(job)
        self.live.add(job)
        self._observer.arrived(self._loop.now, images=arrival.images, asked=arrival.tokens)
        job.decode = self._least(Stage.DECODE)
        job.prefill = self._least(Stage.PREFILL)
        for _ in range(arrival.images):
            self.queue_image(job)
        if arrival.images == 0:
            self.queue_prompt(job)

    def queue_image(self, job: Job) -> None:
        """Give one image of a request to an encoder."""
        encoders = [w for w in self.workers if w.stage is Stage.ENCODE and w.serving]
        encoder = min(encoders, key=lambda w: (len(w.images) + w.in_batch, w.name))
        encoder.images.append(job)
        self._encode(encoder)

    def queue_prompt(self, job: Job) -> None:
        """Give a request whose images are there to its prefill worker."""
        assert job.prefill is not None
        if not job.prefill.serving or job.prefill.stage is not Stage.PREFILL:
            job.prefill = self._least(Stage.PREFILL)
        job.prefill.prompts.append(job)
        self._prefill(job.prefill)

    def offer(self, job: Job) -> None:
        """Offer held KV to the request's decode worker, or to another if that one leaves."""
        assert job.decode is not None
        if not job.decode.serving or job.decode.stage is not Stage.DECODE:
            job.decode = self._least(Stage.DECODE)
        job.decode.offers.append(job)
        self._reserve(job.decode)

    def recompute(self, job: Job) -> None:
        """Prefill a request again, with the tokens it has so far."""
        self.recomputed += 1
        job.attempt += 1
        self._release(job)
        job.adopted = job.started = False
        job.prefill, job.decode = self._least(Stage.PREFILL), self._least(Stage.DECODE)
        self.queue_prompt(job)

    def hold(self, job: Job, holder: SimWorker) -> None:
        """Keep the KV of a request at `holder` until somebody has it."""
        job.holder = holder
        holder.leases.add(job)

    def kick(self, worker: SimWorker) -> None:
        """Start what a worker can do now."""
        self._encode(worker)
        self._prefill(worker)
        self._reserve(worker)
        self._step(worker)

    def _least(self, stage: Stage) -> SimWorker:
        """The worker with the fewest unfinished requests, as the gateway's ledger counts them."""
        load: Counter[SimWorker | None] = Counter()
        for job in self.live:
            load[job.decode] += 1
            if not job.adopted:
                load[job.prefill] += 1
        serving = [w for w in self.workers if w.stage is stage and w.serving]
        return min(serving, key=lambda w: (load[w], w.name))

    def _encode(self, worker: SimWorker) -> None:
        if worker.busy or not worker.images:
            return
        batch = [worker.images.popleft() for _ in range(self._batch(worker.images, Stage.ENCODE))]
        seconds = self._times.encode(len(batch))
        self._compute(worker, len(batch), seconds, lambda: self._encoded(batch, seconds))

    def _encoded(self, batch: list[Job], seconds: float) -> None:
        for job in batch:
            self._observer.encoded(seconds / len(batch))
            self._loop.after(self._times.image_transfer, lambda job=job: self._image(job))  # type: ignore[misc]

    def _image(self, job: Job) -> None:
        job.images_left -= 1
        if job.images_left == 0:
            self.queue_prompt(job)

    def _prefill(self, worker: SimWorker) -> None:
        if worker.busy or not worker.prompts:
            return
        batch = [
            worker.prompts.popleft() for _ in range(self._batch(worker.prompts, Stage.PREFILL))
        ]
        for job in batch:
            job.started = True
        seconds = self._times.prefill(len(batch))
        self._compute(worker, len(batch), seconds, lambda: self._prefilled(worker, batch, seconds))

    def _prefilled(self, worker: SimWorker, batch: list[Job], seconds: float) -> None:
        for job in batch:
            self._observer.prefilled(seconds / len(batch))
            self._token(job)
            if not job.done:
                self.hold(job, worker)
                self.offer(job)

    def _reserve(self, worker: SimWorker) -> None:
        room = self._times.decode_batch - len(worker.decoding) - len(worker.pulling)
        while worker.offers and room > 0 and worker.serving:
            job = worker.offers.popleft()
            worker.pulling.add(job)
            room -= 1
            attempt = job.attempt
            self._loop.after(
                self._times.kv_transfer,
                lambda job=job, attempt=attempt: self._adopt(worker, job, attempt),  # type: ignore[misc]
            )

    def _adopt(self, worker: SimWorker, job: Job, attempt: int) -> None:
        worker.pulling.discard(job)
        if job.attempt != attempt:
            return
        if not worker.serving:
            self.offer(job)
            self.on_change(worker)
            return
        self._release(job)
        job.adopted = True
        worker.decoding.append(job)
        self._step(worker)

    def _release(self, job: Job) -> None:
        holder, job.holder = job.holder, None
        if holder is not None:
            holder.leases.discard(job)
            self.on_change(holder)

    def _step(self, worker: SimWorker) -> None:
        if worker.busy or not worker.decoding:
            return
        batch, seconds = list(worker.decoding), self._times.decode(len(worker.decoding))
        self._compute(worker, 0, seconds, lambda: self._stepped(worker, batch, seconds))

    def _stepped(self, worker: SimWorker, batch: list[Job], seconds: float) -> None:
        self._observer.stepped(len(batch), seconds)
        for job in batch:
            self._token(job)
        worker.decoding = [job for job in worker.decoding if not job.done]
        self._reserve(worker)

    def _token(self, job: Job) -> None:
        if job.produced == 0:
            job.first_token = self._loop.now
        job.produced += 1
        if job.done:
            job.finished = self._loop.now
            self.live.discard(job)
            self._observer.finished(asked=job.arrival.tokens, produced=job.produced)

    def _compute(
        self, worker: SimWorker, items: int, seconds: float, then: Callable[[], None]
    ) -> None:
        def end() -> None:
            worker.busy, worker.in_batch = False, 0
            then()
            self.on_change(worker)
            self.kick(worker)

        worker.busy, worker.in_batch = True, items
        self._loop.after(seconds, end)

    def _batch(self, queue: Iterable[Job], stage: Stage) -> int:
        times = self._times
        most = times.encode_batch if stage is Stage.ENCODE else times.prefill_batch
        return min(most, sum(1 for _ in queue))
