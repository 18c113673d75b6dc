"""The process of the gateway: HTTP in front, the wire behind, a drain on SIGTERM. Imports no
torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterator

import structlog
import uvicorn

from epd.cache.factory import open_cache
from epd.chat import ChatFormatter
from epd.demo import BUILT_IN_NAME, CHECKPOINT
from epd.errors import ConfigError
from epd.failpoints import Failpoints
from epd.membership import Membership
from epd.models.card import ModelCard
from epd.node import GATEWAY, Identity, Node
from epd.transport import ZmqTransport
from epd.wire import Codec
from epd_services.admin.server import admin_server
from epd_services.elastic.controller import Controller
from epd_services.elastic.live import ElasticLoop, running
from epd_services.gateway.app import create_app
from epd_services.gateway.dispatcher import DispatchLimits, PipelineDispatcher
from epd_services.gateway.server import server_config
from epd_services.logs import configure_logs
from epd_services.process import ended_before_stop
from epd_services.settings import Settings

__all__ = ["run_gateway"]

_log = structlog.get_logger("epd.gateway")


def run_gateway(settings: Settings) -> int:
    """Serve until SIGTERM; the exit code: 0 after a drain, 1 when the server broke."""
    configure_logs(settings.log_level, settings.log_format, worker=GATEWAY)
    settings.check_http()
    if settings.bind is None:
        raise ConfigError("the gateway needs EPD_BIND, the address of its wire inbox")
    return asyncio.run(_serve(settings))


async def _serve(settings: Settings) -> int:
    assert settings.bind is not None
    card = ModelCard.load(
        settings.model or CHECKPOINT, name=None if settings.model else BUILT_IN_NAME
    )
    key = settings.wire_key()
    transport = ZmqTransport(settings.bind, keyed=key is not None)
    shared = settings.cache_url is not None and not settings.cache_url.startswith("memory:")
    dispatcher = PipelineDispatcher(
        Node(Identity(GATEWAY, time.time_ns()), transport, Codec(key)),
        Membership(card.revision, time.monotonic, dead_after=settings.dead_after),
        open_cache(settings.cache_url, ttl=settings.cache_ttl) if shared else None,
        clock=time.monotonic,
        limits=DispatchLimits(max_inflight=settings.max_inflight, drain=settings.drain_seconds),
        pruning=settings.pruning_policy(card),
        failpoint=Failpoints.parse(settings.failpoints).hit,
    )
    app = create_app(settings, dispatcher, ChatFormatter(card))
    graceful = int(settings.drain_seconds) + 1
    server = _Server(
        server_config(
            app,
            settings,
            host=settings.host,
            port=settings.port,
            timeout_graceful_shutdown=graceful,
        )
    )
    async with admin_server(settings, dispatcher), _elastic(settings, dispatcher):
        return await _until_stopped(server, dispatcher)


def _elastic(
    settings: Settings, dispatcher: PipelineDispatcher
) -> contextlib.AbstractAsyncContextManager[None]:
    """The elastic controller at work while entered, if it is asked for."""
    if not settings.elastic:
        return contextlib.nullcontext()
    attempts = dispatcher.attempts
    loop = ElasticLoop(
        Controller(),
        dispatcher.roles,
        dispatcher.membership,
        attempts.records,
        clock=time.monotonic,
        max_num_seqs=settings.max_num_seqs,
        drain_seconds=settings.elastic_drain_seconds,
    )
    attempts.on_start = loop.started
    return running(loop)


async def _until_stopped(server: uvicorn.Server, dispatcher: PipelineDispatcher) -> int:
    serving = asyncio.create_task(server.serve())
    if await ended_before_stop(serving):
        _log.error("the HTTP server ended", error=repr(serving.exception())[:200])
        return 1
    await dispatcher.stop()
    server.should_exit = True
    await serving
    return 0


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers: the process drains first."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the process."""
        yield
