"""The gateway's FastAPI application, built by `create_app`: routes, guards, lifespan."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from epd.errors import EPDError, InvalidRequestError, UnavailableError
from epd_services.gateway.auth import ApiKeys
from epd_services.gateway.chat import Call, ChatService, Formatter
from epd_services.gateway.dispatch_api import Dispatcher
from epd_services.gateway.errors import NotFoundError, error_response, http_status_response
from epd_services.gateway.fetch import FetchLimits, ImageFetcher
from epd_services.gateway.images import DecodeLimits, ImageDecoder
from epd_services.gateway.intake import ByteBudget, deadline_header, read_json_body
from epd_services.gateway.metrics import GatewayMetrics
from epd_services.gateway.middleware import ExchangeMiddleware
from epd_services.gateway.page import page_response
from epd_services.gateway.schemas import chat_request_schema
from epd_services.gateway.settings import GatewaySettings
from epd_services.gateway.stream import ClientGoneError, unless_disconnected

__all__ = ["create_app"]

_log = structlog.get_logger("epd.gateway")


def create_app(
    settings: GatewaySettings,
    dispatcher: Dispatcher,
    formatter: Formatter,
    *,
    fetcher: ImageFetcher | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """The application in front of `dispatcher`; its lifespan starts and stops the dispatcher.

    `fetcher` replaces the one that `settings` describes. Raises `ConfigError` on a bad key file.
    """
    return _Gateway(settings, dispatcher, formatter, fetcher, clock).app


def _fetcher(settings: GatewaySettings) -> ImageFetcher | None:
    if not settings.fetch_images:
        return None
    limits = FetchLimits(
        seconds=settings.fetch_seconds,
        max_bytes=settings.max_image_bytes,
        domains=settings.fetch_domains,
        ports=settings.fetch_ports,
    )
    return ImageFetcher(limits)


class _Gateway:
    """The collaborators of one application and its route handlers."""

    def __init__(
        self,
        settings: GatewaySettings,
        dispatcher: Dispatcher,
        formatter: Formatter,
        fetcher: ImageFetcher | None,
        clock: Callable[[], float],
    ) -> None:
        self._settings = settings
        self._dispatcher = dispatcher
        self._formatter = formatter
        self._clock = clock
        self._created = int(time.time())
        self._keys = ApiKeys.load(settings.api_key_file)
        self._budget = ByteBudget(settings.intake_bytes)
        name = settings.model_name or formatter.card.name
        self._metrics = GatewayMetrics(name, dispatcher.pipeline)
        limits = DecodeLimits(
            seconds=settings.decode_seconds,
            memory_bytes=settings.decode_memory_bytes,
            max_bytes=settings.max_image_bytes,
            max_pixels=settings.max_image_pixels,
        )
        self._decoder = ImageDecoder(
            limits,
            children=settings.decode_children,
            queue_size=settings.decode_queue,
            observe=self._metrics.image,
        )
        self._chat = ChatService(
            settings, dispatcher, formatter, self._decoder, self._metrics,
            fetcher=fetcher or _fetcher(settings), clock=clock,
        )  # fmt: skip
        self.app = self._build()

    def _build(self) -> FastAPI:
        app = FastAPI(
            title="epd gateway", version="1", lifespan=self._lifespan, redirect_slashes=False,
            docs_url=None, redoc_url=None, openapi_url=None,
        )  # fmt: skip
        app.add_middleware(ExchangeMiddleware, settings=self._settings, metrics=self._metrics)
        app.add_exception_handler(EPDError, self._on_error)
        app.add_exception_handler(RequestValidationError, self._on_validation)
        app.add_exception_handler(HTTPException, self._on_http)
        self._routes(app)
        return app

    def _routes(self, app: FastAPI) -> None:
        """Every route; all ask for a key, except those listed as open here."""
        for path, handler in (
            ("/", self._page),
            ("/live", self._live),
            ("/ready", self._ready),
            ("/health", self._health),
        ):
            app.add_api_route(path, handler, response_class=Response)
        for path, handler in (
            ("/metrics", self._metrics_text),
            ("/v1/models", self._models),
            ("/v1/models/{model:path}", self._model),
            ("/v1/pipeline", self._pipeline),
            ("/openapi.json", self._openapi),
        ):
            app.add_api_route(path, self._guarded(handler), response_class=Response)
        schema, _ = chat_request_schema()
        body = {"required": True, "content": {"application/json": {"schema": schema}}}
        app.add_api_route(
            "/v1/chat/completions",
            self._guarded(self._completions),
            methods=["POST"],
            response_class=Response,
            openapi_extra={"requestBody": body},
        )

    def _guarded(
        self, handler: Callable[[Request], Awaitable[Response]]
    ) -> Callable[[Request], Awaitable[Response]]:
        async def guarded(request: Request) -> Response:
            request.state.salt = self._keys.tenant_salt(request.headers)
            return await handler(request)

        return guarded

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        await self._decoder.start()
        try:
            await self._dispatcher.start()
            try:
                yield
            finally:
                await self._dispatcher.stop()
        finally:
            await self._decoder.close()

    # errors

    async def _on_error(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, EPDError)
        if error.status == 500:
            _log.error("request_failed", code=error.code, exc_info=error)
        self._metrics.errors.labels(error.code).inc()
        return error_response(error, request.state.request_id)

    async def _on_validation(self, request: Request, _: Exception) -> Response:
        refusal = InvalidRequestError("The request is invalid.")
        return error_response(refusal, request.state.request_id)

    async def _on_http(self, request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        headers = dict(error.headers or {})
        return http_status_response(error.status_code, request.state.request_id, headers)

    # routes

    async def _page(self, _: Request) -> Response:
        return page_response()

    async def _live(self, _: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def _ready(self, request: Request) -> Response:
        ready, reason = self._dispatcher.ready()
        if ready:
            return JSONResponse({"status": "ready"})
        return error_response(UnavailableError(reason), request.state.request_id)

    async def _health(self, _: Request) -> Response:
        ready, reason = self._dispatcher.ready()
        body = {"live": True, "ready": ready, "reason": reason, "model": self._chat.model_name}
        return JSONResponse(body, 200 if ready else 503, None if ready else {"Retry-After": "1"})

    async def _metrics_text(self, _: Request) -> Response:
        return Response(
            self._metrics.exposition(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    def _model_json(self) -> dict[str, Any]:
        card = self._formatter.card
        return {
            "id": self._chat.model_name,
            "object": "model",
            "created": self._created,
            "owned_by": "epd",
            "max_model_len": card.max_position,
            "revision": card.revision,
        }

    async def _models(self, _: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_json()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["model"] != self._chat.model_name:
            raise NotFoundError(
                "That model is not served here; GET v1/models lists what is.", "model"
            )
        return JSONResponse(self._model_json())

    async def _pipeline(self, _: Request) -> Response:
        gateway = {"intake_bytes": self._budget.held, "decoder_restarts": self._decoder.restarts}
        return JSONResponse({**self._dispatcher.pipeline(), "gateway": gateway})

    async def _openapi(self, _: Request) -> Response:
        definitions = chat_request_schema()[1]
        return JSONResponse({**self.app.openapi(), "components": {"schemas": definitions}})

    async def _completions(self, request: Request) -> Response:
        return _ChatResponse(self, request)

    async def chat(self, request: Request, send: Send) -> None:
        """Read the body and answer it, for as long as the client stays."""
        arrived = self._clock()
        with self._budget.lease() as lease:
            deadline_s = deadline_header(request.headers)
            try:
                body = await read_json_body(request, self._settings, lease)
            except ClientDisconnect:
                raise ClientGoneError from None
            call = Call(
                shown_id=request.state.request_id,
                body=body,
                salt=request.state.salt,
                deadline_s=deadline_s,
                arrived=arrived,
                lease=lease,
                send=send,
            )
            await unless_disconnected(request.receive, self._chat.answer(call))


class _ChatResponse(Response):
    """A response that works while it is sent, where it can watch the client's connection."""

    def __init__(self, gateway: _Gateway, request: Request) -> None:
        super().__init__()
        self._gateway = gateway
        self._request = request

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._gateway.chat(self._request, send)
