"""A worker: one node hosting one or more stages, telling the gateway about itself, obeying its
directory.

Between stages of one worker a message is a function call on the same tensors; between workers it
is a wire message. A worker that hears nothing from a gateway for a while, or hears a new life of
it, drops all its requests.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
import torch

from epd.cache.base import TokenCache
from epd.cache.flight import SingleFlight
from epd.core import EngineCore
from epd.messages import (
    Cancel,
    EncodeRequest,
    Heartbeat,
    KVBlocks,
    KVGone,
    KVOffer,
    KVPull,
    KVRelease,
    KVRenew,
    Leaving,
    Message,
    Peers,
    PrefillRequest,
    VisionTokens,
    VisionTokensReceived,
    WorkerStats,
)
from epd.node import GATEWAY, Node
from epd.roles import Stage, parse_stages
from epd.stages.core_loop import CoreLoop
from epd.stages.decode import DecodeStage
from epd.stages.encode import EncodeStage, ImageEncoder
from epd.stages.prefill import PrefillStage
from epd.tensors import to_blob
from epd.vision_pool import TokenSelector
from epd.wire import Blob, Envelope

__all__ = ["ServedModel", "Worker"]

_log = structlog.get_logger("epd.worker")
StageHandler = Callable[[str, Any, Sequence[Any]], None]


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What a worker proves about its model, so that two workers never mix models."""

    revision: str
    encoder_revision: str
    dtype: str
    image_token_id: int | None
    resident_bytes: int = 0


class Worker:
    """Wires the stages of `node`'s identity to it.

    `encoder`, `core` and `selector` exist as far as the stages need them.
    """

    def __init__(
        self,
        node: Node,
        facts: ServedModel,
        *,
        gateway: str,
        cache: TokenCache,
        encoder: ImageEncoder | None,
        core: EngineCore | None,
        clock: Callable[[], float],
        selector: TokenSelector | None = None,
        device: str = "cpu",
        address: str | None = None,
        heartbeat: float = 0.25,
        orphan_after: float = 2.0,
    ) -> None:
        self.name = node.identity.name
        self._node = node
        self._facts = facts
        self._gateway = gateway
        self._address = address or node.address
        self._cache = cache
        self._clock = clock
        self._heartbeat = heartbeat
        self._orphan_after = orphan_after
        self._gateway_life = 0
        self._gateway_seen = clock()
        self._handoff_bytes = 0
        self._accepting = True
        self._local: dict[type[Message], StageHandler] = {}
        stages = parse_stages(node.identity.stages)
        self._encode = self._loop = self._prefill = self._decode = None
        if Stage.ENCODE in stages and encoder is not None:
            self._encode = EncodeStage(self, encoder, SingleFlight(cache), clock=clock)
        if core is not None and stages & {Stage.PREFILL, Stage.DECODE}:
            self._loop = CoreLoop(self, core)
            if Stage.PREFILL in stages:
                self._prefill = PrefillStage(
                    self,
                    self._loop,
                    cache,
                    clock=clock,
                    device=device,
                    image_token_id=facts.image_token_id,
                    selector=selector,
                )
            if Stage.DECODE in stages:
                self._decode = DecodeStage(self, self._loop, clock=clock, device=device)
        self._register()

    _encode: EncodeStage | None
    _loop: CoreLoop | None
    _prefill: PrefillStage | None
    _decode: DecodeStage | None

    def _register(self) -> None:
        if encode := self._encode:
            self._handle(EncodeRequest, encode.accept)
            self._handle(VisionTokensReceived, encode.received)
        if prefill := self._prefill:
            self._handle(PrefillRequest, prefill.accept)
            self._handle(VisionTokens, prefill.vision_tokens)
            self._handle(KVPull, prefill.pull)
            self._handle(KVRenew, prefill.renew)
            self._handle(KVRelease, prefill.release)
        if decode := self._decode:
            self._handle(KVOffer, decode.offer)
            self._handle(KVBlocks, decode.blocks)
            self._handle(KVGone, decode.gone)
        self._node.on(Peers, self._peers)
        self._node.on(Cancel, self._cancel)

    def _handle(self, kind: type[Message], handler: StageHandler) -> None:
        self._local[kind] = handler

        def from_wire(envelope: Envelope, message: Message, blobs: tuple[Blob, ...]) -> None:
            handler(envelope.sender, message, blobs)

        self._node.on(kind, from_wire)

    def post(self, to: str, message: Message, tensors: Sequence[torch.Tensor] = ()) -> bool:
        """Send to a worker; to this one it is a function call on the next turn of the event
        loop.
        """
        if to != self.name:
            self._handoff_bytes += sum(tensor.nbytes for tensor in tensors)
            return self._node.post(to, message, [to_blob(tensor) for tensor in tensors])
        handler = self._local.get(type(message))
        if handler is None:
            return False
        asyncio.get_running_loop().call_soon(handler, self.name, message, tuple(tensors))
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
        rid, attempt = message.request_id, message.attempt
        for stage in (self._encode, self._prefill, self._decode, self._loop):
            if stage is not None:
                stage.cancel(rid, attempt)

    def _reset(self, why: str) -> None:
        _log.warning("dropping all requests", worker=self.name, why=why)
        for stage in (self._encode, self._prefill, self._decode, self._loop):
            if stage is not None:
                stage.reset()

    def _alive(self, name: str) -> bool:
        return name == self.name or self._node.knows(name)

    def stats(self) -> WorkerStats:
        """What the next heartbeat reports."""
        core = self._loop.stats if self._loop else None
        cache = self._cache.stats()
        encode, prefill, decode = self._encode, self._prefill, self._decode
        return WorkerStats(
            encode_queue=encode.queued if encode else 0,
            encoded_total=encode.encoded_total if encode else 0,
            prefill_waiting=(prefill.waiting if prefill else 0) + (core.waiting if core else 0),
            running=core.running if core else 0,
            handoff_queue=decode.queued if decode else 0,
            kv_leases=prefill.leases if prefill else 0,
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
            resident_bytes=self._facts.resident_bytes,
        )

    async def run(self) -> None:
        """Serve until cancelled; raises what breaks a stage, so that the process ends and is
        replaced.
        """
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._node.run())
            tasks.create_task(self._beat())
            if self._encode:
                tasks.create_task(self._encode.run())
            if self._loop:
                tasks.create_task(self._loop.run())

    async def _beat(self) -> None:
        while True:
            facts = self._facts
            beat = Heartbeat(
                address=self._address,
                revision=facts.revision,
                encoder_revision=facts.encoder_revision,
                dtype=facts.dtype,
                accepting=self._accepting,
                stats=self.stats(),
            )
            self.emit(beat)
            for stage in (self._prefill, self._decode):
                if stage is not None:
                    stage.sweep(self._alive)
            if self._gateway_life and self._clock() - self._gateway_seen > self._orphan_after:
                self._reset("the gateway is silent")
                self._gateway_life = 0
            await asyncio.sleep(self._heartbeat)

    async def drain(self, limit: float) -> None:
        """Ask for no new work, wait up to `limit` seconds for the old to end, say goodbye."""
        self._accepting = False
        until = self._clock() + limit
        await asyncio.sleep(2 * self._heartbeat)
        while not self._idle() and self._clock() < until:
            await asyncio.sleep(0.05)
        self.emit(Leaving())
        await asyncio.sleep(0.05)

    def _idle(self) -> bool:
        queued = self._encode.queued if self._encode else 0
        return not queued and not (self._loop and self._loop.attempts)
