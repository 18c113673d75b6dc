"""A worker: one node hosting one or more stages, telling the gateway about itself, obeying its
directory and its orders to change roles.

Between stages of one worker a message is a function call on the same tensors; between workers it
is a wire message. A worker that hears nothing from a gateway for a while, or hears a new life of
it, drops all its requests and calls off a switch under way.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import structlog

from epd.cache.base import TokenCache
from epd.failpoints import Failpoints
from epd.messages import (
    Cancel,
    Heartbeat,
    Leaving,
    Message,
    Peers,
    SwitchAbort,
    SwitchCommit,
    SwitchRole,
    WorkerStats,
)
from epd.node import GATEWAY, Node
from epd.roles import StageSet, format_stages, parse_stages
from epd.stages.base import Payload
from epd.stages.hosted import STAGE_MESSAGES, HostedStages
from epd.stages.parts import StageLoader
from epd.switcher import Switcher
from epd.switching import RoleSwitch
from epd.tensors import to_blob
from epd.wire import Blob, Envelope

__all__ = ["ServedModel", "Worker"]

_log = structlog.get_logger("epd.worker")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a worker proves about its model, so that two workers never mix models."""

    revision: str
    encoder_revision: str
    dtype: str
    image_token_id: int | None


class Worker:
    """Wires the stages of `node`'s identity to it; `loader` has loaded what they need.

    `commit_seconds` is how long a worker that has loaded a new role waits for its commit.
    """

    def __init__(
        self,
        node: Node,
        facts: ServedModel,
        *,
        gateway: str,
        cache: TokenCache,
        loader: StageLoader,
        clock: Callable[[], float],
        device: str = "cpu",
        address: str | None = None,
        heartbeat: float = 0.25,
        orphan_after: float = 2.0,
        commit_seconds: float = 10.0,
        failpoints: Failpoints | None = None,
    ) -> None:
        self.name = node.identity.name
        self._node = node
        self._facts = facts
        self._gateway = gateway
        self._address = address or node.address
        self._cache = cache
        self._loader = loader
        self._clock = clock
        self._heartbeat = heartbeat
        self._orphan_after = orphan_after
        self._gateway_life = 0
        self._gateway_seen = clock()
        self._handoff_bytes = 0
        self._accepting = True
        points = failpoints or Failpoints()
        self.hosted = HostedStages(
            self, cache, clock=clock, device=device, image_token_id=facts.image_token_id,
            on_move=lambda: points.hit("switch.move"),
        )  # fmt: skip
        stages = parse_stages(node.identity.stages)
        self.hosted.install(loader.parts, stages)
        role = RoleSwitch(stages, node.identity.epoch, clock=clock, commit_seconds=commit_seconds)
        self._switcher = Switcher(self, role, self.hosted, loader, clock=clock, failpoints=points)
        self._register()

    @property
    def stages(self) -> StageSet:
        """The stages of the role that counts."""
        return parse_stages(self._node.identity.stages)

    @property
    def epoch(self) -> int:
        """The epoch of the role that counts."""
        return self._node.identity.epoch

    def _register(self) -> None:
        for kind in STAGE_MESSAGES:
            self._node.on(kind, self._from_wire)
        self._node.on(Peers, self._peers)
        self._node.on(Cancel, self._cancel)
        orders = (
            (SwitchRole, self._switcher.order),
            (SwitchCommit, self._switcher.commit),
            (SwitchAbort, self._switcher.abort),
        )
        for kind, obey in orders:
            self._node.on(kind, _from_gateway(obey))

    def _from_wire(self, envelope: Envelope, message: Message, blobs: tuple[Blob, ...]) -> None:
        self._deliver(envelope.sender, message, blobs)

    def _deliver(self, sender: str, message: Message, payloads: Sequence[Payload]) -> None:
        handler = self.hosted.handlers.get(type(message))
        if handler is None:
            self._node.rejected["no_handler"] += 1
        else:
            handler(sender, message, payloads)

    async def sealed(self, blobs: Sequence[Blob]) -> Sequence[Blob]:
        """The blobs as they may be posted without holding up the event loop."""
        return await self._node.sealed(blobs)

    def post(self, to: str, message: Message, payloads: Sequence[Payload] = ()) -> bool:
        """Send to a worker; to this one it is a function call on the next turn of the event
        loop.
        """
        if to != self.name:
            blobs = [p if isinstance(p, Blob) else to_blob(p) for p in payloads]
            self._handoff_bytes += sum(len(blob.data) for blob in blobs)
            return self._node.post(to, message, blobs)
        if type(message) not in self.hosted.handlers:
            return False
        asyncio.get_running_loop().call_soon(self._deliver, self.name, message, tuple(payloads))
        return True

    def emit(self, message: Message) -> None:
        """Send to the gateway."""
        self._node.post_address(self._gateway, GATEWAY, message)

    def _peers(self, envelope: Envelope, message: Peers, _: tuple[Blob, ...]) -> None:
        if envelope.sender != GATEWAY:
            return
        if self._gateway_life and envelope.incarnation != self._gateway_life:
            self._reset("the gateway restarted")
        self._gateway_life = envelope.incarnation
        self._gateway_seen = self._clock()
        self._node.know([p for p in message.workers if p.worker_id != self.name])

    def _cancel(self, envelope: Envelope, message: Cancel, _: tuple[Blob, ...]) -> None:
        if envelope.sender != GATEWAY:
            return
        self.hosted.cancel(message.request_id, message.attempt)

    def _reset(self, why: str) -> None:
        _log.warning("dropping all requests", worker=self.name, why=why)
        self.hosted.reset()
        self._switcher.abandon(why)

    def _alive(self, name: str) -> bool:
        return name == self.name or self._node.knows(name)

    def stats(self) -> WorkerStats:
        """What the next heartbeat reports."""
        hosted, cache = self.hosted, self._cache.stats()
        core = hosted.loop.stats if hosted.loop else None
        encode, prefill, decode = hosted.encode, hosted.prefill, hosted.decode
        return WorkerStats(
            encode_queue=encode.queued if encode else 0,
            encoded_total=encode.encoded_total if encode else 0,
            prefill_waiting=(prefill.waiting if prefill else 0) + (core.waiting if core else 0),
            running=core.running if core else 0,
            handoff_queue=decode.queued if decode else 0,
            kv_leases=hosted.source.leases if hosted.source else 0,
            blocks_total=core.blocks_total if core else 0,
            blocks_free=core.blocks_free if core else 0,
            prefix_queries=core.prefix_queries if core else 0,
            prefix_hits=core.prefix_hits if core else 0,
            preemptions=core.preemptions if core else 0,
            cache_queries=cache.hits + cache.misses,
            cache_hits=cache.hits,
            cache_errors=cache.errors,
            handoff_bytes=self._handoff_bytes,
            frames_rejected=self._node.rejected.total(),
            resident_bytes=self._loader.resident_bytes,
            kv_fallbacks=core.kv_fallbacks if core else 0,
        )

    async def run(self) -> None:
        """Serve until cancelled; raises what breaks a stage, so that the process ends and is
        replaced.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._node.run())
            tasks.create_task(self._beat())
            self.hosted.begin(tasks)
            self._switcher.begin(tasks)

    def take_role(self, stages: StageSet, epoch: int) -> None:
        """From now on send under these stages and this epoch."""
        letters = format_stages(stages)
        self._node.identity = replace(self._node.identity, stages=letters, epoch=epoch)

    def beat(self) -> None:
        """Send a heartbeat now."""
        facts, switch_id = self._facts, self._switcher.switch_id
        self.emit(
            Heartbeat(
                address=self._address,
                revision=facts.revision,
                encoder_revision=facts.encoder_revision,
                dtype=facts.dtype,
                kv=self.hosted.loop.kv_layout if self.hosted.loop else None,
                accepting=self._accepting and switch_id is None,
                switch_id=switch_id,
                stats=self.stats(),
            )
        )

    async def _beat(self) -> None:
        while True:
            self.beat()
            self.hosted.sweep(self._alive)
            if self._gateway_life and self._clock() - self._gateway_seen > self._orphan_after:
                self._reset("the gateway is silent")
                self._gateway_life = 0
            await asyncio.sleep(self._heartbeat)

    async def drain(self, limit: float) -> None:
        """Ask for no new work, wait up to `limit` seconds for the old to end, say goodbye."""
        self._accepting = False
        until = self._clock() + limit
        await asyncio.sleep(2 * self._heartbeat)
        while not self.hosted.idle() and self._clock() < until:
            await asyncio.sleep(0.05)
        self.emit(Leaving())
        await asyncio.sleep(0.05)


def _from_gateway(
    obey: Callable[[Any], None],
) -> Callable[[Envelope, Message, tuple[Blob, ...]], None]:
    def handler(envelope: Envelope, message: Message, _: tuple[Blob, ...]) -> None:
        if envelope.sender == GATEWAY:
            obey(message)

    return handler
