"""Server-sent events: a bounded buffer between the generation and the socket, and its sender."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
from starlette.types import Receive, Send

__all__ = [
    "ClientGoneError",
    "EventBuffer",
    "SlowConsumerError",
    "send_event_stream",
    "unless_disconnected",
]

_COMMENT = b": stream\n\n"
_KEEPALIVE = b": keep-alive\n\n"
_DONE = b"data: [DONE]\n\n"
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


class ClientGoneError(Exception):
    """The client closed its connection."""


class SlowConsumerError(Exception):
    """The client does not read fast enough."""


class EventBuffer:
    """Encoded events waiting for the socket, at most `limit` bytes; each `data` event has an id."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pending = bytearray(_COMMENT)
        self._changed = asyncio.Event()
        self._changed.set()
        self._closed = False
        self._next_id = 0

    def put(self, payload: dict[str, Any]) -> None:
        """Add one JSON event. Raises `SlowConsumerError` when the buffer is full."""
        event = b"id: %d\ndata: %b\n\n" % (self._next_id, msgspec.json.encode(payload))
        self._next_id += 1
        self._add(event)

    def done(self) -> None:
        """Add the closing `[DONE]`."""
        self._add(_DONE)

    def close(self) -> None:
        """Nothing more will come."""
        self._closed = True
        self._changed.set()

    def _add(self, event: bytes) -> None:
        if len(self._pending) + len(event) > self._limit:
            raise SlowConsumerError
        self._pending += event
        self._changed.set()

    async def take(self, patience: float) -> bytes | None:
        """All waiting bytes; a keep-alive comment after `patience` seconds; None at the end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                await self._changed.wait()
        if self._pending:
            data = bytes(self._pending)
            self._pending.clear()
            if not self._closed:
                self._changed.clear()
            return data
        return None if self._closed else _KEEPALIVE


async def send_event_stream(
    send: Send,
    produce: Callable[[EventBuffer], Coroutine[Any, Any, None]],
    *,
    headers: list[tuple[bytes, bytes]],
    limit: int,
    keepalive: float,
    stall: float,
) -> None:
    """Send what `produce` puts into the buffer until it returns.

    Raises `SlowConsumerError`, with the response left incomplete, when the buffer overflows or one
    send takes longer than `stall` seconds.
    """
    await send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *headers]})
    buffer = EventBuffer(limit)
    producer = asyncio.create_task(produce(buffer))
    sender = asyncio.create_task(_pump(send, buffer, keepalive, stall))
    producer.add_done_callback(lambda _: buffer.close())
    try:
        await asyncio.wait({producer, sender}, return_when=asyncio.FIRST_EXCEPTION)
        for task in (producer, sender):
            if task.done():
                task.result()
    finally:
        await _stop(producer, sender)


async def _pump(send: Send, buffer: EventBuffer, keepalive: float, stall: float) -> None:
    while (data := await buffer.take(keepalive)) is not None:
        try:
            async with asyncio.timeout(stall):
                await send({"type": "http.response.body", "body": data, "more_body": True})
        except TimeoutError:
            raise SlowConsumerError from None
    await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _stop(*tasks: asyncio.Task[Any]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`; if the client leaves first, cancel it and raise `ClientGoneError`.

    The request's body must have been read.
    """
    task = asyncio.create_task(work)
    watch = asyncio.create_task(_gone(receive))
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        task.result()
    finally:
        await _stop(task, watch)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
