"""KV on offer: held under a lease until the worker it was offered to has pulled it.

The consumer pulls, renews while it waits for room, and releases; a lease that runs out, or whose
consumer died, gives the blocks back. Offered are prompts after prefill, and requests that decoded
here and are to go on elsewhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass

import structlog

from epd.errors import EPDError, UnavailableError, WireError
from epd.kv.handoff import KVHandoff
from epd.messages import KVBlocks, KVGone, KVOffer, KVPull, KVRelease, KVRenew, MoveDecode
from epd.stages.base import Host, Payload
from epd.stages.core_loop import CoreLoop
from epd.tensors import to_blob
from epd.wire import Blob

__all__ = ["LEASE_SECONDS", "KVSource"]

LEASE_SECONDS = 5.0
_log = structlog.get_logger("epd.kv")


@dataclass(slots=True)
class _Lease:
    consumer: str
    attempt: int
    deadline: float
    expires: float
    pulled: bool = False


class KVSource:
    """Message handlers of whoever gives KV away; `on_move` is called before a request moves."""

    def __init__(
        self,
        host: Host,
        loop: CoreLoop,
        *,
        clock: Callable[[], float],
        on_move: Callable[[], None] = lambda: None,
    ) -> None:
        self._host = host
        self._loop = loop
        self._clock = clock
        self._on_move = on_move
        self._leases: dict[str, _Lease] = {}
        self._sending: set[asyncio.Task[None]] = set()

    @property
    def leases(self) -> int:
        """Requests whose KV is held for another worker."""
        return len(self._leases)

    def offer(self, handoff: KVHandoff, attempt: int, *, consumer: str, deadline: float) -> bool:
        """Whether a held request was offered; its lease begins. It is still the caller's if not."""
        rid, now = handoff.request_id, self._clock()
        ttl = min(1e9, max(0.0, deadline - now))
        message = KVOffer(request_id=rid, attempt=attempt, handoff=handoff, ttl=ttl)
        sent = self._host.post(consumer, message)
        if sent:
            self._leases[rid] = _Lease(consumer, attempt, deadline, now + LEASE_SECONDS)
        return sent

    def move(self, message: MoveDecode) -> None:
        """Have a request that decodes here go on at its consumer; give it back if that fails."""
        rid, attempt = message.request_id, message.attempt
        lease = self._leases.get(rid)
        if lease is None or lease.attempt != attempt:
            self._loop.submit(lambda: self._stop(message))

    def _stop(self, message: MoveDecode) -> Callable[[], None]:
        """In the compute thread, between two steps."""
        rid, attempt = message.request_id, message.attempt
        try:
            self._on_move()
            if self._loop.attempts.get(rid) != attempt:
                raise KeyError(rid)
            handoff, deadline = self._loop.core.hold(rid)
        except (KeyError, EPDError):
            return lambda: self._loop.hand_back(rid, attempt, always=True)
        return lambda: self._moved(message, handoff, deadline)

    def _moved(self, message: MoveDecode, handoff: KVHandoff, deadline: float | None) -> None:
        rid, attempt = message.request_id, message.attempt
        if self._loop.attempts.get(rid) != attempt:
            return
        until = deadline if deadline is not None else float("inf")
        if not self.offer(handoff, attempt, consumer=message.consumer, deadline=until):
            self._loop.hand_back(rid, attempt)

    def pull(self, sender: str, message: KVPull, _: Sequence[Payload]) -> None:
        """Send the KV of a leased request to the worker it was offered to."""
        rid = message.request_id
        lease = self._leases.get(rid)
        if lease is None or (lease.consumer, lease.attempt) != (sender, message.attempt):
            self._host.post(sender, KVGone(request_id=rid, attempt=message.attempt))
            return
        lease.expires, lease.pulled = self._clock() + LEASE_SECONDS, True
        self._loop.submit(lambda: self._export(rid, message.attempt, sender))

    def _export(self, rid: str, attempt: int, consumer: str) -> Callable[[], None] | None:
        """In the compute thread: copy the KV to host memory."""
        lease = self._leases.get(rid)
        if lease is None or lease.attempt != attempt:
            return None
        try:
            blobs = [to_blob(tensor) for tensor in self._loop.core.export_kv(rid)]
        except Exception as error:
            return lambda e=error: self._failed(rid, lease, e)  # type: ignore[misc]
        return lambda: self._begin(self._send(rid, lease, blobs))

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def _send(self, rid: str, lease: _Lease, blobs: Sequence[Blob]) -> None:
        try:
            blobs = await self._host.sealed(blobs)
            if self._leases.get(rid) is not lease:
                return
            lease.expires = self._clock() + LEASE_SECONDS
            message = KVBlocks(request_id=rid, attempt=lease.attempt)
            sent = self._host.post(lease.consumer, message, blobs)
        except Exception as error:
            self._failed(rid, lease, error)
            return
        if not sent:
            self._lost(rid, "the decode worker cannot be reached")

    def _failed(self, rid: str, lease: _Lease, error: Exception) -> None:
        """The KV cannot be sent; what is too large for a message would not fare better again."""
        if self._leases.get(rid) is not lease:
            return
        if not isinstance(error, EPDError):
            _log.error("KV not sent", request_id=rid, exc_info=error)
        self._drop(rid, keep_attempt=True)
        self._loop.fail(rid, error, retryable=not isinstance(error, WireError))

    def _lost(self, rid: str, why: str) -> None:
        self._drop(rid, keep_attempt=True)
        self._loop.fail(rid, UnavailableError(why), retryable=True)

    def renew(self, sender: str, message: KVRenew, _: Sequence[Payload]) -> None:
        """Extend the leases a consumer still wants."""
        for rid in message.request_ids:
            lease = self._leases.get(rid)
            if lease is not None and lease.consumer == sender:
                lease.expires = self._clock() + LEASE_SECONDS

    def release(self, sender: str, message: KVRelease, _: Sequence[Payload]) -> None:
        """Free the KV that its consumer has, or no longer wants."""
        lease = self._leases.get(message.request_id)
        if lease and (lease.consumer, lease.attempt) == (sender, message.attempt):
            self._drop(message.request_id)

    def _drop(self, rid: str, *, keep_attempt: bool = False) -> None:
        lease = self._leases.pop(rid, None)
        if lease is not None and self._loop.attempts.get(rid) == lease.attempt:
            if not keep_attempt:
                del self._loop.attempts[rid]
            self._loop.submit(lambda: self._loop.core.release(rid))

    def cancel(self, rid: str, attempt: int) -> None:
        """Give up the lease of a request up to `attempt`."""
        lease = self._leases.get(rid)
        if lease is not None and lease.attempt <= attempt:
            self._drop(rid)

    def hand_back(self) -> None:
        """Give every leased request back to the gateway."""
        for rid, lease in list(self._leases.items()):
            self._drop(rid, keep_attempt=True)
            self._loop.hand_back(rid, lease.attempt)

    def reset(self) -> None:
        """Give up every lease."""
        for rid in list(self._leases):
            self._drop(rid)

    def sweep(self, alive: Callable[[str], bool]) -> None:
        """Give up leases that ran out; call about twice a second. `alive` tells live workers."""
        now = self._clock()
        for rid, lease in list(self._leases.items()):
            expired = now >= lease.expires
            if expired and not lease.pulled and alive(lease.consumer):
                # whoever waits for room renews: the consumer does not know of the offer
                self._lost(rid, "the decode worker did not take up the offer")
            elif expired or now >= lease.deadline or not alive(lease.consumer):
                self._drop(rid)
