"""One host's pipeline: a private cache server, the gateway, the workers; started, watched,
restarted, stopped.

A process that dies is started again, at most three times in thirty seconds; after that ("failed")
its place stays empty for as long before it is tried again, and the rest goes on. Stopping drains:
the gateway first, then the workers.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import structlog

from epd.cache.server import PrivateServer, find_server
from epd.errors import ConfigError
from epd.node import GATEWAY
from epd.roles import format_stages, parse_topology
from epd_services.process import SUPERVISOR_VARIABLE
from epd_services.settings import Settings

__all__ = ["ProcessPlan", "Supervisor", "plan_processes"]

_log = structlog.get_logger("epd.supervisor")
_RESTARTS = 3
_WINDOW = 30.0
_NAMES = {"E": "encode", "P": "prefill", "D": "decode"}


@dataclass(frozen=True, slots=True)
class ProcessPlan:
    """One child: its name, its command, and the settings it differs in."""

    name: str
    command: list[str]
    environment: dict[str, str]


def plan_processes(settings: Settings, run_dir: Path, cache_url: str | None) -> list[ProcessPlan]:
    """The gateway and one worker per stage set of the topology, talking over ipc in `run_dir`."""
    inbox = f"ipc://{run_dir}/{GATEWAY}.sock"
    shared = settings.environment() | {"EPD_GATEWAY_ADDRESS": inbox, "EPD_RUN_DIR": str(run_dir)}
    if cache_url is not None:
        shared["EPD_CACHE_URL"] = cache_url
    program = [sys.executable, "-m", "epd_services.cli.app"]
    plans = [ProcessPlan(GATEWAY, [*program, "gateway"], shared | {"EPD_BIND": inbox})]
    seen: Counter[str] = Counter()
    for letters in map(format_stages, parse_topology(settings.topology)):
        kind = _NAMES.get(letters, letters.lower())
        name = f"{kind}-{seen[kind]}"
        seen[kind] += 1
        bind = {"EPD_BIND": f"ipc://{run_dir}/{name}.sock"}
        command = [*program, "worker", "--roles", letters, "--name", name]
        plans.append(ProcessPlan(name, command, shared | bind))
    return plans


@dataclass(slots=True)
class _Child:
    plan: ProcessPlan
    process: asyncio.subprocess.Process | None = None
    starts: deque[float] = field(default_factory=lambda: deque(maxlen=_RESTARTS + 1))
    failed: bool = False


class Supervisor:
    """Runs the processes of `settings.topology`. `start`, then `watch` until `stop`."""

    def __init__(self, settings: Settings, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.run_dir = _run_dir(settings)
        self._settings = settings
        self._clock = clock
        self._children: list[_Child] = []
        self._cache: PrivateServer | None = None
        self._watchers: list[asyncio.Task[None]] = []
        self._stop = asyncio.Event()

    @property
    def children(self) -> dict[str, int | None]:
        """Process ids by name; None for one that is not running."""
        return {
            c.plan.name: c.process.pid if c.process and c.process.returncode is None else None
            for c in self._children
        }

    @property
    def cache_pid(self) -> int | None:
        """The process id of the private cache server, if there is one."""
        return self._cache.pid if self._cache else None

    @property
    def failed(self) -> list[str]:
        """Names of the processes that died too often."""
        return [child.plan.name for child in self._children if child.failed]

    async def start(self) -> None:
        """Start the cache server if one is installed and wanted, then every process."""
        url = self._settings.cache_url
        if url is None and find_server() is not None:
            self._cache = PrivateServer(parent=self.run_dir, max_bytes=self._settings.cache_bytes)
            await self._cache.start()
            url = self._cache.url
        for plan in plan_processes(self._settings, self.run_dir, url):
            child = _Child(plan)
            self._children.append(child)
            await self._launch(child)
            self._watchers.append(asyncio.create_task(self._watch(child)))

    async def _launch(self, child: _Child) -> None:
        log = (self.run_dir / f"{child.plan.name}.log").open("ab")
        environment = os.environ | child.plan.environment | {SUPERVISOR_VARIABLE: str(os.getpid())}
        threads = str(self._settings.threads)
        environment.setdefault("OMP_NUM_THREADS", threads)
        with log:
            child.process = await asyncio.create_subprocess_exec(
                *child.plan.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        child.starts.append(self._clock())

    async def _watch(self, child: _Child) -> None:
        while child.process is not None:
            code = await child.process.wait()
            if self._stop.is_set():
                return
            _log.warning("process ended", process=child.plan.name, code=code)
            recent = [t for t in child.starts if self._clock() - t < _WINDOW]
            if len(recent) > _RESTARTS:
                child.failed = True
                _log.error(
                    "process failed too often", process=child.plan.name, log=self._log(child)
                )
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_WINDOW):
                        await self._stop.wait()
                        return
            await self._launch(child)
            if self._stop.is_set():
                # the stop has told everybody it knew of
                _signal(child, signal.SIGTERM)

    def _log(self, child: _Child) -> str:
        return str(self.run_dir / f"{child.plan.name}.log")

    async def stop(self) -> None:
        """Drain the gateway, then the workers, then end the cache server."""
        self._stop.set()
        limit = self._settings.drain_seconds + 5.0
        gateways = [c for c in self._children if c.plan.name == GATEWAY]
        await _end(gateways, limit)
        await _end([c for c in self._children if c.plan.name != GATEWAY], limit)
        await asyncio.gather(*self._watchers)
        if self._cache is not None:
            await self._cache.stop()
        if self._settings.run_dir is None and not self.failed:
            shutil.rmtree(self.run_dir, ignore_errors=True)

    def kill(self) -> None:
        """End every process at once."""
        self._stop.set()
        for child in self._children:
            _signal(child, signal.SIGKILL)


def _signal(child: _Child, number: signal.Signals) -> None:
    if child.process is not None and child.process.returncode is None:
        child.process.send_signal(number)


async def _end(children: list[_Child], limit: float) -> None:
    for child in children:
        _signal(child, signal.SIGTERM)
    waits = [c.process.wait() for c in children if c.process is not None]
    try:
        await asyncio.wait_for(asyncio.gather(*waits), limit)
    except TimeoutError:
        for child in children:
            _signal(child, signal.SIGKILL)


def _run_dir(settings: Settings) -> Path:
    if settings.run_dir is None:
        return Path(tempfile.mkdtemp(prefix="epd-"))
    path = settings.run_dir.absolute()
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if len(str(path)) > 80:
        raise ConfigError("the run directory's path must have at most 80 characters for sockets")
    return path
