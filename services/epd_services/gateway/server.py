"""uvicorn as the gateway runs it: bounded heads, bounded connections, no logs of its own."""

from __future__ import annotations

import asyncio
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from epd_services.gateway.settings import GatewaySettings

__all__ = ["server_config"]


class _BoundedProtocol(H11Protocol):
    """HTTP/1.1 whose request heads must arrive in time, over a bounded number of connections."""

    head_seconds = 10.0
    max_connections = 2048
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a head, or refuse one connection too many."""
        super().connection_made(transport)
        if len(self.connections) > self.max_connections:
            transport.abort()
        else:
            self._await_head()

    def data_received(self, data: bytes) -> None:
        """Start or stop the clock of a head."""
        if self._head_timer is None and not self._answering():
            self._await_head()
        super().data_received(data)
        if self._answering():
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the clock."""
        self._stop_timer()
        super().connection_lost(exc)

    def _answering(self) -> bool:
        return self.cycle is not None and not self.cycle.response_complete

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(self.head_seconds, self._late)

    def _late(self) -> None:
        self._head_timer = None
        self.transport.abort()

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


def server_config(app: FastAPI, settings: GatewaySettings, **options: Any) -> uvicorn.Config:
    """The configuration of a uvicorn server for `app`; `options` go to uvicorn."""
    bounds = {"head_seconds": settings.head_seconds, "max_connections": settings.max_connections}
    return uvicorn.Config(
        app,
        http=type("BoundedProtocol", (_BoundedProtocol,), bounds),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        # longer than proxies keep theirs, or they send into a connection that is being closed
        timeout_keep_alive=settings.idle_seconds,  # type: ignore[arg-type]
        h11_max_incomplete_event_size=settings.max_header_bytes,
        **options,
    )
