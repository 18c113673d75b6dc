"""The admin API of one gateway process: its socket, its token, and the file that tells of both."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import uvicorn

from epd.errors import ConfigError
from epd_services.admin.app import create_admin_app
from epd_services.admin.endpoint import Endpoint, announce, make_token, read_token
from epd_services.gateway.dispatcher import PipelineDispatcher
from epd_services.settings import Settings

__all__ = ["admin_server"]

_HOST = "127.0.0.1"


@asynccontextmanager
async def admin_server(settings: Settings, dispatcher: PipelineDispatcher) -> AsyncIterator[str]:
    """Serves the admin API while entered; its URL. Raises `ConfigError` when that cannot work."""
    with _run_dir(settings) as directory, _listener(settings.admin_port) as listener:
        token_file = settings.admin_token_file or make_token(directory)
        app = create_admin_app(dispatcher, read_token(token_file))
        url = f"http://{_HOST}:{listener.getsockname()[1]}"
        config = uvicorn.Config(
            app, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
            timeout_graceful_shutdown=1,
        )  # fmt: skip
        server = _Server(config)
        serving = asyncio.create_task(server.serve([listener]))
        file = announce(directory, Endpoint(url, str(Path(token_file).absolute()), os.getpid()))
        try:
            yield url
        finally:
            file.unlink(missing_ok=True)
            server.should_exit = True
            with contextlib.suppress(asyncio.CancelledError):
                await serving


class _Server(uvicorn.Server):
    """uvicorn without its own signal handlers."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals belong to the process."""
        yield


@contextmanager
def _run_dir(settings: Settings) -> Iterator[Path]:
    """The run directory; a private one for the time being if none is configured."""
    if settings.run_dir is not None:
        settings.run_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield settings.run_dir
        return
    directory = Path(tempfile.mkdtemp(prefix="epd-"))
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def _listener(port: int) -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((_HOST, port))
        except OSError as error:
            raise ConfigError(
                f"Cannot listen on {_HOST} port {port} for operators.\n{error.strerror}.\n"
                "Set EPD_ADMIN_PORT to another port, or to 0 for any free one."
            ) from None
        yield listener
