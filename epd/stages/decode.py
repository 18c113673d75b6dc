"""The decode stage: adopt offered KV when there is room, then decode it in the continuous batch.

Offers wait in order. Room is reserved before the KV is pulled, so an arriving KV always has a
place.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from epd.errors import EPDError, UnavailableError
from epd.messages import Adopted, KVBlocks, KVGone, KVOffer, KVPull, KVRelease, KVRenew
from epd.stages.base import Host, Payload, as_tensor
from epd.stages.core_loop import CoreLoop, Operation

__all__ = ["DecodeStage"]

_PULL_TIMEOUT = 10.0
_RENEW_EVERY = 1.0


@dataclass(slots=True, eq=False)
class _Offer:
    message: KVOffer
    producer: str
    deadline: float
    pulled: float | None = None


class DecodeStage:
    """Message handlers of decode; the core itself runs in `loop`."""

    def __init__(
        self, host: Host, loop: CoreLoop, *, clock: Callable[[], float], device: str
    ) -> None:
        self._host = host
        self._loop = loop
        self._clock = clock
        self._device = device
        self._queue: deque[_Offer] = deque()
        self._pulling: dict[str, _Offer] = {}
        self._renewed = 0.0
        loop.before_turn.append(self._reserving)

    @property
    def queued(self) -> int:
        """Offers waiting for room, and pulls under way."""
        return len(self._queue) + len(self._pulling)

    def offer(self, sender: str, message: KVOffer, _: Sequence[Payload]) -> None:
        """Queue an offered request."""
        rid, attempt = message.request_id, message.attempt
        if self._loop.attempts.get(rid, -1) >= attempt or message.handoff.request_id != rid:
            return
        self.cancel(rid, attempt)
        self._loop.begin(rid, attempt)
        self._queue.append(_Offer(message, sender, self._clock() + message.ttl))
        self._loop.wake()

    def _reserving(self) -> Operation | None:
        offers = list(self._queue)
        return (lambda: self._reserve(offers)) if offers else None

    def _reserve(self, offers: list[_Offer]) -> Callable[[], None]:
        """In the compute thread: reserve room for offers in order, until one does not fit."""
        reserved: list[_Offer] = []
        refused: list[tuple[_Offer, EPDError]] = []
        for offer in offers:
            message = offer.message
            if self._loop.attempts.get(message.request_id) != message.attempt:
                continue
            try:
                if not self._loop.core.reserve(message.handoff, message.attempt, offer.deadline):
                    break
                reserved.append(offer)
            except EPDError as error:
                refused.append((offer, error))
        return lambda: self._pull(reserved, refused)

    def _pull(self, reserved: list[_Offer], refused: list[tuple[_Offer, EPDError]]) -> None:
        # an offer no longer queued was dropped meanwhile, and whoever dropped it cancels the
        # reservation
        for offer in reserved:
            if offer not in self._queue:
                continue
            self._queue.remove(offer)
            rid, attempt = offer.message.request_id, offer.message.attempt
            offer.pulled = self._clock()
            self._pulling[rid] = offer
            if not self._host.post(offer.producer, KVPull(request_id=rid, attempt=attempt)):
                self._lost(rid)
        for offer, error in refused:
            if offer in self._queue:
                self._drop(offer)
                self._loop.fail(offer.message.request_id, error, retryable=False)

    def blocks(self, sender: str, message: KVBlocks, payloads: Sequence[Payload]) -> None:
        """Adopt pulled KV: from here on the request decodes on this worker."""
        rid, attempt = message.request_id, message.attempt
        offer = self._pulling.get(rid)
        if offer is None or (offer.producer, offer.message.attempt) != (sender, attempt):
            return
        del self._pulling[rid]
        self._loop.submit(lambda: self._import(offer, list(payloads)))

    def _import(self, offer: _Offer, payloads: list[Payload]) -> Callable[[], None] | None:
        rid, attempt = offer.message.request_id, offer.message.attempt
        if self._loop.attempts.get(rid) != attempt:
            return None
        try:
            tensors = [as_tensor(payload, self._device) for payload in payloads]
            self._loop.core.import_kv(rid, tensors)
        except Exception as error:
            return lambda e=error: self._loop.fail(rid, e, retryable=True)  # type: ignore[misc]
        size = sum(tensor.nbytes for tensor in tensors)
        return lambda: self._adopted(offer, size)

    def _adopted(self, offer: _Offer, size: int) -> None:
        rid, attempt = offer.message.request_id, offer.message.attempt
        self._host.post(offer.producer, KVRelease(request_id=rid, attempt=attempt))
        seconds = self._clock() - (offer.pulled or self._clock())
        self._host.emit(
            Adopted(request_id=rid, attempt=attempt, transfer_seconds=seconds, transfer_bytes=size)
        )

    def gone(self, sender: str, message: KVGone, _: Sequence[Payload]) -> None:
        """The producer no longer holds the KV: another attempt is needed."""
        offer = self._pulling.get(message.request_id)
        if offer and (offer.producer, offer.message.attempt) == (sender, message.attempt):
            self._lost(message.request_id)

    def _lost(self, rid: str) -> None:
        self._pulling.pop(rid, None)
        self._loop.fail(rid, UnavailableError("the KV to continue from is gone"), retryable=True)

    def cancel(self, rid: str, attempt: int) -> None:
        """Forget offers and pulls of a request up to `attempt`, telling the producer."""
        stale = [o for o in self._queue if o.message.request_id == rid]
        pulling = self._pulling.get(rid)
        for offer in [*stale, *([pulling] if pulling else [])]:
            if offer.message.attempt <= attempt:
                self._drop(offer)

    def _drop(self, offer: _Offer) -> None:
        rid, attempt = offer.message.request_id, offer.message.attempt
        if offer in self._queue:
            self._queue.remove(offer)
        self._pulling.pop(rid, None)
        self._host.post(offer.producer, KVRelease(request_id=rid, attempt=attempt))

    def hand_back(self, *, pulling: bool) -> None:
        """Give offers back to the gateway; with `pulling` also those whose KV is on its way."""
        for offer in [*self._queue, *(self._pulling.values() if pulling else ())]:
            self._drop(offer)
            self._loop.hand_back(offer.message.request_id, offer.message.attempt)

    def stop(self) -> None:
        """Ask the core for room no more."""
        self._loop.before_turn.remove(self._reserving)

    def reset(self) -> None:
        """Forget every offer."""
        for offer in [*self._queue, *self._pulling.values()]:
            self._drop(offer)

    def sweep(self, alive: Callable[[str], bool]) -> None:
        """Renew leases, and give up on producers that died or went silent; call about twice a
        second.
        """
        now = self._clock()
        for offer in [*self._queue, *self._pulling.values()]:
            silent = offer.pulled is not None and now - offer.pulled > _PULL_TIMEOUT
            if silent or now >= offer.deadline or not alive(offer.producer):
                self._drop(offer)
                self._lost(offer.message.request_id)
        if now - self._renewed >= _RENEW_EVERY:
            self._renewed = now
            wanted: dict[str, list[str]] = {}
            for offer in [*self._queue, *self._pulling.values()]:
                wanted.setdefault(offer.producer, []).append(offer.message.request_id)
            for producer, names in wanted.items():
                self._host.post(producer, KVRenew(request_ids=names))
