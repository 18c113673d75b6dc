"""Nodes: who is heard, and what is dropped and counted."""

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from epd.messages import (
    Cancel,
    Heartbeat,
    KVBlocks,
    PeerInfo,
    Peers,
    RequestMessage,
    WorkerStats,
)
from epd.node import GATEWAY, Identity, Node
from epd.transport import InMemoryTransport, Transport, TransportFullError, ZmqTransport
from epd.wire import Blob, Codec, Envelope, Frame

Network = dict[str, "asyncio.Queue[list[Frame]]"]


class Pair:
    """A gateway and a worker on one network; `heard` is what reached the worker."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.gateway = self.node(GATEWAY)
        self.worker = self.node("w")
        self.heard: list[Cancel] = []
        self.worker.on(Cancel, lambda _, message, __: self.heard.append(message))
        self.gateway.know([PeerInfo("w", "w", "D", 0, 1)])

    def node(self, name: str, incarnation: int = 1) -> Node:
        identity = Identity(name, incarnation, "D")
        return Node(identity, InMemoryTransport(name, self.network), Codec())

    async def settle(self) -> None:
        task = asyncio.create_task(self.worker.run())
        while not self.network["w"].empty():
            await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()


def cancel(attempt: int = 0) -> Cancel:
    return Cancel(request_id="r", attempt=attempt)


def test_messages_arrive_in_order() -> None:
    async def run() -> None:
        pair = Pair({})
        for attempt in range(5):
            assert pair.gateway.post("w", cancel(attempt))
        await pair.settle()
        assert [m.attempt for m in pair.heard] == [0, 1, 2, 3, 4]
        assert not pair.worker.rejected

    asyncio.run(run())


KEY = bytes(32)


class Watched(Codec):
    """Notes whether buffers are digested and checked on the event loop; `gate` holds checks up."""

    def __init__(self) -> None:
        super().__init__(KEY)
        self.beside: list[tuple[str, bool]] = []
        self.gate = threading.Event()
        self.gate.set()

    def _note(self, what: str) -> None:
        self.beside.append((what, threading.current_thread() is not threading.main_thread()))

    def digested(self, blobs: Sequence[Blob]) -> list[Blob]:
        if any(blob.digest is None for blob in blobs):
            self._note("digest")
        return super().digested(blobs)

    def check(self, blobs: Sequence[Blob]) -> None:
        if blobs:
            self._note("check")
            assert self.gate.wait(10)
        super().check(blobs)


class KeyedPair:
    """`a` and the gateway send to `b`; `heard` gets what reached it."""

    def __init__(self) -> None:
        network: Network = {}
        self.codec = Watched()
        self.a = Node(Identity("a", 1), InMemoryTransport("a", network), self.codec)
        self.b = Node(Identity("b", 1), InMemoryTransport("b", network), self.codec)
        self.gateway = Node(Identity(GATEWAY, 1), InMemoryTransport(GATEWAY, network), Codec(KEY))
        for sender in (self.a, self.gateway):
            sender.know([PeerInfo("b", "b", "D", 0, 1)])
        self.b.know([PeerInfo("a", "a", "P", 0, 1)])
        self.heard: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        for kind in (KVBlocks, Cancel):
            self.b.on(kind, self._hear)

    def _hear(self, envelope: Envelope, message: RequestMessage, _: tuple[Blob, ...]) -> None:
        self.heard.put_nowait((envelope.sender, message.attempt))

    async def send(self, size: int, attempt: int = 0, fill: bytes = b"x") -> None:
        blobs = await self.a.sealed([Blob("uint8", (size,), fill * size)])
        self.a.post("b", KVBlocks(request_id="r", attempt=attempt), blobs)


@pytest.mark.parametrize(("size", "beside"), [(1 << 10, False), (5 << 20, True)])
def test_much_is_authenticated_beside_the_event_loop(size: int, beside: bool) -> None:
    async def run() -> None:
        pair = KeyedPair()
        await pair.send(size)
        pair.a.post("b", cancel(1))
        task = asyncio.create_task(pair.b.run())
        async with asyncio.timeout(10):
            assert [await pair.heard.get(), await pair.heard.get()] == [("a", 0), ("a", 1)]
        task.cancel()
        assert pair.codec.beside == [("digest", beside), ("check", beside)]

    asyncio.run(run())


def test_others_are_heard_while_much_is_checked_and_each_sender_in_order() -> None:
    async def run() -> None:
        pair = KeyedPair()
        pair.codec.gate.clear()
        task = asyncio.create_task(pair.b.run())
        await pair.send(5 << 20, attempt=1)
        pair.a.post("b", cancel(2))
        pair.gateway.post("b", cancel(3))
        async with asyncio.timeout(10):
            assert await pair.heard.get() == (GATEWAY, 3)
            await asyncio.sleep(0.05)
            assert pair.heard.empty(), "what the sender said later waits for its turn"
            pair.codec.gate.set()
            assert [await pair.heard.get(), await pair.heard.get()] == [("a", 1), ("a", 2)]
        task.cancel()

    asyncio.run(run())


@pytest.mark.parametrize("size", [0, 1 << 10, 5 << 20])
def test_keyed_messages_travel_over_tcp(size: int) -> None:
    async def run() -> None:
        sockets = [ZmqTransport("tcp://127.0.0.1:*", keyed=True) for _ in range(2)]
        a, b = (Node(Identity(n, 1), t, Codec(KEY)) for n, t in zip("ab", sockets, strict=True))
        a.know([PeerInfo("b", b.address, "D", 0, 1)])
        b.know([PeerInfo("a", a.address, "P", 0, 1)])
        heard: asyncio.Queue[list[bytes]] = asyncio.Queue()
        b.on(KVBlocks, lambda _, __, blobs: heard.put_nowait([bytes(one.data) for one in blobs]))
        data = [bytes([n]) * size for n in range(3)]
        blobs = await a.sealed([Blob("uint8", (size,), one) for one in data])
        assert a.post("b", KVBlocks(request_id="r", attempt=0), blobs)
        task = asyncio.create_task(b.run())
        async with asyncio.timeout(10):
            assert await heard.get() == data
        task.cancel()
        for node in (a, b):
            node.close()

    asyncio.run(run())


def test_much_that_was_tampered_with_costs_one_message() -> None:
    async def run() -> None:
        pair = KeyedPair()
        sealed = await pair.a.sealed([Blob("uint8", (5 << 20,), b"x" * (5 << 20))])
        false = [replace(blob, data=b"y" * (5 << 20)) for blob in sealed]
        pair.a.post("b", KVBlocks(request_id="r", attempt=1), false)
        pair.a.post("b", cancel(2))
        task = asyncio.create_task(pair.b.run())
        async with asyncio.timeout(10):
            assert await pair.heard.get() == ("a", 2)
        task.cancel()
        assert dict(pair.b.rejected) == {"bad authentication": 1}

    asyncio.run(run())


def test_what_nobody_can_read_is_said_once() -> None:
    async def run() -> None:
        pair = Pair({})
        for _ in range(3):
            pair.network["w"].put_nowait([b"Cancel", b"x", bytes(32)])
        with capture_logs() as logs:
            await pair.settle()
        told = [(log["event"], log["reason"]) for log in logs]
        assert len(told) == 1 and told[0][0] == "message refused"
        assert pair.worker.rejected[told[0][1]] == 3

    asyncio.run(run())


def test_a_replayed_frame_is_dropped() -> None:
    async def run() -> None:
        pair = Pair({})
        pair.gateway.post("w", cancel())
        frames = await pair.network["w"].get()
        for _ in range(3):
            pair.network["w"].put_nowait(frames)
        await pair.settle()
        assert len(pair.heard) == 1
        assert pair.worker.rejected["replayed"] == 2

    asyncio.run(run())


def test_an_earlier_life_of_a_sender_is_fenced() -> None:
    async def run() -> None:
        pair = Pair({})
        old, new = pair.node(GATEWAY, 1), pair.node(GATEWAY, 2)
        for node, attempt in ((new, 1), (old, 2), (new, 3)):
            node.know([PeerInfo("w", "w", "D", 0, 1)])
            node.post("w", cancel(attempt))
        await pair.settle()
        assert [m.attempt for m in pair.heard] == [1, 3]
        assert pair.worker.rejected["earlier life of the sender"] == 1

    asyncio.run(run())


def test_a_stranger_may_only_introduce_itself_to_the_gateway() -> None:
    async def run() -> None:
        pair = Pair({})
        stranger = pair.node("stranger")
        stranger.post_address("w", "w", cancel())
        await pair.settle()
        assert not pair.heard
        assert pair.worker.rejected["unknown sender"] == 1

    asyncio.run(run())


def test_only_the_gateway_names_peers() -> None:
    async def run() -> None:
        pair = Pair({})
        pair.worker.know([PeerInfo("evil", "evil", "D", 0, 1)])
        named: list[Peers] = []
        pair.worker.on(Peers, lambda _, message, __: named.append(message))
        pair.node("evil").post_address("w", "w", Peers(workers=[]))
        pair.gateway.post("w", Peers(workers=[]))
        await pair.settle()
        assert len(named) == 1

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore")
def test_a_failing_handler_costs_one_message() -> None:
    async def run() -> None:
        pair = Pair({})

        def fails_once(_: object, message: Cancel, __: object) -> None:
            if message.attempt == 0:
                raise RuntimeError("boom")
            pair.heard.append(message)

        pair.worker.on(Cancel, fails_once)
        pair.gateway.post("w", cancel(0))
        pair.gateway.post("w", cancel(1))
        await pair.settle()
        assert [m.attempt for m in pair.heard] == [1]
        assert pair.worker.rejected["handler_failed"] == 1

    asyncio.run(run())


def test_posting_to_nobody_is_false_not_an_error() -> None:
    async def run() -> None:
        pair = Pair({})
        assert not pair.gateway.post("nobody", cancel())
        assert pair.gateway.rejected["unknown_receiver"] == 1

    asyncio.run(run())


def test_zmq_carries_frames_between_inboxes_and_never_blocks(tmp_path: Path) -> None:
    async def run() -> None:
        directory = tmp_path / "z"
        directory.mkdir(mode=0o700)
        a: Transport = ZmqTransport(f"ipc://{directory}/a", keyed=False)
        b = ZmqTransport(f"ipc://{directory}/b", keyed=False)
        payload = bytes(3 << 20)
        a.send(b.address, [b"tag", payload])
        assert [bytes(f) for f in await asyncio.wait_for(b.receive(), 5)] == [b"tag", payload]
        with pytest.raises(TransportFullError):
            for _ in range(20_000):
                a.send(f"ipc://{directory}/nobody", [b"x"])
        a.close()
        b.close()

    asyncio.run(run())


@pytest.mark.parametrize("address", ["", "10.0.0.5:5555", "tcp://127.0.0.1:port"])
def test_zmq_cannot_send_to_what_is_no_address(tmp_path: Path, address: str) -> None:
    async def run() -> None:
        directory = tmp_path / "z"
        directory.mkdir(mode=0o700)
        transport = ZmqTransport(f"ipc://{directory}/a", keyed=False)
        with pytest.raises(TransportFullError, match="cannot connect"):
            transport.send(address, [b"x"])
        transport.close()

    asyncio.run(run())


def test_heartbeats_are_admitted_from_strangers() -> None:
    async def run() -> None:
        network: Network = {}
        pair = Pair(network)
        beats: list[Heartbeat] = []
        pair.gateway.on(Heartbeat, lambda _, message, __: beats.append(message))
        pair.gateway.know([])
        beat = Heartbeat(
            address="w", revision="r", encoder_revision="e", dtype="float32", stats=WorkerStats()
        )
        pair.worker.post_address(GATEWAY, GATEWAY, beat)
        task = asyncio.create_task(pair.gateway.run())
        await asyncio.sleep(0.01)
        task.cancel()
        assert beats == [beat]

    asyncio.run(run())
