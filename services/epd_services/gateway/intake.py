"""Reading a request's head and body within limits, before anything looks at their meaning."""

from __future__ import annotations

import asyncio
import contextlib
import re

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import Receive

from epd.errors import CapacityError, DeadlineError, InvalidRequestError
from epd_services.gateway.errors import BodyTooLargeError, MediaTypeError
from epd_services.gateway.settings import GatewaySettings

__all__ = ["ByteBudget", "Lease", "deadline_header", "read_json_body", "valid_request_id"]

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_DRAIN_SECONDS = 1.0
_MAX_DEADLINE_MS = 86_400_000


class ByteBudget:
    """Bytes that all requests together may hold. A full budget is a `CapacityError`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.held = 0

    def lease(self) -> Lease:
        """An empty share of the budget, to be used as a context manager."""
        return Lease(self)

    def take(self, count: int) -> None:
        """Hold `count` more bytes."""
        if self.held + count > self._limit:
            raise CapacityError("Too much data is in flight; try again later.")
        self.held += count

    def give(self, count: int) -> None:
        """Give `count` bytes back."""
        self.held -= count


class Lease:
    """One request's share; leaving the context gives everything back."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._held = 0

    def take(self, count: int) -> None:
        """Hold `count` more bytes. Raises `CapacityError`."""
        self._budget.take(count)
        self._held += count

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        self._budget.give(self._held)
        self._held = 0


def valid_request_id(headers: Headers) -> str | None:
    """The client's X-Request-Id. Raises `InvalidRequestError` when it is not a plain token."""
    value = headers.get("x-request-id")
    if value is not None and not _REQUEST_ID.fullmatch(value):
        raise InvalidRequestError(
            "X-Request-Id must be 1 to 128 letters, digits, dots, colons, dashes or underscores.",
            "X-Request-Id",
        )
    return value


def deadline_header(headers: Headers) -> float | None:
    """Seconds from X-Request-Deadline-Ms. Raises `InvalidRequestError`."""
    value = headers.get("x-request-deadline-ms")
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,8}", value) or not 1 <= int(value) <= _MAX_DEADLINE_MS:
        raise InvalidRequestError(
            "X-Request-Deadline-Ms must be a whole number of milliseconds within a day.",
            "X-Request-Deadline-Ms",
        )
    return int(value) / 1000


async def read_json_body(request: Request, settings: GatewaySettings, lease: Lease) -> bytes:
    """The body of a JSON request, counted as it arrives. Raises typed 4xx errors."""
    headers = request.headers
    if headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise MediaTypeError("The body must be application/json.")
    if headers.get("content-encoding", "identity").lower() != "identity":
        raise MediaTypeError("The body must not be compressed.")
    too_large = BodyTooLargeError("The request body is too large.")
    length = headers.get("content-length", "0")
    if not length.isdecimal() or len(length) > 18 or int(length) > settings.max_body_bytes:
        await _drain(request.receive)
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_seconds):
            async for chunk in request.stream():
                if len(body) + len(chunk) > settings.max_body_bytes:
                    body.clear()
                    await _drain(request.receive)
                    raise too_large
                lease.take(len(chunk))
                body += chunk
    except TimeoutError:
        raise DeadlineError("The request body did not arrive in time.") from None
    return bytes(body)


async def _drain(receive: Receive) -> None:
    """Swallow what a client is still sending, so that it gets to read the answer."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_DRAIN_SECONDS):
            while True:
                message = await receive()
                if message["type"] != "http.request" or not message.get("more_body", False):
                    return
