"""The outermost layer: request ids, header limits, one log line and one count per exchange."""

from __future__ import annotations

import time
import uuid

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from epd.errors import EPDError, InvalidRequestError
from epd_services.gateway.errors import error_response
from epd_services.gateway.intake import valid_request_id
from epd_services.gateway.metrics import GatewayMetrics
from epd_services.gateway.settings import GatewaySettings
from epd_services.gateway.stream import ClientGoneError, SlowConsumerError

__all__ = ["ExchangeMiddleware"]

_log = structlog.get_logger("epd.gateway")
_GONE = 499


class ExchangeMiddleware:
    """Gives every HTTP exchange an id, bounds its headers, and turns any leak into an envelope."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings, metrics: GatewayMetrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one exchange."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        exchange = _Sent(scope, send)
        with structlog.contextvars.bound_contextvars(request_id=exchange.request_id):
            try:
                await self._guarded(scope, receive, exchange)
            finally:
                self._note(scope, exchange.status, time.perf_counter() - began)

    async def _guarded(self, scope: Scope, receive: Receive, sent: _Sent) -> None:
        try:
            self._check_headers(Headers(scope=scope), sent)
            await self._app(scope, receive, sent)
        except (ClientGoneError, SlowConsumerError):
            # once the answer is out, a closed connection is the usual end
            sent.status = sent.status if sent.complete else _GONE
        except Exception as error:
            if not isinstance(error, EPDError):
                _log.exception("request_failed")
            if not sent.started:
                known = error if isinstance(error, EPDError) else EPDError("internal error")
                await error_response(known, sent.request_id)(scope, receive, sent)

    def _check_headers(self, headers: Headers, sent: _Sent) -> None:
        size = sum(len(name) + len(value) + 4 for name, value in headers.raw)
        limits = self._settings
        if len(headers.raw) > limits.max_headers or size > limits.max_header_bytes:
            raise InvalidRequestError("The request has too many or too large headers.")
        sent.request_id = valid_request_id(headers) or sent.request_id
        structlog.contextvars.bind_contextvars(request_id=sent.request_id)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        self._metrics.http(scope["method"], route, status, seconds)
        _log.info("http", method=scope["method"], route=route, status=status, seconds=seconds)


class _Sent:
    """`send` that remembers what went out and adds the request id."""

    def __init__(self, scope: Scope, send: Send) -> None:
        self._scope = scope
        self._send = send
        self.status = _GONE
        self.started = self.complete = False
        self.request_id = uuid.uuid4().hex

    @property
    def request_id(self) -> str:
        """The id shown to the client."""
        return str(self._scope["state"]["request_id"])

    @request_id.setter
    def request_id(self, value: str) -> None:
        self._scope.setdefault("state", {})["request_id"] = value

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.started = True
            self.status = message["status"]
            headers = MutableHeaders(scope=message)
            headers["X-Request-Id"] = self.request_id
            headers["X-Content-Type-Options"] = "nosniff"
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body", False):
            self.complete = True
