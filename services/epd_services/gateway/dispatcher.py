"""The dispatcher: sends each request through the stages and owns it until its one terminal state.

Dispatch is at least once with a rising attempt number; workers forget older attempts, and tokens
of an older attempt or out of turn are dropped here, so a client sees every token once. When a
worker is lost, what it was doing starts again on a peer from the tokens already produced; with no
peer the request ends at once in a typed error.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog

from epd.cache.base import TokenCache
from epd.cache.keys import pixel_digest, token_cache_key
from epd.errors import (
    CapacityError,
    DeadlineError,
    EPDError,
    InvalidRequestError,
    UnavailableError,
    WorkerFailedError,
    error_from_code,
)
from epd.membership import Change, Membership
from epd.messages import (
    Adopted,
    Cancel,
    Encoded,
    EncodeFailed,
    EncodeRequest,
    Evicted,
    Heartbeat,
    Leaving,
    MissingItems,
    Peers,
    PrefillDone,
    PrefillRequest,
    RequestFailed,
    RequestMessage,
    Tokens,
)
from epd.node import Node
from epd.request import FinishReason, MMItem, Request, RequestTimeline, Usage
from epd.roles import Stage, StageSet, format_stages, format_topology
from epd.wire import Blob, Envelope
from epd_services.gateway.dispatch_api import Generation, ImagePixels, Submission
from epd_services.gateway.ledger import LedgerGeneration, Record
from epd_services.gateway.routing import Router

__all__ = ["DispatchLimits", "PipelineDispatcher"]

_log = structlog.get_logger("epd.dispatch")
_INLINE_HASH_BYTES = 1 << 20
_BACK_OFF = 0.02
_RETRYABLE_ENCODE = {"internal_error", "unavailable"}


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """Bounds of the ledger. Seconds where a time."""

    max_inflight: int = 256
    max_failures: int = 3
    drain: float = 20.0
    tick: float = 0.1
    peers_every: float = 0.5


def _stage_order(stages: StageSet) -> tuple[int, ...]:
    return tuple("EPD".index(letter) for letter in format_stages(stages))


class PipelineDispatcher:
    """The `Dispatcher` over ZeroMQ (or any `Transport`) and a shared token cache."""

    def __init__(
        self,
        node: Node,
        membership: Membership,
        cache: TokenCache | None,
        *,
        clock: Callable[[], float],
        limits: DispatchLimits | None = None,
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._node = node
        self._membership = membership
        self._cache = cache
        self._clock = clock
        self._limits = limits or DispatchLimits()
        self._router = Router(membership)
        self._records: dict[str, Record] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._services: list[asyncio.Task[None]] = []
        self._encoder_key = ("", "")
        self._draining = False
        for kind, handler in (
            (Heartbeat, self._heartbeat),
            (Leaving, self._leaving),
            (Encoded, self._encoded),
            (EncodeFailed, self._encode_failed),
            (MissingItems, self._missing),
            (PrefillDone, self._prefilled),
            (Adopted, self._adopted),
            (Tokens, self._tokens),
            (Evicted, self._evicted),
            (RequestFailed, self._failed),
        ):
            node.on(kind, handler)  # type: ignore[arg-type]

    # the Dispatcher protocol

    async def start(self) -> None:
        """Begin to listen and to watch the workers."""
        self._services = [asyncio.create_task(self._node.run()), asyncio.create_task(self._watch())]

    async def stop(self) -> None:
        """Refuse new requests, let the rest end within the drain limit, then end them as
        unavailable.
        """
        self._draining = True
        until = self._clock() + self._limits.drain
        while self._records and self._clock() < until:
            await asyncio.sleep(0.02)
        for record in list(self._records.values()):
            self._end(record, UnavailableError("the service is shutting down"))
        services, self._services = self._services, []
        if not services:
            return
        for task in [*services, *self._tasks]:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
        self._node.close()
        if self._cache is not None:
            await self._cache.close()

    def ready(self) -> tuple[bool, str]:
        """Whether every stage has a live worker, and if not which is missing."""
        if self._draining:
            return False, "draining"
        for stage in Stage:
            if not any(w.accepting for w in self._membership.hosting(stage)):
                return False, f"no live worker hosts {stage.name.lower()}"
        return True, "ready"

    def submit(self, submission: Submission) -> Generation:
        """Enter a request in the ledger and start it.

        Raises when full, draining, or a stage has no worker.
        """
        if self._draining:
            raise UnavailableError("the service is draining")
        if submission.request_id in self._records:
            raise InvalidRequestError("a request with this id is in flight", "request_id")
        if len(self._records) >= self._limits.max_inflight:
            self.counters["shed"] += 1
            raise CapacityError("too many requests in flight", retry_after=1.0)
        self._router.pair(())
        now = self._clock()
        request = Request(
            request_id=submission.request_id,
            prompt_token_ids=submission.prompt_token_ids,
            sampling=submission.sampling,
            salt=submission.salt,
        )
        record = Record(
            request, submission.images, now + submission.timeout_s, RequestTimeline(self._clock)
        )
        self._records[record.request_id] = record
        self._spawn(record, self._begin(record))
        asyncio.get_running_loop().call_later(submission.timeout_s, self._expire, record)
        return LedgerGeneration(record, self._cancel)

    def pipeline(self) -> dict[str, Any]:
        """Workers, queues and counters, for people and for the page."""
        now = self._clock()
        workers = [
            {
                "name": w.worker_id,
                "stages": format_stages(w.stages),
                "epoch": w.epoch,
                "state": "serving" if w.accepting else "draining",
                "heartbeat_age_s": round(now - w.last_seen, 3),
                **{name: getattr(w.stats, name) for name in w.stats.__struct_fields__},
            }
            for w in sorted(self._membership.workers.values(), key=lambda w: w.worker_id)
        ]
        return {
            "topology": format_topology(
                sorted((w.stages for w in self._membership.workers.values()), key=_stage_order)
            ),
            "ready": self.ready()[0],
            "inflight": len(self._records),
            "workers": workers,
            "refused": dict(self._membership.refused),
            "token_cache": {
                "queries": sum(w["cache_queries"] for w in workers),
                "hits": sum(w["cache_hits"] for w in workers),
            },
            "counters": dict(self.counters),
            "frames_rejected": dict(self._node.rejected),
        }

    # one request

    def _spawn(self, record: Record, work: Any) -> None:
        async def guarded() -> None:
            try:
                await work
            except EPDError as error:
                self._end(record, error)
            except Exception:
                _log.exception("dispatch failed", request_id=record.request_id)
                self._end(record, EPDError("the request could not be dispatched"))

        task = asyncio.get_running_loop().create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _begin(self, record: Record) -> None:
        items = [await self._item(image, record.request.salt) for image in record.images]
        request = record.request
        record.request = Request(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            mm_items=items,
            sampling=request.sampling,
            salt=request.salt,
        )
        await self._attempt(record)

    async def _item(self, image: ImagePixels, salt: str) -> MMItem:
        args = (image.width, image.height, image.rgb)
        small = len(image.rgb) <= _INLINE_HASH_BYTES
        digest = pixel_digest(*args) if small else await asyncio.to_thread(pixel_digest, *args)
        if not self._encoder_key[0]:
            self._router.require(Stage.ENCODE)
        revision, dtype = self._encoder_key
        key = token_cache_key(
            mm_hash=digest,
            encoder_revision=revision,
            pruner_fingerprint="none",
            dtype=dtype,
            salt=salt,
        )
        return MMItem(mm_hash=digest, cache_key=key, width=image.width, height=image.height)

    async def _attempt(self, record: Record, *, wait: float = 0.0) -> None:
        record.attempt += 1
        attempt = record.attempt
        if wait:
            await asyncio.sleep(wait)
        record.encoders.clear()
        record.adopted = False
        items = record.request.mm_items
        cached = [False] * len(items)
        if items and self._cache is not None:
            cached = await self._cache.contains([item.cache_key for item in items])
        if record.done or record.attempt != attempt:
            return
        record.prefill = record.decode = ""
        record.prefill, record.decode = self._router.pair(self._records.values())
        request = record.request
        message = PrefillRequest(
            request_id=record.request_id,
            attempt=attempt,
            prompt_token_ids=request.prompt_token_ids,
            items=items,
            from_cache=cached,
            output_token_ids=[output.token_id for output in record.outputs],
            sampling=request.sampling,
            salt=request.salt,
            consumer=record.decode,
            ttl=self._left(record),
        )
        if not self._node.post(record.prefill, message):
            self._apply(self._membership.lost(record.prefill))
            return
        for item in (i for i, hit in enumerate(cached) if not hit):
            self._encode(record, item)

    def _encode(self, record: Record, item: int) -> None:
        mm, image = record.request.mm_items[item], record.images[item]
        record.encoders.pop(item, None)
        encoder = self._router.encoder(mm.cache_key, self._records.values())
        record.encoders[item] = encoder
        message = EncodeRequest(
            request_id=record.request_id,
            attempt=record.attempt,
            item=item,
            mm=mm,
            consumer=record.prefill,
            ttl=self._left(record),
        )
        pixels = Blob("uint8", (image.height, image.width, 3), image.rgb)
        if not self._node.post(encoder, message, [pixels]):
            self._apply(self._membership.lost(encoder))

    def _left(self, record: Record) -> float:
        return max(0.0, record.deadline - self._clock())

    def _retry(self, record: Record, *, failed: bool) -> None:
        """Start another attempt from the tokens produced so far, unless too many have failed."""
        self._tell_cancel(record)
        record.failures += failed
        self.counters["retries"] += 1
        if record.failures >= self._limits.max_failures:
            self._end(record, WorkerFailedError("every attempt ended with its worker"))
        else:
            self._spawn(record, self._attempt(record, wait=_BACK_OFF * record.failures))

    def _tell_cancel(self, record: Record) -> None:
        message = Cancel(request_id=record.request_id, attempt=record.attempt)
        for name in record.workers():
            if name in self._membership.workers:
                self._node.post(name, message)

    def _end(self, record: Record, error: EPDError) -> None:
        """The terminal state of a request that did not finish by itself."""
        if record.done:
            return
        self._forget(record)
        self.counters["failed_" + error.code] += 1
        self._tell_cancel(record)
        record.events.put_nowait(error)

    def _forget(self, record: Record) -> None:
        record.done = True
        self._records.pop(record.request_id, None)

    def _cancel(self, record: Record) -> None:
        if not record.done:
            self._forget(record)
            self.counters["cancelled"] += 1
            self._tell_cancel(record)

    def _expire(self, record: Record) -> None:
        self._end(record, DeadlineError("the deadline of the request passed"))

    # what the workers say

    def _current(self, envelope: Envelope, message: RequestMessage) -> Record | None:
        """The record a message is about; a worker still busy with an attempt that is over is
        told so.
        """
        record = self._records.get(message.request_id)
        if record is not None and record.attempt == message.attempt:
            return record
        self._stale(envelope.sender, message.request_id, message.attempt)
        return None

    def _stale(self, sender: str, request_id: str, attempt: int) -> None:
        self.counters["stale"] += 1
        self._node.post(sender, Cancel(request_id=request_id, attempt=attempt))

    def _encoded(self, envelope: Envelope, message: Encoded, _: tuple[Blob, ...]) -> None:
        record = self._records.get(message.request_id)
        if record is None or record.attempt != message.attempt:
            return
        record.encoders.pop(message.item, None)
        self.counters["encode_cached" if message.cached else "encoded"] += 1
        record.timeline.add("queue", message.queue_seconds)
        record.timeline.add("encode", message.encode_seconds)
        record.timeline.add("transfer", message.transfer_seconds)

    def _encode_failed(
        self, envelope: Envelope, message: EncodeFailed, _: tuple[Blob, ...]
    ) -> None:
        record = self._current(envelope, message)
        if record is None or message.item >= len(record.images):
            return
        record.failures += 1
        retryable = message.code in _RETRYABLE_ENCODE
        if not retryable or record.failures >= self._limits.max_failures:
            self._end(record, error_from_code(message.code, message.message))
        else:
            self._encode_again(record, [message.item])

    def _missing(self, envelope: Envelope, message: MissingItems, _: tuple[Blob, ...]) -> None:
        record = self._current(envelope, message)
        if record is not None:
            self._encode_again(record, [i for i in message.items if i < len(record.images)])

    def _encode_again(self, record: Record, items: list[int]) -> None:
        try:
            for item in items:
                self._encode(record, item)
        except EPDError as error:
            self._end(record, error)

    def _prefilled(self, envelope: Envelope, message: PrefillDone, _: tuple[Blob, ...]) -> None:
        if record := self._current(envelope, message):
            record.timeline.add("queue", message.queue_seconds)
            record.timeline.add("prefill", message.prefill_seconds)
            # a retry prefills the answer so far with the prompt; the first attempt tells the
            # prompt's size
            record.usage = record.usage or Usage(
                prompt_tokens=message.prompt_tokens,
                completion_tokens=0,
                image_tokens=message.image_tokens,
                cached_tokens=message.cached_tokens,
            )

    def _adopted(self, envelope: Envelope, message: Adopted, _: tuple[Blob, ...]) -> None:
        if record := self._current(envelope, message):
            record.adopted = True
            record.timeline.add("transfer", message.transfer_seconds)

    def _tokens(self, envelope: Envelope, message: Tokens, _: tuple[Blob, ...]) -> None:
        for token in message.tokens:
            record = self._records.get(token.request_id)
            if record is None or record.attempt != token.attempt:
                self._stale(envelope.sender, token.request_id, token.attempt)
            elif token.output.index != len(record.outputs):
                self.counters["out_of_turn"] += 1
            else:
                reason = FinishReason(token.finish_reason) if token.finish_reason else None
                if reason is not None:
                    self._forget(record)
                    self.counters["finished"] += 1
                record.token(token.output, reason)

    def _evicted(self, envelope: Envelope, message: Evicted, _: tuple[Blob, ...]) -> None:
        if record := self._current(envelope, message):
            self.counters["evicted"] += 1
            self._retry(record, failed=False)

    def _failed(self, envelope: Envelope, message: RequestFailed, _: tuple[Blob, ...]) -> None:
        if record := self._current(envelope, message):
            if message.retryable:
                self._retry(record, failed=True)
            else:
                self._end(record, error_from_code(message.code, message.message))

    # the workers themselves

    def _heartbeat(self, envelope: Envelope, message: Heartbeat, _: tuple[Blob, ...]) -> None:
        self._apply(self._membership.heard(envelope, message))

    def _leaving(self, envelope: Envelope, message: Leaving, _: tuple[Blob, ...]) -> None:
        self._apply(self._membership.left(envelope.sender, envelope.incarnation))

    def _apply(self, changes: list[tuple[Change, str]]) -> None:
        if not changes:
            return
        self._announce()
        for change, name in changes:
            _log.info("worker " + change.value, worker=name)
            if change is Change.JOINED:
                worker = self._membership.workers[name]
                if Stage.ENCODE in worker.stages:
                    self._encoder_key = (worker.encoder_revision, worker.dtype)
            else:
                self.counters["workers_lost"] += 1
                self._recover(name)

    def _announce(self) -> None:
        peers = self._membership.peers()
        self._node.know(peers)
        for peer in peers:
            self._node.post(peer.worker_id, Peers(workers=peers))

    def _recover(self, lost: str) -> None:
        """Everything the lost worker was doing starts again elsewhere, or ends in a typed error."""
        for record in list(self._records.values()):
            if record.needs(lost):
                self._retry(record, failed=True)
            else:
                self._encode_again(record, [i for i, e in record.encoders.items() if e == lost])

    async def _watch(self) -> None:
        announced = 0.0
        while True:
            await asyncio.sleep(self._limits.tick)
            self._apply(self._membership.expire())
            if self._clock() - announced >= self._limits.peers_every:
                announced = self._clock()
                self._announce()
