"""A process on the wire: one inbox, a directory of peers, handlers by message type.

Every message carries the sender's stages, epoch and incarnation. A node drops, and counts by
reason, what is malformed, not for it, from a stranger, from an earlier life or an earlier epoch of
a known sender, or replayed (sequence not rising).
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import structlog

from epd.errors import WireError
from epd.messages import Heartbeat, Leaving, Message, PeerInfo, Peers
from epd.transport import Transport, TransportFullError
from epd.wire import Blob, Codec, Envelope, Frame, Incoming

__all__ = ["GATEWAY", "Identity", "Node"]

GATEWAY = "gateway"
# digesting this much takes milliseconds, the KV of a long prompt longer than a heartbeat may
_LARGE_BYTES = 4 << 20
M = TypeVar("M", bound=Message)
Handler = Callable[[Envelope, Message, tuple[Blob, ...]], None]
_log = structlog.get_logger("epd.node")


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a node is: its name, this life of it, its stages, and the epoch that changes with
    them.
    """

    name: str
    incarnation: int
    stages: str = ""
    epoch: int = 0


class Node:
    """Sends and receives messages under one identity.

    Handlers are plain functions and must not block.
    """

    def __init__(self, identity: Identity, transport: Transport, codec: Codec) -> None:
        self.identity = identity
        self.rejected: Counter[str] = Counter()
        self._transport = transport
        self._codec = codec
        self._seq = itertools.count(1)
        self._peers: dict[str, PeerInfo] = {}
        self._last: dict[str, tuple[int, int, int]] = {}
        self._handlers: dict[type[Message], Handler] = {}
        self._checking: dict[str, asyncio.Task[None]] = {}

    @property
    def address(self) -> str:
        """Where this node's inbox listens."""
        return self._transport.address

    def on(self, kind: type[M], handler: Callable[[Envelope, M, tuple[Blob, ...]], None]) -> None:
        """Call `handler` for messages of type `kind`; one handler a type."""
        self._handlers[kind] = cast("Handler", handler)

    def know(self, peers: Sequence[PeerInfo]) -> None:
        """Replace the directory of peers; connections to those gone are dropped."""
        fresh = {peer.worker_id: peer for peer in peers}
        for name, peer in self._peers.items():
            if name not in fresh or fresh[name].address != peer.address:
                self._transport.forget(peer.address)
        self._peers = fresh

    def knows(self, name: str) -> bool:
        """Whether `name` is in the directory."""
        return name in self._peers

    async def sealed(self, blobs: Sequence[Blob]) -> list[Blob]:
        """The blobs, ready to post: much is digested beside the event loop, if there is a key."""
        if self._takes_long(blobs):
            return await asyncio.to_thread(self._codec.digested, blobs)
        return list(blobs)

    def _takes_long(self, blobs: Sequence[Blob]) -> bool:
        return self._codec.keyed and sum(len(blob.data) for blob in blobs) > _LARGE_BYTES

    def post(self, to: str, message: Message, blobs: Sequence[Blob] = ()) -> bool:
        """Queue a message for `to`; False when it is unknown or its queue is full.

        Many bytes should have been `sealed`.
        """
        peer = self._peers.get(to)
        if peer is None:
            self.rejected["unknown_receiver"] += 1
            return False
        return self.post_address(peer.address, to, message, blobs)

    def post_address(
        self, address: str, to: str, message: Message, blobs: Sequence[Blob] = ()
    ) -> bool:
        """Queue a message for the node `to` listening at `address`."""
        me = self.identity
        envelope = Envelope(me.name, me.incarnation, me.epoch, me.stages, to, next(self._seq))
        try:
            self._transport.send(address, self._codec.encode(envelope, message, blobs))
        except TransportFullError:
            self.rejected["queue_full"] += 1
            return False
        return True

    async def run(self) -> None:
        """Receive and dispatch until cancelled; a bad frame or a failing handler costs that
        message only.

        Large messages are checked beside the event loop, and one sender's arrive in order.
        """
        async with asyncio.TaskGroup() as tasks:
            while True:
                if incoming := self._opened(await self._transport.receive()):
                    self._take(incoming, tasks)

    def _opened(self, frames: list[Frame]) -> Incoming | None:
        """The message of a known sender, buffers unchecked; None for what is refused."""
        try:
            incoming = self._codec.open(frames, self.identity.name)
        except WireError as error:
            self._refuse(error)
            return None
        try:
            self._admit(incoming.envelope, incoming.message)
        except WireError as error:
            self.rejected[str(error)] += 1
            return None
        return incoming

    def _refuse(self, error: WireError) -> None:
        reason = str(error)
        if not self.rejected[reason]:
            _log.warning("message refused", node=self.identity.name, reason=reason)
        self.rejected[reason] += 1

    def _take(self, incoming: Incoming, tasks: asyncio.TaskGroup) -> None:
        sender = incoming.envelope.sender
        before = self._checking.get(sender)
        if before is None and not self._takes_long(incoming.blobs):
            self._finish(incoming, self._check(incoming))
            return
        task = tasks.create_task(self._take_beside(incoming, before))
        self._checking[sender] = task
        task.add_done_callback(lambda done: self._checked(sender, done))

    async def _take_beside(self, incoming: Incoming, before: asyncio.Task[None] | None) -> None:
        beside = self._takes_long(incoming.blobs)
        error = await asyncio.to_thread(self._check, incoming) if beside else self._check(incoming)
        if before is not None:
            await asyncio.wait([before])
        self._finish(incoming, error)

    def _checked(self, sender: str, task: asyncio.Task[None]) -> None:
        if self._checking.get(sender) is task:
            del self._checking[sender]

    def _check(self, incoming: Incoming) -> WireError | None:
        try:
            self._codec.check(incoming.blobs)
        except WireError as error:
            return error
        return None

    def _finish(self, incoming: Incoming, error: WireError | None) -> None:
        if error is not None:
            self._refuse(error)
        else:
            self.dispatch(incoming.envelope, incoming.message, incoming.blobs)

    def dispatch(self, envelope: Envelope, message: Message, blobs: tuple[Blob, ...]) -> None:
        """Hand a message to its handler; a handler's exception is logged and counted."""
        handler = self._handlers.get(type(message))
        if handler is None:
            self.rejected["no_handler"] += 1
            return
        try:
            handler(envelope, message, blobs)
        except Exception:
            self.rejected["handler_failed"] += 1
            _log.exception("handler failed", kind=type(message).__name__, sender=envelope.sender)

    def _admit(self, envelope: Envelope, message: Message) -> None:
        stranger = envelope.sender not in self._peers and envelope.sender != GATEWAY
        if stranger and not isinstance(message, Heartbeat | Leaving):
            raise WireError("unknown sender")
        incarnation, epoch, seq = self._last.get(envelope.sender, (0, 0, 0))
        if envelope.incarnation < incarnation:
            raise WireError("earlier life of the sender")
        if envelope.incarnation == incarnation and envelope.epoch < epoch:
            raise WireError("stale epoch")
        if envelope.incarnation == incarnation and envelope.seq <= seq:
            raise WireError("replayed")
        if isinstance(message, Peers) and envelope.sender != GATEWAY:
            raise WireError("only the gateway names peers")
        self._last[envelope.sender] = (envelope.incarnation, envelope.epoch, envelope.seq)

    def close(self) -> None:
        """Close the inbox and every connection."""
        self._transport.close()
