"""The admin API: `create_admin_app` in front of a dispatcher. Every route asks for the token."""

from __future__ import annotations

import hmac
from collections.abc import Callable
from typing import Any

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from epd.errors import ConfigError, EPDError
from epd.roles import StageSet, parse_stages
from epd_services.admin.cache import cache_report, flush_cache
from epd_services.gateway.dispatcher import PipelineDispatcher
from epd_services.gateway.refusals import ImpossibleStagesError

__all__ = ["DRAIN_SECONDS", "create_admin_app"]

DRAIN_SECONDS = 10.0
_MOST_BYTES = 1 << 16
_log = structlog.get_logger("epd.admin")


class SwitchWish(BaseModel):
    """The body of a switch: the stages to go to, and under which conditions."""

    model_config = ConfigDict(extra="forbid", strict=True)

    stages: str = Field(max_length=32)
    drain_seconds: float = DRAIN_SECONDS
    force: bool = False
    epoch: int | None = Field(None, ge=0)
    dry_run: bool = False


class DrainWish(BaseModel):
    """The body of a drain."""

    model_config = ConfigDict(extra="forbid", strict=True)

    force: bool = False


def create_admin_app(dispatcher: PipelineDispatcher, token: str) -> FastAPI:
    """The application; `token` must come with every request as `Authorization: Bearer`."""
    app = FastAPI(
        title="epd admin", version="1", redirect_slashes=False,
        docs_url=None, redoc_url=None, openapi_url=None,
    )  # fmt: skip
    app.add_middleware(_Guard, token=token)
    app.add_exception_handler(EPDError, _on_error)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(RequestValidationError, _on_validation)
    _reading(app, dispatcher)
    _acting(app, dispatcher)
    return app


def _reading(app: FastAPI, dispatcher: PipelineDispatcher) -> None:
    roles = dispatcher.roles

    async def status() -> dict[str, Any]:
        running = [record.as_json() for record in roles.history() if not record.final]
        return {**dispatcher.pipeline(), "switches": running}

    async def history() -> dict[str, Any]:
        return {"switches": [record.as_json() for record in roles.history()]}

    async def switch(switch_id: str) -> dict[str, Any]:
        return roles.get(switch_id).as_json()

    async def cache() -> dict[str, Any]:
        return await cache_report(dispatcher)

    for path, handler in (
        ("status", status),
        ("history", history),
        ("switches/{switch_id}", switch),
        ("cache", cache),
    ):
        _route(app, "GET", path, handler)


def _acting(app: FastAPI, dispatcher: PipelineDispatcher) -> None:
    roles = dispatcher.roles

    async def switch(worker: str, wish: SwitchWish) -> Response:
        stages = _stages(wish.stages)
        if wish.dry_run:
            return JSONResponse(roles.preview(worker, stages, force=wish.force).as_json())
        record = roles.start(
            worker, stages, drain_seconds=wish.drain_seconds, force=wish.force, epoch=wish.epoch
        )
        return JSONResponse(record.as_json(), 200 if record.final else 202)

    async def drain(worker: str, wish: DrainWish) -> dict[str, Any]:
        return {"worker": worker, "changed": roles.drain(worker, force=wish.force)}

    async def resume(worker: str) -> dict[str, Any]:
        return {"worker": worker, "changed": roles.resume(worker)}

    async def flush() -> dict[str, Any]:
        return {"flushed": await flush_cache(dispatcher)}

    for path, handler in (
        ("workers/{worker}/switch", switch),
        ("workers/{worker}/drain", drain),
        ("workers/{worker}/resume", resume),
        ("cache/flush", flush),
    ):
        _route(app, "POST", path, handler)


def _route(app: FastAPI, method: str, path: str, handler: Callable[..., Any]) -> None:
    app.add_api_route(f"/admin/v1/{path}", handler, methods=[method], response_model=None)


def _stages(text: str) -> StageSet:
    try:
        return parse_stages(text)
    except ConfigError as error:
        raise ImpossibleStagesError(
            f"Cannot switch to the stages {text[:32]!r}.",
            f"{str(error)[:120]}.",
            "epd admin switch WORKER PD",
        ) from None


class _Guard:
    """Lets a request in when it brings the token and a small body."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        refusal = self._refusal(headers)
        _log.info("admin", method=scope["method"], path=scope["path"][:200], refused=bool(refusal))
        await (refusal or self._app)(scope, receive, send)

    def _refusal(self, headers: Headers) -> Response | None:
        scheme, _, given = headers.get("authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), self._token)
        if scheme.lower() != "bearer" or not same:
            return _refused(
                401, "unauthorized",
                "The admin API was not opened.",
                "The token is missing or wrong." if given else "No token was sent.",
                "epd admin --token-file FILE, with the file that the gateway uses",
            )  # fmt: skip
        # a body without a length is chunked, and none of ours is
        size = headers.get("content-length", "0")
        if "transfer-encoding" in headers or not size.isdecimal() or int(size) > _MOST_BYTES:
            return _refused(
                413, "body_too_large", "The request was refused.", "Its body is too large.",
                "epd admin --help",
            )  # fmt: skip
        return None


def _refused(status: int, code: str, what: str, why: str, hint: str) -> JSONResponse:
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    body = {"error": {"code": code, "what": what, "why": why, "next": hint}}
    return JSONResponse(body, status, headers)


async def _on_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, EPDError)
    lines = str(error).splitlines()
    if len(lines) != 3:
        lines = ["The request was refused.", " ".join(lines) or error.code, "epd admin status"]
    return _refused(error.status, error.code, *lines)


async def _on_http(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _refused(
        error.status_code, "no_such_route", "The request was refused.", str(error.detail),
        "epd admin --help",
    )  # fmt: skip


async def _on_validation(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"][1:])[:64]
    why = f"{where}: {first['msg']}" if where else str(first["msg"])
    return _refused(
        400, "invalid_request", "The request was refused.", why[:200], "epd admin switch --help"
    )
