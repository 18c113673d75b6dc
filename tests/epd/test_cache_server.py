"""The private server: nobody else gets in, nothing is left behind, it comes back when it dies."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

import pytest
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError

import epd.cache
from epd.cache import CachedTokens, PrivateServer, find_server, open_cache
from epd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Coroutine

needs_server = pytest.mark.skipif(
    find_server() is None, reason="no redis-server or valkey-server on PATH"
)


def run(main: Coroutine[Any, Any, None]) -> None:
    async def checked() -> None:
        await main
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(checked())


def socket_and_password(server: PrivateServer) -> tuple[Path, Path]:
    parts = urlsplit(server.url)
    return Path(parts.path), Path(parse_qs(parts.query)["password_file"][0])


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"


async def until_dead(pid: int) -> None:
    deadline = time.monotonic() + 5
    while alive(pid):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


@needs_server
def test_it_starts_fast_serves_and_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> None:
        server = PrivateServer(parent=tmp_path)
        started = time.monotonic()
        await server.start()
        assert time.monotonic() - started < 2.0
        pid = server.pid
        assert pid is not None
        cache = open_cache(server.url)
        value = CachedTokens("float32", (1, 1), b"abcd")
        assert await cache.store("k", value)
        assert await cache.get("k") == value
        assert await cache.claim("k", 5)
        await cache.renew("k", 5)
        await cache.unclaim("k")
        assert cache.stats().errors == 0
        await cache.close()
        await server.stop()
        await server.stop()
        assert server.pid is None
        assert not alive(pid)
        assert list(tmp_path.iterdir()) == []

    run(main())


@needs_server
def test_only_we_get_in(tmp_path: Path) -> None:
    async def main() -> None:
        server = PrivateServer(parent=tmp_path)
        await server.start()
        socket, password_file = socket_and_password(server)
        assert stat.S_IMODE(socket.parent.stat().st_mode) == 0o700
        assert stat.S_IMODE(socket.stat().st_mode) == 0o700
        assert stat.S_IMODE(password_file.stat().st_mode) == 0o600
        reader, writer = await asyncio.open_unix_connection(socket)
        for command in (b"PING", b"GET epd:x", b"AUTH default x", b"AUTH epd x"):
            writer.write(command + b"\r\n")
            assert (await reader.readline()).startswith((b"-NOAUTH", b"-WRONGPASS"))
        writer.close()
        password = password_file.read_text()
        assert len(password) == 64
        assert password not in server.url
        for name in ("cmdline", "environ"):
            assert password.encode() not in Path(f"/proc/{server.pid}/{name}").read_bytes()
        assert password not in (socket.parent / "log").read_text()
        await server.stop()

    run(main())


FORBIDDEN = [
    ("EVAL", "return 1", 0),
    ("CONFIG", "GET", "*"),
    ("FLUSHALL",),
    ("KEYS", "*"),
    ("SHUTDOWN",),
    ("SAVE",),
    ("MODULE", "LIST"),
    ("ACL", "LIST"),
    ("SLAVEOF", "localhost", 1),
    ("GET", "other:key"),
    ("PUBLISH", "channel", "x"),
]


@needs_server
def test_our_own_user_can_do_little_more_than_get_and_set() -> None:
    async def main() -> None:
        server = PrivateServer()
        await server.start()
        socket, password_file = socket_and_password(server)
        async with Redis(
            unix_socket_path=str(socket), username="epd", password=password_file.read_text()
        ) as client:
            for command in FORBIDDEN:
                with pytest.raises(NoPermissionError):
                    await client.execute_command(*command)
            assert await client.set("epd:x", b"1")
        await server.stop()

    run(main())


@needs_server
def test_it_listens_on_no_port() -> None:
    async def main() -> None:
        server = PrivateServer()
        await server.start()
        inodes = set()
        for link in Path(f"/proc/{server.pid}/fd").iterdir():
            target = os.readlink(link)
            if target.startswith("socket:["):
                inodes.add(target[8:-1])
        listening = {
            line.split()[9]
            for table in ("tcp", "tcp6")
            for line in Path(f"/proc/{server.pid}/net/{table}").read_text().splitlines()[1:]
        }
        assert inodes
        assert not inodes & listening
        await server.stop()

    run(main())


@needs_server
def test_it_forgets_the_oldest_when_full() -> None:
    async def main() -> None:
        server = PrivateServer(max_bytes=8 << 20)
        await server.start()
        cache = open_cache(server.url)
        value = CachedTokens("float32", (256, 512), bytes(256 * 512 * 4))
        for number in range(30):
            assert await cache.store(str(number), value)
        present = await cache.contains([str(number) for number in range(30)])
        assert present[-1]
        assert 5 <= sum(present) <= 16
        await cache.close()
        await server.stop()

    run(main())


@needs_server
def test_it_comes_back_when_killed_and_clients_reconnect() -> None:
    async def main() -> None:
        server = PrivateServer()
        await server.start()
        cache = open_cache(server.url)
        value = CachedTokens("float32", (1, 1), b"abcd")
        assert await cache.store("k", value)
        first = server.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        assert await cache.get("k") is None
        deadline = time.monotonic() + 6
        while not await cache.store("k", value):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)
        assert await cache.get("k") == value
        assert server.restarts == 1
        assert server.pid not in (None, first)
        await cache.close()
        await server.stop()

    run(main())


@needs_server
def test_it_gives_up_after_its_restart_limit() -> None:
    async def main() -> None:
        server = PrivateServer(max_restarts=2)
        await server.start()
        last = None
        for _ in range(3):
            while (pid := server.pid) in (None, last):
                await asyncio.sleep(0.01)
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until_dead(pid)
            last = pid
        await asyncio.sleep(0.3)
        assert server.pid is None
        assert server.restarts == 2
        await server.stop()

    run(main())


@needs_server
def test_a_stopped_server_is_still_ended() -> None:
    async def main() -> None:
        server = PrivateServer()
        await server.start()
        pid = server.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        started = time.monotonic()
        await server.stop()
        assert time.monotonic() - started < 2.0
        assert not alive(pid)

    run(main())


@needs_server
def test_two_private_servers_do_not_meet() -> None:
    async def main() -> None:
        one, two = PrivateServer(), PrivateServer()
        await asyncio.gather(one.start(), two.start())
        caches = [open_cache(server.url) for server in (one, two)]
        value = CachedTokens("float32", (1, 1), b"abcd")
        assert await caches[0].store("k", value)
        assert await caches[1].get("k") is None
        await one.stop()
        assert await caches[1].store("k", value)
        for cache in caches:
            await cache.close()
        await two.stop()

    run(main())


OWNER = """
import asyncio
from epd.cache import PrivateServer

async def main():
    server = PrivateServer()
    await server.start()
    print(server.pid, server.url, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


@needs_server
@pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv on PATH")
def test_it_ends_with_an_owner_that_was_killed() -> None:
    async def main() -> None:
        root = str(Path(epd.cache.__file__).parents[2])
        owner = await asyncio.create_subprocess_exec(
            sys.executable, "-c", OWNER,
            stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": root},
        )  # fmt: skip
        assert owner.stdout is not None
        pid, url = (await owner.stdout.readline()).decode().split()
        assert alive(int(pid))
        owner.kill()
        await owner.communicate()
        await until_dead(int(pid))
        shutil.rmtree(Path(urlsplit(url).path).parent)

    run(main())


def test_a_missing_binary_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert find_server() is None
    with pytest.raises(ConfigError, match="redis-server"):
        asyncio.run(PrivateServer().start())


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose name leaves room for a socket's, wherever pytest keeps its own."""
    with tempfile.TemporaryDirectory(prefix="epd") as name:
        yield Path(name)


def test_a_binary_that_fails_says_why_and_leaves_nothing(short_path: Path) -> None:
    binary, parent = short_path / "fails", short_path / "run"
    parent.mkdir()
    binary.write_text("#!/bin/sh\necho it cannot work >&2\nexit 1\n")
    binary.chmod(0o700)
    with pytest.raises(ConfigError, match="it cannot work"):
        asyncio.run(PrivateServer(binary=str(binary), parent=parent).start())
    assert list(parent.iterdir()) == []


def test_a_binary_that_never_answers_is_given_up(short_path: Path) -> None:
    binary, parent = short_path / "hangs", short_path / "run"
    parent.mkdir()
    binary.write_text("#!/bin/sh\nexec /bin/sleep 60\n")
    binary.chmod(0o700)
    started = time.monotonic()
    with pytest.raises(ConfigError, match="in time"):
        asyncio.run(PrivateServer(binary=str(binary), parent=parent).start())
    assert time.monotonic() - started < 4.0
    assert list(parent.iterdir()) == []


def test_a_directory_too_deep_for_a_socket_is_refused(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    with pytest.raises(ConfigError, match="too long"):
        asyncio.run(PrivateServer(binary="/bin/true", parent=deep).start())
    assert list(deep.iterdir()) == []
