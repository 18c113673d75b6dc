"""Which cache a URL opens, and which URLs are refused without showing a password."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import pytest

import epd.cache
from epd.cache.factory import open_cache
from epd.cache.memory import MemoryCache
from epd.cache.redis_cache import RedisCache
from epd.errors import ConfigError


@pytest.mark.parametrize("url", [None, "", "memory://"])
def test_no_server_means_memory(url: str | None) -> None:
    assert isinstance(open_cache(url), MemoryCache)


@pytest.mark.parametrize(
    "url",
    [
        "redis://localhost",
        "redis://127.0.0.1:7000/3",
        "redis://[::1]:7000",
        "redis://:secret@cache.example:6379",
        "rediss://user:se%2Fcret@cache.example",
        "unix:///run/cache/socket",
        "unix:///run/cache/socket?db=2&user=epd",
    ],
)
def test_urls_that_open_without_connecting(url: str) -> None:
    assert isinstance(open_cache(url), RedisCache)


@pytest.mark.parametrize(
    "url",
    [
        "redis://cache.example",
        "rediss://cache.example:6380",
        "redis://10.0.0.5",
        "redis://user@cache.example",
        "redis://:@cache.example",
        "redis://127.0.0.1.evil.example",
    ],
)
def test_another_host_needs_a_password(url: str) -> None:
    with pytest.raises(ConfigError, match="no password"):
        open_cache(url)
    assert isinstance(open_cache(url, allow_no_password=True), RedisCache)


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis:///0",
        "http://:s3cret@cache.example",
        "s3cret",
        "redis://:s3cret@cache.example:port",
        "redis://:s3cret@cache.example:99999",
        "redis://:s3cret@[::1",
        "redis://:s3cret@cache.example/zero",
        "redis://:s3cret@cache.example?socket_timeout=60",
        "redis://:s3cret@cache.example?db=-1",
        "unix://",
        "unix://relative/socket",
        "redis://cache.example?password_file=/nonexistent/file&user=s3cret",
    ],
)
def test_bad_urls_are_refused_without_an_echo(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        open_cache(url)
    assert "s3cret" not in str(caught.value)


def test_the_password_can_come_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "password"
    path.write_text("secret\n")
    assert isinstance(open_cache(f"redis://cache.example?password_file={path}"), RedisCache)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="empty"):
        open_cache(f"redis://cache.example?password_file={path}")


def test_the_room_loads_no_torch_and_redis_only_when_asked() -> None:
    program = """
import sys, epd.cache
assert not {"torch", "transformers", "redis"} & set(sys.modules)
epd.cache.open_cache("unix:///nowhere")
assert "torch" not in sys.modules and "redis" in sys.modules
"""
    root = str(Path(epd.cache.__file__).parents[2])
    subprocess.run(
        [sys.executable, "-c", program], check=True, env=os.environ | {"PYTHONPATH": root}
    )


def test_a_server_that_is_not_there_is_a_miss(tmp_path: Path) -> None:
    async def main() -> None:
        cache = open_cache(f"unix://{tmp_path}/nothing")
        assert await cache.get("k") is None
        assert await cache.contains(["k", "l"]) == [False, False]
        assert await cache.claim("k", 1)
        assert cache.stats().breaker == "open"
        await cache.unclaim("k")
        await cache.close()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
