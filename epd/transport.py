"""Inboxes and how to reach them: ZeroMQ PUSH to PULL between processes, queues inside one.

A node has one inbox. Sending is one-way and never blocks: a peer whose queue is full costs a
`TransportFullError`, a dead one is dropped with its queue by `forget`. Sockets come from this
module alone, so the rule that an inbox is either a private ipc socket or keyed holds for every
channel.
"""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

import zmq
import zmq.asyncio

from epd.errors import ConfigError, EPDError
from epd.wire import Frame, WireLimits

__all__ = [
    "InMemoryTransport",
    "Transport",
    "TransportFullError",
    "ZmqTransport",
    "check_bind",
    "reachable",
]

_HIGH_WATER = 8192


class TransportFullError(EPDError):
    """The peer's queue is full or it cannot be reached; the message was not sent."""

    code = "transport_full"


class Transport(Protocol):
    """One inbox and a way to send to others'."""

    @property
    def address(self) -> str: ...

    async def receive(self) -> list[Frame]: ...

    def send(self, address: str, frames: Sequence[Frame]) -> None: ...

    def forget(self, address: str) -> None: ...

    def close(self) -> None: ...


def check_bind(address: str, keyed: bool) -> None:
    """Raise `ConfigError` unless `address` is an ipc path in a private directory, or keyed TCP."""
    parts = urlsplit(address)
    if parts.scheme == "ipc":
        _check_private(Path(address.removeprefix("ipc://")).parent)
        return
    if parts.scheme != "tcp" or parts.hostname is None:
        raise ConfigError(f"cannot bind {address[:64]!r}: use ipc://PATH or tcp://HOST:PORT")
    if not keyed:
        raise ConfigError(
            f"refusing to bind {address[:64]} without a key: set EPD_WIRE_KEY_FILE to a file of "
            "16 to 64 random bytes, or use an ipc:// path in a private directory"
        )


def reachable(address: str, host: str) -> str:
    """The bound `address` as others can use it: one on every interface becomes one on `host`."""
    parts = urlsplit(address)
    if parts.scheme == "tcp" and parts.hostname in ("0.0.0.0", "::", "*"):
        return f"tcp://{host}:{parts.port}"
    return address


def _check_private(directory: Path) -> None:
    info = os.stat(directory)
    if info.st_uid != os.geteuid() or stat.S_IMODE(info.st_mode) & 0o077:
        raise ConfigError(
            f"{directory} must belong to this user with mode 0700 to hold ipc sockets"
        )


class ZmqTransport:
    """The inbox of one process, bound to `bind` (`ipc://…` or `tcp://…`; port `*` picks a free
    one).
    """

    def __init__(self, bind: str, *, keyed: bool, limits: WireLimits | None = None) -> None:
        check_bind(bind, keyed)
        self._limits = limits or WireLimits()
        self._context = zmq.asyncio.Context()
        self._plain = zmq.Context(self._context)
        self._peers: dict[str, zmq.Socket[bytes]] = {}
        self._inbox = self._context.socket(zmq.PULL)
        self._inbox.setsockopt(zmq.LINGER, 0)
        self._inbox.setsockopt(zmq.RCVHWM, _HIGH_WATER)
        self._inbox.setsockopt(zmq.MAXMSGSIZE, self._limits.frame_bytes)
        try:
            self._inbox.bind(bind)
        except zmq.ZMQError as error:
            self.close()
            raise ConfigError(f"cannot bind {bind}: {error.strerror}") from None
        self.address = self._inbox.getsockopt_string(zmq.LAST_ENDPOINT)

    async def receive(self) -> list[Frame]:
        """The frames of the next message."""
        parts = await self._inbox.recv_multipart(copy=False)
        return [memoryview(part.buffer) for part in parts]

    def send(self, address: str, frames: Sequence[Frame]) -> None:
        """Queue a message for the inbox at `address`; raises `TransportFullError` instead of
        waiting, and for what is no address.
        """
        peer = self._peers.get(address) or self._connect(address)
        try:
            peer.send_multipart(frames, flags=zmq.NOBLOCK, copy=False)
        except zmq.Again:
            raise TransportFullError(f"the queue to {address} is full") from None

    def _connect(self, address: str) -> zmq.Socket[bytes]:
        peer = self._plain.socket(zmq.PUSH)
        peer.setsockopt(zmq.LINGER, 0)
        peer.setsockopt(zmq.SNDHWM, _HIGH_WATER)
        peer.setsockopt(zmq.RECONNECT_IVL, 20)
        peer.setsockopt(zmq.RECONNECT_IVL_MAX, 500)
        try:
            peer.connect(address)
        except zmq.ZMQError as error:
            peer.close(linger=0)
            text = f"cannot connect to {address[:64]}: {error.strerror}"
            raise TransportFullError(text) from None
        self._peers[address] = peer
        return peer

    def forget(self, address: str) -> None:
        """Drop the connection to `address` and whatever waits in its queue."""
        if peer := self._peers.pop(address, None):
            peer.close(linger=0)

    def close(self) -> None:
        """Close every socket; unsent messages are dropped."""
        for address in list(self._peers):
            self.forget(address)
        self._inbox.close(linger=0)
        self._context.destroy(linger=0)


class InMemoryTransport:
    """A `Transport` among the nodes of one event loop: `network` maps addresses to inboxes."""

    def __init__(self, address: str, network: dict[str, asyncio.Queue[list[Frame]]]) -> None:
        self.address = address
        self._network = network
        self._inbox = network.setdefault(address, asyncio.Queue())

    async def receive(self) -> list[Frame]:
        """The frames of the next message."""
        return await self._inbox.get()

    def send(self, address: str, frames: Sequence[Frame]) -> None:
        """Queue a message; one for an address where nobody listens is lost, as on a network."""
        if inbox := self._network.get(address):
            inbox.put_nowait([bytes(frame) for frame in frames])

    def forget(self, address: str) -> None:
        """Nothing is held per peer."""

    def close(self) -> None:
        """Leave the network."""
        self._network.pop(self.address, None)
