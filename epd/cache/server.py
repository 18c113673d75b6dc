"""A private Redis or Valkey server for one machine: no port, no disk, no scripting, ours alone.

It listens on a unix socket in a directory only we can enter, forgets everything when it ends, and
ends with us. Its configuration goes through standard input and holds only a hash of the password,
which itself lies in a file that only we can read: neither is ever on a command line.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import secrets
import shutil
import tempfile
import time
from asyncio.subprocess import PIPE, Process
from collections import deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from epd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["PrivateServer", "find_server"]

_LOG = logging.getLogger(__name__)

_BINARIES = ("redis-server", "valkey-server")
_USER = "epd"
_COMMANDS = (
    "+ping +auth +get +getrange +strlen +set +append +rename +exists +unlink +scan "
    "+pexpire +pttl +watch +unwatch +multi +exec"
)
_READY_SECONDS = 2.0
_STOP_SECONDS = 1.0
_MAX_SOCKET_PATH = 100  # the kernel's limit is 107 bytes


def find_server() -> str | None:
    """The path of `redis-server`, or of `valkey-server`; None if neither is on PATH."""
    return next(filter(None, map(shutil.which, _BINARIES)), None)


class PrivateServer:
    """One server process with a watchdog; `url` is for `open_cache` and holds no secret.

    It is started again when it dies, at most `max_restarts` times in `restart_window` seconds.
    Only the process started here is ever signalled, by its id.
    """

    def __init__(
        self,
        *,
        parent: Path | None = None,
        max_bytes: int = 256 << 20,
        binary: str | None = None,
        max_restarts: int = 3,
        restart_window: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._parent = parent
        self._max_bytes = max_bytes
        self._binary = binary
        self._max_restarts = max_restarts
        self._restart_window = restart_window
        self._clock = clock
        self._password = secrets.token_hex(32)
        self._directory: Path | None = None
        self._process: Process | None = None
        self._watchdog: asyncio.Task[None] | None = None
        self.restarts = 0

    async def start(self) -> None:
        """Return once the server answers. Raises `ConfigError` after at most two seconds."""
        binary = self._binary or find_server()
        if binary is None:
            raise ConfigError("neither redis-server nor valkey-server is on PATH")
        self._binary = binary
        try:
            self._directory = self._make_directory()
            await self._launch()
        except BaseException:
            await self.stop()
            raise
        self._watchdog = asyncio.get_running_loop().create_task(self._watch())

    @property
    def url(self) -> str:
        """The URL for `open_cache`: socket, user and the file that holds the password."""
        directory = self._running_directory()
        options = urlencode({"user": _USER, "password_file": str(directory / "password")})
        return f"unix://{quote(str(directory / 'socket'))}?{options}"

    @property
    def pid(self) -> int | None:
        """The server's process id; None when it does not run."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    async def stop(self) -> None:
        """End the server and remove its directory. Idempotent."""
        if self._watchdog is not None:
            self._watchdog.cancel()
            await asyncio.gather(self._watchdog, return_exceptions=True)
            self._watchdog = None
        await self._end_process()
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _running_directory(self) -> Path:
        if self._directory is None:
            raise ConfigError("the private token cache server is not running")
        return self._directory

    def _make_directory(self) -> Path:
        # mkdtemp gives mode 0700 and a name nobody else has: no other server's socket can be there
        directory = Path(tempfile.mkdtemp(prefix="epd-cache-", dir=self._parent))
        if len(os.fsencode(directory / "socket")) > _MAX_SOCKET_PATH:
            directory.rmdir()
            raise ConfigError("the run directory's path is too long for a unix socket")
        password_file = directory / "password"
        password_file.touch(mode=0o600)
        password_file.write_text(self._password)
        return directory

    def _configuration(self, directory: Path) -> str:
        password_hash = hashlib.sha256(self._password.encode()).hexdigest()
        lines = (
            "port 0",
            f'unixsocket "{directory / "socket"}"',
            "unixsocketperm 700",
            f'dir "{directory}"',
            'save ""',
            "appendonly no",
            "daemonize no",
            "loglevel warning",
            f"maxmemory {self._max_bytes}",
            "maxmemory-policy allkeys-lru",
            "user default off",
            f"user {_USER} on #{password_hash} ~epd:* resetchannels -@all {_COMMANDS}",
        )
        return "\n".join(lines) + "\n"

    async def _launch(self) -> None:
        directory = self._running_directory()
        command = [*_ends_with_parent(), str(self._binary), "-"]
        with (directory / "log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *command, stdin=PIPE, stdout=log, stderr=log, cwd="/", start_new_session=True
            )
        await self._configure(self._process, self._configuration(directory))
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await self._until_ready(directory / "socket")
        except TimeoutError:
            raise ConfigError("the private token cache server did not answer in time") from None

    async def _configure(self, process: Process, text: str) -> None:
        assert process.stdin is not None
        process.stdin.write(text.encode())
        with suppress(ConnectionError):  # it died already; the readiness check says so
            await process.stdin.drain()
        process.stdin.close()

    async def _until_ready(self, socket: Path) -> None:
        while not await self._answers(socket):
            if self.pid is None:
                raise ConfigError(f"the token cache server ended at once: {self._last_log()}")
            await asyncio.sleep(0.01)

    async def _answers(self, socket: Path) -> bool:
        try:
            reader, writer = await asyncio.open_unix_connection(str(socket))
        except OSError:
            return False
        try:
            writer.write(f"AUTH {_USER} {self._password}\r\nPING\r\n".encode())
            return [await reader.readline(), await reader.readline()] == [b"+OK\r\n", b"+PONG\r\n"]
        except OSError:
            return False
        finally:
            writer.close()

    def _last_log(self) -> str:
        try:
            lines = (self._running_directory() / "log").read_text(errors="replace").split("\n")
        except OSError:
            return "no log"
        return next((line.strip()[:200] for line in reversed(lines) if line.strip()), "no log")

    async def _watch(self) -> None:
        """Start the server again when it dies, within the limit."""
        starts: deque[float] = deque(maxlen=self._max_restarts)
        while self._process is not None:
            await self._process.wait()
            now = self._clock()
            full = len(starts) == self._max_restarts
            if full and (not starts or now - starts[0] < self._restart_window):
                _LOG.error("private token cache server keeps dying; continuing without it")
                return
            starts.append(now)
            self.restarts += 1
            _LOG.warning("private token cache server died; starting it again")
            with suppress(ConfigError, OSError):
                await self._launch()

    async def _end_process(self) -> None:
        process = self._process
        if process is None or process.returncode is not None:
            return
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            async with asyncio.timeout(_STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()


def _ends_with_parent() -> list[str]:
    """The prefix that makes the kernel end a child when we are killed, where util-linux has it."""
    setpriv = shutil.which("setpriv")
    return [setpriv, "--pdeathsig", "TERM", "--"] if setpriv else []
