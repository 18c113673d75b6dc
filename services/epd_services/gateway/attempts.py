"""The attempts at each request: sent out, repeated after a loss, ended exactly once."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import structlog

from epd.cache.base import TokenCache
from epd.cache.keys import pixel_digest, token_cache_key
from epd.errors import DeadlineError, EPDError, UnavailableError, WorkerFailedError
from epd.membership import Membership
from epd.messages import Cancel, EncodeRequest, MoveDecode, PrefillRequest
from epd.node import Node
from epd.request import MMItem, Request
from epd.roles import Stage, StageSet
from epd.wire import Blob
from epd_services.gateway.dispatch_api import ImagePixels
from epd_services.gateway.ledger import Record
from epd_services.gateway.routing import Router

__all__ = ["Attempts", "DispatchLimits"]

_log = structlog.get_logger("epd.dispatch")
_INLINE_HASH_BYTES = 1 << 20
_BACK_OFF = 0.02
_LOOK_AGAIN = 0.05


@dataclass(frozen=True, slots=True)
class DispatchLimits:
    """Bounds of the ledger. Seconds where a time."""

    max_inflight: int = 256
    max_failures: int = 3
    drain: float = 20.0
    tick: float = 0.1
    peers_every: float = 0.5


class Attempts:
    """The records in flight, and everything that moves one on.

    `on_unreachable` is told the name of a worker whose queue took no more. `moved` counts the
    running answers that were sent from each worker to a peer. `on_start` is told every new record.
    """

    def __init__(
        self,
        node: Node,
        membership: Membership,
        cache: TokenCache | None,
        *,
        clock: Callable[[], float],
        limits: DispatchLimits,
        on_unreachable: Callable[[str], None],
    ) -> None:
        self.records: dict[str, Record] = {}
        self.counters: Counter[str] = Counter()
        self.moved: Counter[str] = Counter()
        self.on_start: Callable[[Record], None] = lambda _: None
        self.encoder_key = ("", "")
        self.router = Router(membership)
        self._node = node
        self._membership = membership
        self._cache = cache
        self._clock = clock
        self._limits = limits
        self._on_unreachable = on_unreachable
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, record: Record) -> None:
        """Enter a record and send out its first attempt."""
        self.records[record.request_id] = record
        self.on_start(record)
        self._spawn(record, self._begin(record))
        loop = asyncio.get_running_loop()
        record.timer = loop.call_later(self._left(record), self.expire, record)

    async def stop(self) -> None:
        """Cancel what is being sent out."""
        for task in list(self._tasks):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    def _spawn(self, record: Record, work: Coroutine[Any, Any, None]) -> None:
        async def guarded() -> None:
            try:
                await work
            except EPDError as error:
                self.end(record, error)
            except Exception:
                _log.exception("dispatch failed", request_id=record.request_id)
                self.end(record, EPDError("the request could not be dispatched"))

        task = asyncio.get_running_loop().create_task(guarded())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _begin(self, record: Record) -> None:
        made_by = record.pruning.fingerprint() if record.pruning is not None else "none"
        items = [await self._item(image, record.request.salt, made_by) for image in record.images]
        request = record.request
        record.request = Request(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            mm_items=items,
            sampling=request.sampling,
            salt=request.salt,
        )
        self._next(record)
        await self._attempt(record)

    async def _item(self, image: ImagePixels, salt: str, made_by: str) -> MMItem:
        args = (image.width, image.height, image.rgb)
        small = len(image.rgb) <= _INLINE_HASH_BYTES
        digest = pixel_digest(*args) if small else await asyncio.to_thread(pixel_digest, *args)
        if not self.encoder_key[0]:
            self.router.require(Stage.ENCODE)
        revision, dtype = self.encoder_key
        key = token_cache_key(
            mm_hash=digest,
            encoder_revision=revision,
            pruner_fingerprint=made_by,
            dtype=dtype,
            salt=salt,
        )
        return MMItem(mm_hash=digest, cache_key=key, width=image.width, height=image.height)

    def _next(self, record: Record) -> None:
        """Begin another attempt. At once: whatever else ends the old one is not about this one."""
        record.attempt += 1
        record.prefill = record.decode = ""
        record.encoders.clear()
        record.early.clear()
        record.prefilled = record.adopted = False

    async def _attempt(self, record: Record, *, wait: float = 0.0) -> None:
        attempt = record.attempt
        if wait:
            await asyncio.sleep(wait)
        items = record.request.mm_items
        cached = [False] * len(items)
        if items and self._cache is not None:
            cached = await self._cache.contains([item.cache_key for item in items])
        for item in (i for i, hit in enumerate(cached) if not hit and i not in record.pixels):
            (record.pixels[item],) = await self._node.sealed([_pixels(record.images[item])])
        if record.done or record.attempt != attempt:
            return
        while (pair := self._pair()) is None:
            await asyncio.sleep(_LOOK_AGAIN)
            if record.done or record.attempt != attempt:
                return
        record.prefill, record.decode = pair
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
            pruning=record.pruning,
            queries=record.queries,
            budget=record.budget,
        )
        if not self._node.post(record.prefill, message):
            self._on_unreachable(record.prefill)
            return
        for item in (i for i, hit in enumerate(cached) if not hit):
            self._encode(record, item)

    def _pair(self) -> tuple[str, str] | None:
        """The workers for an attempt; None while a switch under way may give a stage back its
        only one.
        """
        try:
            return self.router.pair(self.records.values())
        except UnavailableError:
            self.router.may_serve(Stage.PREFILL, Stage.DECODE)
            return None

    def _encode(self, record: Record, item: int) -> None:
        mm, image = record.request.mm_items[item], record.images[item]
        record.encoders.pop(item, None)
        try:
            encoder = self.router.encoder(mm.cache_key, self.records.values())
        except UnavailableError:
            # the prefill worker asks again for what does not come
            self.router.may_serve(Stage.ENCODE)
            return
        record.encoders[item] = encoder
        message = EncodeRequest(
            request_id=record.request_id,
            attempt=record.attempt,
            item=item,
            mm=mm,
            consumer=record.prefill,
            ttl=self._left(record),
            pruning=record.pruning,
        )
        if not self._node.post(encoder, message, [record.pixels.get(item) or _pixels(image)]):
            self._on_unreachable(encoder)

    def _left(self, record: Record) -> float:
        return max(0.0, record.deadline - self._clock())

    def retry(self, record: Record, *, failed: bool) -> None:
        """Start another attempt from the tokens produced so far, unless too many have failed."""
        self._tell_cancel(record)
        record.failures += failed
        self.counters["retries"] += 1
        self._next(record)
        if record.failures >= self._limits.max_failures:
            self.end(record, WorkerFailedError("every attempt ended with its worker"))
        else:
            wait = _BACK_OFF * (record.failures + record.returned)
            self._spawn(record, self._attempt(record, wait=wait))

    def _tell_cancel(self, record: Record) -> None:
        message = Cancel(request_id=record.request_id, attempt=record.attempt)
        for name in record.workers():
            if name in self._membership.workers:
                self._node.post(name, message)

    def end(self, record: Record, error: EPDError) -> None:
        """The terminal state of a request that did not finish by itself."""
        if record.done:
            return
        self.forget(record)
        self.counters["failed_" + error.code] += 1
        self._tell_cancel(record)
        record.events.put_nowait(error)

    def forget(self, record: Record) -> None:
        record.done = True
        if record.timer is not None:
            # it would keep the pixels until the deadline
            record.timer.cancel()
        self.records.pop(record.request_id, None)

    def cancel(self, record: Record) -> None:
        if not record.done:
            self.forget(record)
            self.counters["cancelled"] += 1
            self._tell_cancel(record)

    def expire(self, record: Record) -> None:
        self.end(record, DeadlineError("the deadline of the request passed"))

    def encode_again(self, record: Record, items: list[int]) -> None:
        """Send images of the current attempt to an encoder once more."""
        try:
            for item in items:
                self._encode(record, item)
        except EPDError as error:
            self.end(record, error)

    def recover(self, lost: str) -> None:
        """Start what the lost worker was doing again elsewhere, or end it in a typed error."""
        for record in list(self.records.values()):
            if record.needs(lost):
                self.retry(record, failed=True)
            else:
                self.encode_again(record, [i for i, e in record.encoders.items() if e == lost])

    def hand_back(self, record: Record, items: list[int]) -> None:
        """Place work again that a draining worker returned: these images, or the whole request."""
        self.counters["returned"] += 1
        if items:
            self.encode_again(record, items)
        else:
            record.returned += 1
            self.retry(record, failed=False)

    def move(self, record: Record) -> bool:
        """Have a running answer go on at a peer of the worker that decodes it; False without one.

        Its tokens carry their index, so the attempt stays the same.
        """
        source = record.decode
        try:
            peer = self.router.decoder(self.records.values())
        except UnavailableError:
            return False
        message = MoveDecode(request_id=record.request_id, attempt=record.attempt, consumer=peer)
        if peer == source or not self._node.post(source, message):
            return False
        record.prefill, record.decode, record.adopted = source, peer, False
        self.counters["moved"] += 1
        self.moved[source] += 1
        return True

    def move_if_leaving(self, record: Record) -> None:
        """Move an answer that got to a worker which is about to stop decoding."""
        leaving = self._membership.leaving.get(record.decode, frozenset())
        if Stage.DECODE in leaving and record.decoding():
            self.move(record)

    def move_all(self, worker: str) -> None:
        """Move every answer a worker decodes, as far as there are peers."""
        for record in list(self.records.values()):
            if record.decode == worker and record.decoding():
                self.move(record)

    def left_stages(self, worker: str, gone: StageSet, kept: StageSet) -> None:
        """Start again elsewhere what a worker still had of the stages it no longer hosts."""
        holds_kv = bool(kept & {Stage.PREFILL, Stage.DECODE})
        for record in list(self.records.values()):
            source = record.prefill == worker and not record.adopted
            if (record.decode == worker and Stage.DECODE in gone) or (
                source and (Stage.PREFILL in gone or not holds_kv)
            ):
                self.retry(record, failed=False)
            elif Stage.ENCODE in gone:
                self.encode_again(record, [i for i, e in record.encoders.items() if e == worker])


def _pixels(image: ImagePixels) -> Blob:
    return Blob("uint8", (image.height, image.width, 3), image.rgb)
