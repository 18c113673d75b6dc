"""An answer on its way out: one JSON object, or chunks as server-sent events."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import structlog
from starlette.types import Send

from epd.errors import DeadlineError, EPDError
from epd.request import TokenOutput
from epd_services.gateway.answer import (
    Answer,
    Tokenizing,
    completion_head,
    logprobs_json,
    usage_json,
)
from epd_services.gateway.errors import envelope
from epd_services.gateway.metrics import GatewayMetrics
from epd_services.gateway.schemas import ChatRequest
from epd_services.gateway.settings import GatewaySettings
from epd_services.gateway.stream import EventBuffer, SlowConsumerError, send_event_stream

__all__ = ["Reply"]

_log = structlog.get_logger("epd.gateway")


class Reply:
    """Sends one answer in the form its request asked for."""

    def __init__(
        self,
        request: ChatRequest,
        answer: Answer,
        *,
        request_id: str,
        shown_id: str,
        model: str,
        tokenizer: Tokenizing,
        settings: GatewaySettings,
        metrics: GatewayMetrics,
    ) -> None:
        self._request = request
        self._answer = answer
        self._shown_id = shown_id
        self._tokenizer = tokenizer
        self._settings = settings
        self._metrics = metrics
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        self._head = completion_head(request_id, model, kind)

    async def send(self, send: Send, seconds: float) -> None:
        """Send the answer within `seconds`. Raises `EPDError` as long as nothing was sent."""
        try:
            if self._request.stream:
                await self._stream(send, seconds)
            else:
                await self._whole(send, seconds)
        except SlowConsumerError:
            self._cancel("slow_consumer")
            raise

    # one JSON object

    async def _whole(self, send: Send, seconds: float) -> None:
        text: list[str] = []
        tokens: list[TokenOutput] = []
        reason = None
        try:
            async with asyncio.timeout(seconds):
                async for delta in self._answer.deltas():
                    text.append(delta.text)
                    tokens += delta.tokens
                    reason = delta.finish_reason
        except TimeoutError:
            self._cancel("deadline")
            raise DeadlineError("The request's deadline passed.") from None
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": "".join(text), "refusal": None},
            "logprobs": self._logprobs(tokens),
            "finish_reason": reason,
        }
        usage, timings = self._complete(str(reason))
        body = {**self._head, "choices": [choice], "usage": usage, "timings": timings}
        data = msgspec.json.encode(body)
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(data)),
            *self._headers(),
        ]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": data, "more_body": False})

    # chunks

    async def _stream(self, send: Send, seconds: float) -> None:
        async def produce(buffer: EventBuffer) -> None:
            error = await self._produce(buffer, seconds)
            if error is not None:
                self._metrics.errors.labels(error.code).inc()
                buffer.put(envelope(error, self._shown_id))

        await send_event_stream(
            send,
            produce,
            headers=self._headers(),
            limit=self._settings.stream_buffer_bytes,
            keepalive=self._settings.keepalive_seconds,
            stall=self._settings.stall_seconds,
        )

    async def _produce(self, buffer: EventBuffer, seconds: float) -> EPDError | None:
        """Put the whole answer into `buffer`; the error that ended it, if one did."""
        try:
            async with asyncio.timeout(seconds):
                await self._chunks(buffer)
        except TimeoutError:
            self._cancel("deadline")
            return DeadlineError("The request's deadline passed.")
        except EPDError as error:
            return error
        except SlowConsumerError:
            raise
        except Exception:
            _log.exception("stream_failed")
            return EPDError("the stream failed")
        return None

    async def _chunks(self, buffer: EventBuffer) -> None:
        role: dict[str, Any] = {"role": "assistant"}
        async for delta in self._answer.deltas():
            logprobs = self._logprobs(delta.tokens) if delta.tokens else None
            if not (delta.text or logprobs or delta.finish_reason):
                continue
            content = {"content": delta.text} if delta.text or role else {}
            choice = {"index": 0, "delta": role | content, "logprobs": logprobs}
            role = {}
            if delta.finish_reason is None:
                buffer.put(self._chunk(choice | {"finish_reason": None}))
                # events that are already there must not starve the sender
                await asyncio.sleep(0)
            else:
                self._close(buffer, choice, delta.finish_reason)

    def _close(self, buffer: EventBuffer, choice: dict[str, Any], reason: str) -> None:
        """The last content chunk, the usage chunk when asked for, and the end mark."""
        usage, timings = self._complete(reason)
        buffer.put(self._chunk(choice | {"finish_reason": reason}) | {"timings": timings})
        if self._request.include_usage:
            buffer.put({**self._head, "choices": [], "usage": usage, "timings": timings})
        buffer.done()

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        usage = {"usage": None} if self._request.include_usage else {}
        return {**self._head, "choices": [choice], **usage}

    # both

    def _complete(self, reason: str) -> tuple[dict[str, Any], dict[str, float]]:
        usage, timings = self._answer.usage, self._answer.timings
        self._metrics.complete(reason, usage, timings)
        return usage_json(usage), timings

    def _logprobs(self, tokens: list[TokenOutput]) -> dict[str, Any] | None:
        return logprobs_json(tokens, self._tokenizer) if self._request.logprobs else None

    def _headers(self) -> list[tuple[bytes, bytes]]:
        ignored = self._request.ignored
        return [(b"x-ignored-fields", ", ".join(ignored).encode())] if ignored else []

    def _cancel(self, reason: str) -> None:
        if self._answer.cancel():
            self._metrics.cancelled.labels(reason).inc()
