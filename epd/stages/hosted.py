"""The stages that one worker hosts: their objects, their tasks, and who handles which message.

Stages come and go while others stay. One that ends is closed first: it refuses new work by giving
it back to the gateway, and what it has runs out, moves, or is handed back. The core stays as long
as the worker has P or D in both its roles.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from epd.cache.base import TokenCache
from epd.cache.flight import SingleFlight
from epd.messages import (
    EncodeRequest,
    KVBlocks,
    KVGone,
    KVOffer,
    KVPull,
    KVRelease,
    KVRenew,
    Message,
    MoveDecode,
    PrefillRequest,
    RequestMessage,
    Returned,
    VisionTokens,
    VisionTokensReceived,
)
from epd.node import GATEWAY
from epd.roles import Stage, StageSet
from epd.sequence import Sequence as CoreSequence
from epd.sequence import SequenceState
from epd.stages.base import Host, Payload
from epd.stages.core_loop import CoreLoop
from epd.stages.decode import DecodeStage
from epd.stages.encode import EncodeStage
from epd.stages.kv_source import KVSource
from epd.stages.parts import StageParts
from epd.stages.prefill import PrefillStage

__all__ = ["STAGE_MESSAGES", "HostedStages", "StageHandler"]

StageHandler = Callable[[str, Any, Sequence[Any]], None]
STAGE_MESSAGES: tuple[type[Message], ...] = (
    EncodeRequest, VisionTokensReceived, PrefillRequest, VisionTokens, KVPull, KVRenew, KVRelease,
    KVOffer, KVBlocks, KVGone, MoveDecode,
)  # fmt: skip
_CORE = frozenset({Stage.PREFILL, Stage.DECODE})
_Part = EncodeStage | PrefillStage | DecodeStage | KVSource | CoreLoop


class HostedStages:
    """Builds stages out of `StageParts`; call `begin` once a task group runs."""

    def __init__(
        self,
        host: Host,
        cache: TokenCache,
        *,
        clock: Callable[[], float],
        device: str,
        image_token_id: int | None,
        on_move: Callable[[], None] = lambda: None,
    ) -> None:
        self.handlers: dict[type[Message], StageHandler] = {}
        self.encode: EncodeStage | None = None
        self.loop: CoreLoop | None = None
        self.source: KVSource | None = None
        self.prefill: PrefillStage | None = None
        self.decode: DecodeStage | None = None
        self._host = host
        self._cache = cache
        self._clock = clock
        self._device = device
        self._image_token_id = image_token_id
        self._on_move = on_move
        self._closed: StageSet = frozenset()
        self._group: asyncio.TaskGroup | None = None
        self._tasks: dict[EncodeStage | CoreLoop, asyncio.Task[None]] = {}

    def __iter__(self) -> Iterator[_Part]:
        """What exists, in the order in which a cancel has to reach it."""
        for part in (self.encode, self.prefill, self.decode, self.source, self.loop):
            if part is not None:
                yield part

    def install(self, parts: StageParts, stages: StageSet) -> None:
        """Host `stages`: what is missing is built, what exists goes on, everything is open."""
        if Stage.ENCODE in stages and self.encode is None and parts.encoder is not None:
            flight = SingleFlight(self._cache)
            self.encode = EncodeStage(self._host, parts.encoder, flight, clock=self._clock)
        if stages & _CORE and parts.core is not None:
            self._install_core(parts, stages)
        if self.encode is not None:
            self.encode.open()
        self._closed = frozenset()
        self._route()
        self._start()

    def _install_core(self, parts: StageParts, stages: StageSet) -> None:
        assert parts.core is not None
        if self.loop is None or self.source is None:
            self.loop = CoreLoop(self._host, parts.core)
            self.source = KVSource(self._host, self.loop, clock=self._clock, on_move=self._on_move)
        if Stage.PREFILL in stages and self.prefill is None:
            self.prefill = PrefillStage(
                self._host, self.loop, self._cache, self.source, clock=self._clock,
                device=self._device, image_token_id=self._image_token_id, selector=parts.selector,
            )  # fmt: skip
        if Stage.DECODE in stages and self.decode is None:
            self.decode = DecodeStage(self._host, self.loop, clock=self._clock, device=self._device)

    def begin(self, group: asyncio.TaskGroup) -> None:
        """Run the stages in `group`, and those that come later too."""
        self._group = group
        self._start()

    def _start(self) -> None:
        for part in (self.encode, self.loop):
            if self._group is not None and part is not None and part not in self._tasks:
                self._tasks[part] = self._group.create_task(part.run())

    def close(self, ending: StageSet, new: StageSet) -> None:
        """Take no more work for the `ending` stages and give back what has not begun."""
        self._closed = ending
        self._route()
        if Stage.ENCODE in ending and self.encode is not None:
            self.encode.close()
        if self.prefill is not None and ending & _CORE:
            self.prefill.hand_back(lambda request: self._ends_with(request, ending, new))
        if self.decode is not None and Stage.DECODE in ending:
            self.decode.hand_back(pulling=False)
        if self.loop is not None and ending & _CORE:
            ends = _ending_sequences(ending, new)
            self.loop.hand_back_all(lambda s: s.state is SequenceState.WAITING and ends(s))

    def _ends_with(self, request: PrefillRequest, ending: StageSet, new: StageSet) -> bool:
        here = request.consumer == self._host.name
        return Stage.PREFILL in ending or (here and Stage.DECODE in ending)

    async def pending(self, ending: StageSet, new: StageSet) -> int:
        """How much work the `ending` stages still have."""
        encoding = self.encode.queued if self.encode and Stage.ENCODE in ending else 0
        if self.loop is None or not ending & _CORE:
            return encoding
        if not new & _CORE:
            return encoding + len(self.loop.attempts)
        waiting = self.prefill.waiting if self.prefill and Stage.PREFILL in ending else 0
        queued = self.decode.queued if self.decode and Stage.DECODE in ending else 0
        return encoding + waiting + queued + await self.loop.count(_ending_sequences(ending, new))

    async def hand_back(self, ending: StageSet, new: StageSet) -> None:
        """Give back to the gateway all work that the `ending` stages still have."""
        if Stage.ENCODE in ending and self.encode is not None:
            self.encode.hand_back()
        if self.loop is None or self.source is None or not ending & _CORE:
            return
        if self.prefill is not None:
            self.prefill.hand_back(lambda request: self._ends_with(request, ending, new))
        if self.decode is not None and Stage.DECODE in ending:
            self.decode.hand_back(pulling=True)
        if Stage.PREFILL in ending or not new & _CORE:
            self.source.hand_back()
        if not new & _CORE:
            for request_id, attempt in list(self.loop.attempts.items()):
                self.loop.hand_back(request_id, attempt)
        self.loop.hand_back_all(_ending_sequences(ending, new))
        await self.loop.count(lambda _: False)

    async def retire(self, ending: StageSet, new: StageSet) -> None:
        """Let go of the `ending` stages, and of the core if `new` needs none."""
        if Stage.ENCODE in ending and self.encode is not None:
            encode, self.encode = self.encode, None
            await self._end(encode)
        if Stage.PREFILL in ending and self.prefill is not None:
            self.prefill.reset()
            self.prefill = None
        if Stage.DECODE in ending and self.decode is not None:
            self.decode.stop()
            self.decode = None
        if self.loop is not None and not new & _CORE:
            loop, self.loop, self.source = self.loop, None, None
            await self._end(loop)
        self._route()

    async def _end(self, part: EncodeStage | CoreLoop) -> None:
        if task := self._tasks.pop(part, None):
            task.cancel()
            await asyncio.wait([task])
        await part.stop()

    def cancel(self, request_id: str, attempt: int) -> None:
        """Forget every attempt at a request up to this one."""
        for part in self:
            part.cancel(request_id, attempt)

    def reset(self) -> None:
        """Forget every request."""
        for part in self:
            part.reset()

    def sweep(self, alive: Callable[[str], bool]) -> None:
        """Give up what waited too long; call about twice a second. `alive` tells live workers."""
        for part in (self.prefill, self.decode, self.source):
            if part is not None:
                part.sweep(alive)

    def idle(self) -> bool:
        """Whether nothing waits or runs."""
        encoding = self.encode is not None and self.encode.queued > 0
        return not encoding and not (self.loop is not None and self.loop.attempts)

    def _route(self) -> None:
        """Who handles what; work for a stage that is not hosted, or closed, goes back."""
        table: dict[type[Message], StageHandler] = {
            EncodeRequest: self._refuse_image,
            PrefillRequest: self._refuse,
            KVOffer: self._refuse_offer,
            KVPull: self._refuse_pull,
            MoveDecode: self._move,
        }
        if encode := self.encode:
            table |= {VisionTokensReceived: encode.received, EncodeRequest: encode.accept}
        if source := self.source:
            table |= {KVPull: source.pull, KVRenew: source.renew, KVRelease: source.release}
        if prefill := self.prefill:
            table |= {PrefillRequest: prefill.accept, VisionTokens: prefill.vision_tokens}
        if decode := self.decode:
            table |= {KVOffer: decode.offer, KVBlocks: decode.blocks, KVGone: decode.gone}
        if Stage.ENCODE in self._closed:
            table[EncodeRequest] = self._refuse_image
        if Stage.PREFILL in self._closed:
            table[PrefillRequest] = self._refuse
        if Stage.DECODE in self._closed:
            table[KVOffer] = self._refuse_offer
        self.handlers = table

    def _refuse(self, sender: str, message: RequestMessage, _: Sequence[Payload]) -> None:
        returned = Returned(request_id=message.request_id, attempt=message.attempt)
        self._host.emit(returned)

    def _refuse_image(self, sender: str, message: EncodeRequest, _: Sequence[Payload]) -> None:
        rid, attempt = message.request_id, message.attempt
        self._host.emit(Returned(request_id=rid, attempt=attempt, items=[message.item]))

    def _refuse_offer(self, sender: str, message: KVOffer, _: Sequence[Payload]) -> None:
        rid, attempt = message.request_id, message.attempt
        self._host.post(sender, KVRelease(request_id=rid, attempt=attempt))
        self._refuse(sender, message, _)

    def _refuse_pull(self, sender: str, message: KVPull, _: Sequence[Payload]) -> None:
        rid, attempt = message.request_id, message.attempt
        self._host.post(sender, KVGone(request_id=rid, attempt=attempt))

    def _move(self, sender: str, message: MoveDecode, _: Sequence[Payload]) -> None:
        if sender != GATEWAY:
            return
        if self.source is None:
            self._refuse(sender, message, _)
            return
        if self.decode is not None:
            self.decode.cancel(message.request_id, message.attempt)
        self.source.move(message)


def _ending_sequences(ending: StageSet, new: StageSet) -> Callable[[CoreSequence], bool]:
    """Which sequences of the core belong to the `ending` stages.

    To P belongs a prompt until its KV is gone, to D whatever decodes here or will.
    """
    core_ends = not new & _CORE

    def ends(sequence: CoreSequence) -> bool:
        held = sequence.state is SequenceState.HELD
        prefills = Stage.PREFILL in ending and (held or not sequence.prefilled)
        decodes = Stage.DECODE in ending and not held and not sequence.handoff
        return core_ends or prefills or decodes

    return ends
