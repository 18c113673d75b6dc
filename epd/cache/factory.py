"""From a URL to a token cache. Opening connects to nothing; an absent server is a miss later."""

from __future__ import annotations

import ipaddress
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from epd.cache.memory import MemoryCache
from epd.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

    from epd.cache.base import TokenCache
    from epd.cache.redis_cache import RedisCache

__all__ = ["open_cache"]

_SCHEMES = ("redis", "rediss", "unix", "memory")
_OPTIONS = ("db", "user", "password_file")


def open_cache(
    url: str | None,
    *,
    max_bytes: int = 256 << 20,
    max_entry_bytes: int = 32 << 20,
    ttl: float = 3600.0,
    timeout: float = 0.2,
    allow_no_password: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> TokenCache:
    """The cache that `url` names; no URL and `memory://` stay in this process.

    `redis://[user:password@]host[:port]`, `rediss://` (TLS) and `unix:///path/to/socket` take the
    options `?db=`, `user=` and `password_file=`; the file keeps the password out of command lines.
    `max_bytes` bounds the memory cache; a server has its own limit. `timeout` bounds the seconds
    that one call to a server may cost. Raises `ConfigError` for a URL that cannot work, and for
    another host without a password unless `allow_no_password`.
    """
    parts = _split(url or "memory://")
    if parts.scheme == "memory":
        return MemoryCache(
            max_bytes=max_bytes, max_entry_bytes=max_entry_bytes, ttl=ttl, clock=clock
        )
    arguments = _connection_arguments(parts)
    if not arguments.get("password") and not allow_no_password and not _is_local(parts):
        raise ConfigError(
            "the token cache is on another host and its URL has no password; "
            "add one (redis://:PASSWORD@host) or allow it explicitly"
        )
    return _connect(
        parts.scheme,
        arguments,
        ttl=ttl,
        max_entry_bytes=max_entry_bytes,
        timeout=timeout,
        clock=clock,
    )


def _split(url: str) -> SplitResult:
    # no message shows the URL: it may hold a password
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise ConfigError("the token cache URL is malformed") from None
    if parts.scheme not in _SCHEMES:
        schemes = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise ConfigError(f"the token cache URL must start with one of {schemes}")
    if parts.scheme == "unix" and (parts.netloc.rpartition("@")[2] or not parts.path):
        raise ConfigError("the token cache URL must be unix:// and an absolute path")
    if parts.scheme.startswith("redis") and not parts.hostname:
        raise ConfigError("the token cache URL names no host")
    return parts


def _connection_arguments(parts: SplitResult) -> dict[str, Any]:
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(set(options) - set(_OPTIONS))
    if unknown:
        known = ", ".join(_OPTIONS)
        raise ConfigError(f"the token cache URL takes the options {known}, not {unknown[0][:32]!r}")
    arguments: dict[str, Any] = {
        "db": _database(parts, options),
        "username": options.get("user") or unquote(parts.username or "") or None,
        "password": _password(parts, options),
    }
    if parts.scheme == "unix":
        return arguments | {"path": unquote(parts.path)}
    return arguments | {"host": parts.hostname, "port": parts.port or 6379}


def _database(parts: SplitResult, options: dict[str, str]) -> int:
    path = "" if parts.scheme == "unix" else parts.path.strip("/")
    text = options.get("db") or path or "0"
    if not (text.isascii() and text.isdigit() and len(text) < 6):
        raise ConfigError("the database in the token cache URL must be a number")
    return int(text)


def _password(parts: SplitResult, options: dict[str, str]) -> str | None:
    path = options.get("password_file")
    if path is None:
        return unquote(parts.password) if parts.password else None
    try:
        password = Path(path).read_text().strip()
    except (OSError, ValueError):
        raise ConfigError(f"the token cache's password file {path} cannot be read") from None
    if not password:
        raise ConfigError(f"the token cache's password file {path} is empty")
    return password


def _is_local(parts: SplitResult) -> bool:
    if parts.scheme == "unix" or parts.hostname == "localhost":
        return True
    try:
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


def _connect(
    scheme: str,
    arguments: dict[str, Any],
    *,
    ttl: float,
    max_entry_bytes: int,
    timeout: float,
    clock: Callable[[], float],
) -> RedisCache:
    from redis.asyncio import (
        Connection,
        ConnectionPool,
        Redis,
        SSLConnection,
        UnixDomainSocketConnection,
    )
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    from epd.cache.breaker import Breaker
    from epd.cache.redis_cache import RedisCache

    kinds: dict[str, Any] = {
        "redis": Connection, "rediss": SSLConnection, "unix": UnixDomainSocketConnection
    }  # fmt: skip
    # the client's own retries would wait for seconds on a server that is gone
    settings: dict[str, Any] = {
        "socket_timeout": timeout,
        "socket_connect_timeout": timeout,
        "retry": Retry(NoBackoff(), 0),
        "retry_on_error": [],
        "protocol": 2,
        "socket_read_size": 1 << 20,
    }
    make_pool: Any = ConnectionPool
    make_client: Any = Redis
    pool = make_pool(connection_class=kinds[scheme], **settings, **arguments)
    return RedisCache(
        make_client.from_pool(pool),
        ttl=ttl,
        max_entry_bytes=max_entry_bytes,
        timeout=timeout,
        breaker=Breaker(clock=clock),
    )
