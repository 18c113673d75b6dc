"""A worker without stages: speaks the protocol of a role switch step by step, as it is told."""

from __future__ import annotations

import asyncio
import itertools
from typing import TypeVar

from epd.messages import (
    Heartbeat,
    Leaving,
    Message,
    Peers,
    SwitchAbort,
    SwitchCommit,
    SwitchFailed,
    SwitchPhase,
    SwitchReady,
    SwitchRole,
    WorkerStats,
)
from epd.node import GATEWAY
from epd.transport import InMemoryTransport
from epd.wire import Codec, Envelope, Frame

__all__ = ["FakeWorker"]

M = TypeVar("M", bound=Message)
_STEPS = ("drain", "unload", "load")


class FakeWorker:
    """One worker on an in-memory network. `seconds` is what each of its phases claims to take.

    `switch` is the order it follows; `took` and `aborted` are the ids it was told to commit and to
    abort.
    """

    def __init__(
        self,
        network: dict[str, asyncio.Queue[list[Frame]]],
        name: str,
        stages: str,
        *,
        incarnation: int = 1,
        revision: str = "r",
        seconds: float = 0.5,
    ) -> None:
        self.name, self.stages, self.epoch = name, stages, 0
        self.incarnation, self.accepting = incarnation, True
        self.switch: SwitchRole | None = None
        self.took: list[str] = []
        self.aborted: list[str] = []
        self.fails_in: str | None = None
        self.pause = 0.0
        self._revision = revision
        self._seconds = seconds
        self._network = network
        self._transport = InMemoryTransport(name, network)
        self._codec = Codec()
        self._seq = itertools.count(1)

    def send(self, message: Message) -> None:
        """Send to the gateway."""
        me = Envelope(
            self.name, self.incarnation, self.epoch, self.stages, GATEWAY, next(self._seq)
        )
        self._transport.send(GATEWAY, self._codec.encode(me, message, []))

    def beat(self) -> None:
        """One heartbeat."""
        self.send(
            Heartbeat(
                address=self.name,
                revision=self._revision,
                encoder_revision="e",
                dtype="float32",
                accepting=self.accepting and self.switch is None,
                switch_id=self.switch.switch_id if self.switch else None,
                stats=WorkerStats(),
            )
        )

    def leave(self) -> None:
        """Say goodbye."""
        self.send(Leaving())

    def restart(self, stages: str) -> None:
        """Come back in a new life, without a heartbeat yet."""
        self.incarnation += 1
        self.epoch, self.stages, self.switch, self._seq = 0, stages, None, itertools.count(1)
        self.read(Message)

    def read(self, kind: type[M]) -> list[M]:
        """The messages of one type that came since the last call; the orders among the rest are
        noted, everything else is dropped.
        """
        found: list[M] = []
        inbox = self._network[self.name]
        while not inbox.empty():
            message = self._codec.decode(inbox.get_nowait(), self.name).message
            self._note(message)
            if isinstance(message, kind) and not isinstance(message, Peers):
                found.append(message)
        return found

    def _note(self, message: Message) -> None:
        if isinstance(message, SwitchRole) and self.switch is None:
            self.switch = message
        elif isinstance(message, SwitchCommit):
            self.took.append(message.switch_id)
        elif isinstance(message, SwitchAbort):
            self.aborted.append(message.switch_id)

    def obey(self, until: str) -> None:
        """Take the steps of the switch up to `until`: begin, drain, unload, load or ready."""
        self.read(Message)
        assert self.switch is not None
        self.beat()
        for step in _STEPS[: ("begin", *_STEPS, "ready").index(until)]:
            self.send(
                SwitchPhase(switch_id=self.switch.switch_id, phase=step, seconds=self._seconds)
            )
        if until == "ready":
            self.send(SwitchReady(switch_id=self.switch.switch_id, resident_bytes=1000))

    def commit(self) -> None:
        """Take up the new role if the commit came."""
        self.read(Message)
        assert self.switch is not None and self.switch.switch_id in self.took
        self.stages, self.epoch, self.switch = self.switch.stages, self.epoch + 1, None
        self.beat()

    def fail(self, phase: str, message: str) -> None:
        """Go back to the old role."""
        self.read(Message)
        assert self.switch is not None
        failed = SwitchFailed(switch_id=self.switch.switch_id, phase=phase, message=message)
        self.switch = None
        self.send(failed)
        self.beat()

    async def follow(self, *, every: float = 0.05) -> None:
        """Send heartbeats and obey every order until cancelled, failing in the phase `fails_in`.

        `pause` seconds pass between an order and the loaded role.
        """
        begun, ready = "", 0.0
        clock = asyncio.get_running_loop().time
        while True:
            self.read(Message)
            if self.switch is not None:
                order = self.switch.switch_id
                if order in self.took:
                    self.commit()
                elif order in self.aborted:
                    self.fail("abort", "told to go back")
                elif order != begun:
                    begun, ready = order, clock() + self.pause
                    self.obey("begin")
                elif clock() >= ready and self.fails_in is not None:
                    self.fail(self.fails_in, "it broke")
                elif clock() >= ready:
                    ready = float("inf")
                    self.obey("ready")
            self.beat()
            await asyncio.sleep(every)
