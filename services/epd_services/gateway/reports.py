"""What workers report about requests, turned into the ledger's next move."""

from __future__ import annotations

from epd.errors import WorkerFailedError, error_from_code
from epd.message_base import RequestMessage
from epd.messages import (
    Adopted,
    Cancel,
    Encoded,
    EncodeFailed,
    Evicted,
    MissingItems,
    PrefillDone,
    RequestFailed,
    Returned,
    StepToken,
    Tokens,
)
from epd.node import Node
from epd.request import FinishReason, Usage
from epd.wire import Blob, Envelope
from epd_services.gateway.attempts import Attempts
from epd_services.gateway.ledger import Record

__all__ = ["Reports"]

_RETRYABLE_ENCODE = {"internal_error", "unavailable"}
_REASONS = {None, *(reason.value for reason in FinishReason)}


class Reports:
    """Message handlers; each looks up the record, and tells a worker on an old attempt to stop."""

    def __init__(self, node: Node, attempts: Attempts, *, max_failures: int) -> None:
        self._node = node
        self._attempts = attempts
        self._max_failures = max_failures
        node.on(Encoded, self._encoded)
        node.on(EncodeFailed, self._encode_failed)
        node.on(MissingItems, self._missing)
        node.on(PrefillDone, self._prefilled)
        node.on(Adopted, self._adopted)
        node.on(Tokens, self._tokens)
        node.on(Evicted, self._evicted)
        node.on(Returned, self._returned)
        node.on(RequestFailed, self._failed)

    def _current(self, envelope: Envelope, message: RequestMessage) -> Record | None:
        """The record a message is about; a worker still busy with an attempt that is over is
        told so.
        """
        record = self._attempts.records.get(message.request_id)
        if record is not None and record.attempt == message.attempt:
            return record
        self._stale(envelope.sender, message.request_id, message.attempt)
        return None

    def _stale(self, sender: str, request_id: str, attempt: int) -> None:
        self._attempts.counters["stale"] += 1
        self._node.post(sender, Cancel(request_id=request_id, attempt=attempt))

    def _encoded(self, envelope: Envelope, message: Encoded, _: tuple[Blob, ...]) -> None:
        record = self._attempts.records.get(message.request_id)
        if record is None or record.attempt != message.attempt:
            return
        record.encoders.pop(message.item, None)
        self._attempts.counters["encode_cached" if message.cached else "encoded"] += 1
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
        if not retryable or record.failures >= self._max_failures:
            error = error_from_code(message.code, message.message, message.param)
            self._attempts.end(record, error)
        else:
            self._attempts.encode_again(record, [message.item])

    def _missing(self, envelope: Envelope, message: MissingItems, _: tuple[Blob, ...]) -> None:
        record = self._current(envelope, message)
        if record is not None:
            self._attempts.encode_again(
                record, [i for i in message.items if i < len(record.images)]
            )

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
                image_tokens_before=message.image_tokens_before,
                cached_tokens=message.cached_tokens,
            )
            if not record.prefilled:
                record.prefilled = True
                self._attempts.move_if_leaving(record)

    def _adopted(self, envelope: Envelope, message: Adopted, _: tuple[Blob, ...]) -> None:
        if record := self._current(envelope, message):
            record.timeline.add("transfer", message.transfer_seconds)
            if envelope.sender == record.decode:
                record.adopted = True
                self._attempts.move_if_leaving(record)

    def _tokens(self, envelope: Envelope, message: Tokens, _: tuple[Blob, ...]) -> None:
        for token in message.tokens:
            record = self._attempts.records.get(token.request_id)
            if record is None or record.attempt != token.attempt:
                self._stale(envelope.sender, token.request_id, token.attempt)
                continue
            if not _possible(token, record):
                self._attempts.end(record, WorkerFailedError("a worker sent an impossible token"))
                continue
            reason = FinishReason(token.finish_reason) if token.finish_reason else None
            if token.output.index < len(record.outputs):
                self._attempts.counters["repeated_tokens"] += 1
            elif record.take(token.output, reason):
                self._attempts.forget(record)
                self._attempts.counters["finished"] += 1

    def _evicted(self, envelope: Envelope, message: Evicted, _: tuple[Blob, ...]) -> None:
        if record := self._current(envelope, message):
            self._attempts.counters["evicted"] += 1
            self._attempts.retry(record, failed=False)

    def _returned(self, envelope: Envelope, message: Returned, _: tuple[Blob, ...]) -> None:
        if record := self._current(envelope, message):
            held = [i for i in message.items if record.encoders.get(i) == envelope.sender]
            if held or not message.items:
                self._attempts.hand_back(record, held)

    def _failed(self, envelope: Envelope, message: RequestFailed, _: tuple[Blob, ...]) -> None:
        if record := self._current(envelope, message):
            if message.retryable:
                self._attempts.retry(record, failed=True)
            else:
                error = error_from_code(message.code, message.message, message.param)
                self._attempts.end(record, error)


def _possible(token: StepToken, record: Record) -> bool:
    """Whether a token could belong to the answer: otherwise it would wait there for its turn."""
    within = 0 <= token.output.index < record.request.sampling.max_tokens
    return within and token.finish_reason in _REASONS
