"""A supervised pipeline from start to readiness, for `serve`, the demo and the benchmark."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import socket
from pathlib import Path
from types import TracebackType

from epd.errors import ConfigError
from epd.roles import parse_topology
from epd_services.client import ChatClient
from epd_services.progress import Advance, progress
from epd_services.settings import Settings
from epd_services.supervisor import Supervisor

__all__ = ["Stack", "first_api_key", "free_port", "port_problem"]

_POLL = 0.1
_TAIL = 16384


def free_port(host: str = "127.0.0.1") -> int:
    """A port of `host` that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
        return port


def port_problem(host: str, port: int) -> str | None:
    """Why a server could not listen there; None if it can."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        return error.strerror or str(error)
    return None


def first_api_key(path: Path | None) -> str | None:
    """The first key of a key file; None without a file."""
    if path is None:
        return None
    with contextlib.suppress(OSError):
        lines = (line.strip() for line in path.read_text().splitlines())
        return next((line for line in lines if line and not line.startswith("#")), None)
    return None


class Stack:
    """An async context manager around the processes of `settings`; inside it they answer.

    With `keep` the run directory outlives it. Raises `ConfigError` naming the process that ended
    instead of getting ready, and why.
    """

    def __init__(self, settings: Settings, *, keep: bool = False) -> None:
        self.settings = settings
        self.supervisor = Supervisor(settings)
        self._keep = keep or settings.run_dir is not None

    @property
    def url(self) -> str:
        """Where it answers; an address that means all interfaces is reached through loopback."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}.get(
            self.settings.host, self.settings.host
        )
        return f"http://{f'[{host}]' if ':' in host else host}:{self.settings.port}"

    @property
    def run_dir(self) -> Path:
        """Where sockets and logs are."""
        return self.supervisor.run_dir

    def client(self) -> ChatClient:
        """A client with a key that is accepted."""
        return ChatClient(self.url, api_key=first_api_key(self.settings.api_key_file))

    async def __aenter__(self) -> Stack:
        try:
            await self.supervisor.start()
            await self._until_ready()
        except BaseException:
            self.supervisor.kill()
            await self.supervisor.stop()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.supervisor.stop()
        if error is None and not self._keep:
            shutil.rmtree(self.run_dir, ignore_errors=True)

    async def _until_ready(self) -> None:
        wanted = len(parse_topology(self.settings.topology))
        first = dict(self.supervisor.children)
        with progress("starting", wanted) as advance:
            async with self.client() as client:
                while not await self._ready(client, wanted, advance):
                    for name, pid in self.supervisor.children.items():
                        if pid is None or pid != first[name]:
                            raise self._did_not_start(name)
                    await asyncio.sleep(_POLL)
            advance(wanted, "ready")

    async def _ready(self, client: ChatClient, wanted: int, advance: Advance) -> bool:
        report = await client.get("/v1/pipeline")
        if report is None:
            advance(0, "waiting for the gateway")
            return False
        serving = sum(worker["state"] == "serving" for worker in report["workers"])
        if report["refused"]:
            raise ConfigError(
                "The workers do not serve the gateway's model.\n"
                f"{', '.join(f'{name}: {why}' for name, why in report['refused'].items())}\n"
                "epd doctor"
            )
        advance(min(serving, wanted), "loading the model")
        return serving >= wanted and await client.get("/ready") is not None

    def _did_not_start(self, name: str) -> ConfigError:
        log = self.run_dir / f"{name}.log"
        self._keep = True
        return ConfigError(f"{name} did not start.\n{_reason(log)}\nless {log}")


def _reason(log: Path) -> str:
    """The most telling line at the end of a log."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _TAIL))
            lines = [line.strip() for line in file.read().decode(errors="replace").splitlines()]
    except OSError:
        return "It left no log."
    lines = [line for line in lines if line]
    told = [line.removeprefix("why:").strip() for line in lines if line.startswith("why:")]
    if told:
        return told[-1][:400]
    last = lines[-1] if lines else "Its log is empty."
    with contextlib.suppress(ValueError, AttributeError):
        event = json.loads(last)
        last = " ".join(str(event[k]) for k in ("event", "error", "exception") if k in event)
    return last[:400]
