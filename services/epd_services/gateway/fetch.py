"""Image URLs behind a guard: resolve, check every address, connect to the checked one only.

The name is resolved once; the connection goes to an address of that answer, so a second answer from
a hostile name server is never asked for. TLS is verified against the name.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from urllib.parse import urlsplit

import httpx

from epd.errors import MediaError

__all__ = [
    "Address",
    "FetchLimits",
    "ImageFetcher",
    "ImageURL",
    "Resolver",
    "is_public",
    "parse_url",
    "resolve",
]

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolver = Callable[[str, int], Awaitable[list[str]]]

_PARAM = "messages"
_MAX_URL = 2048
_PORTS = {"http": 80, "https": 443}
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_NUMERIC = re.compile(r"[0-9]+|0x[0-9a-f]*")
_TYPES = frozenset(
    {"image/png", "image/jpeg", "image/webp", "image/gif", "application/octet-stream"}
)
# these carry another address inside; the packet may end up there
_TRANSLATED = tuple(ipaddress.IPv6Network(text) for text in ("2002::/16", "2001::/32"))
_RESOLVING = ThreadPoolExecutor(8, thread_name_prefix="resolve")
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")


@dataclass(frozen=True, slots=True)
class ImageURL:
    """An http(s) URL taken apart once; everything later is built from these parts."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """The Host header's value."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchLimits:
    """What one fetch may take, and where it may go. Empty `domains`: any public host."""

    seconds: float = 5.0
    max_bytes: int = 20 << 20
    domains: tuple[str, ...] = ()
    ports: tuple[int, ...] = (80, 443)


def parse_url(url: str) -> ImageURL:
    """The parts of an http(s) URL. Raises `MediaError` on anything two parsers could read apart."""
    if len(url) > _MAX_URL or not url.isascii() or re.search(r"[\x00-\x20\x7f\\]", url):
        raise MediaError("The image URL has characters that are not allowed.", _PARAM)
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        raise MediaError("The image URL is malformed.", _PARAM) from None
    if parts.scheme not in _PORTS:
        raise MediaError("The image URL must be a data, http or https URL.", _PARAM)
    if "@" in parts.netloc or "%" in parts.netloc:
        raise MediaError("The image URL must not carry credentials or escapes.", _PARAM)
    if not _is_host(host):
        raise MediaError("The image URL's host is malformed.", _PARAM)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return ImageURL(parts.scheme, host, port or _PORTS[parts.scheme], target)


def _is_host(host: str) -> bool:
    """Whether `host` is a canonical address or a plain name: no octal, hex or short forms."""
    try:
        return str(ipaddress.ip_address(host)) == host
    except ValueError:
        labels = host.split(".")
    return (
        len(host) <= 253
        and all(_LABEL.fullmatch(label) for label in labels)
        and not _NUMERIC.fullmatch(labels[-1])
    )


def is_public(address: Address) -> bool:
    """Whether `address` is global unicast and carries no other address inside."""
    if isinstance(address, ipaddress.IPv6Address) and (
        address not in _GLOBAL_UNICAST or any(address in net for net in _TRANSLATED)
    ):
        return False
    return address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_unspecified
    )


async def resolve(host: str, port: int) -> list[str]:
    """Every address the system resolver knows for `host`."""
    # in threads of its own: whoever runs a slow name server must not hold those of everybody
    found = await asyncio.get_running_loop().run_in_executor(
        _RESOLVING, partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    )
    return [str(entry[4][0]) for entry in found]


class ImageFetcher:
    """Fetches image URLs within `limits`. `resolver` and `allow` are the guard's two questions."""

    def __init__(
        self,
        limits: FetchLimits,
        *,
        resolver: Resolver = resolve,
        allow: Callable[[Address], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._limits = limits
        self._resolver = resolver
        self._allow = allow
        self._tls = tls

    async def fetch(self, url: str, take: Callable[[int], None] = lambda _: None) -> bytes:
        """The body behind `url`. Raises `MediaError`, always within the time limit.

        `take` is told the size of each piece as it comes, and may refuse it.
        """
        parts = parse_url(url)
        self._check_policy(parts)
        try:
            async with asyncio.timeout(self._limits.seconds):
                return await self._get(parts, await self._pin(parts), take)
        except TimeoutError:
            raise MediaError("The image URL did not answer in time.", _PARAM) from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError):
            raise MediaError("The image URL could not be fetched.", _PARAM) from None

    def _check_policy(self, url: ImageURL) -> None:
        if url.port not in self._limits.ports:
            raise MediaError("The image URL's port is not allowed.", _PARAM)
        domains = self._limits.domains
        if domains and not any(url.host == d or url.host.endswith(f".{d}") for d in domains):
            raise MediaError("The image URL's host is not on the allow-list.", _PARAM)

    async def _pin(self, url: ImageURL) -> Address:
        """The one address to connect to; every answer must be allowed, or none is used."""
        try:
            answers = [str(ipaddress.ip_address(url.host))]
        except ValueError:
            answers = await self._resolver(url.host, url.port)
        addresses = [ipaddress.ip_address(answer) for answer in answers]
        if not addresses or not all(self._allow(address) for address in addresses):
            raise MediaError("The image URL's host is not a public address.", _PARAM)
        return addresses[0]

    async def _get(self, url: ImageURL, address: Address, take: Callable[[int], None]) -> bytes:
        host = f"[{address}]" if address.version == 6 else str(address)
        request = httpx.Request(
            "GET",
            f"{url.scheme}://{host}:{url.port}{url.target}",
            headers={"Host": url.authority, "Accept": "image/*", "Accept-Encoding": "identity"},
            extensions={"sni_hostname": url.host, "timeout": _timeouts(self._limits.seconds)},
        )
        # a transport, not a client: nothing reads proxy variables or follows redirects
        async with httpx.AsyncHTTPTransport(verify=self._context(url), trust_env=False) as direct:
            response = await direct.handle_async_request(request)
            try:
                self._check_head(response)
                return await self._read(response, take)
            finally:
                await response.aclose()

    def _context(self, url: ImageURL) -> ssl.SSLContext | bool:
        if url.scheme == "http":
            return False
        if self._tls is None:
            self._tls = httpx.create_ssl_context(trust_env=False)
        return self._tls

    def _check_head(self, response: httpx.Response) -> None:
        if response.status_code != 200:
            raise MediaError("The image URL did not answer with status 200.", _PARAM)
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise MediaError("The image URL answered with a compressed body.", _PARAM)
        media = response.headers.get("content-type", "application/octet-stream")
        if media.split(";")[0].strip().lower() not in _TYPES:
            raise MediaError("The image URL did not answer with an image.", _PARAM)

    async def _read(self, response: httpx.Response, take: Callable[[int], None]) -> bytes:
        body = bytearray()
        async for chunk in response.aiter_raw():
            if len(body) + len(chunk) > self._limits.max_bytes:
                raise MediaError("The image has too many bytes.", _PARAM)
            take(len(chunk))
            body += chunk
        return bytes(body)


def _timeouts(seconds: float) -> dict[str, float]:
    return dict.fromkeys(("connect", "read", "write", "pool"), seconds)
