"""The prefill stage: wait for the vision tokens of a prompt, prefill it, offer its KV to the
decode worker.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from epd.cache.base import TokenCache
from epd.core import NewSequence
from epd.errors import DeadlineError, EPDError, UnavailableError
from epd.kv.handoff import KVHandoff
from epd.messages import MissingItems, PrefillRequest, VisionTokens, VisionTokensReceived
from epd.stages.base import Host, Payload, as_tensor
from epd.stages.core_loop import CoreLoop
from epd.stages.kv_source import LEASE_SECONDS, KVSource
from epd.step import KeptTokens
from epd.vision_pool import TokenSelector, pruned
from epd.wire import Blob

__all__ = ["PrefillStage"]

_ASK_AGAIN = 3.0
_EARLY_LIMIT = 1024


@dataclass(slots=True)
class _Waiting:
    """A prompt whose vision tokens are not all here yet."""

    request: PrefillRequest
    deadline: float
    asked: float
    tokens: dict[int, list[Payload]] = field(default_factory=dict)

    @property
    def missing(self) -> list[int]:
        return [i for i in range(len(self.request.items)) if i not in self.tokens]


class PrefillStage:
    """Message handlers of prefill; the core itself runs in `loop`."""

    def __init__(
        self,
        host: Host,
        loop: CoreLoop,
        cache: TokenCache,
        source: KVSource,
        *,
        clock: Callable[[], float],
        device: torch.device | str,
        image_token_id: int | None,
        selector: TokenSelector | None = None,
    ) -> None:
        self._host = host
        self._loop = loop
        self._cache = cache
        self._source = source
        self._clock = clock
        self._device = device
        self._image_token_id = image_token_id
        self._selector = selector or TokenSelector()
        self._waiting: dict[str, _Waiting] = {}
        self._early: dict[tuple[str, int, int], tuple[float, list[Payload]]] = {}
        self._consumers: dict[str, tuple[int, str, float]] = {}
        self._fetches: set[asyncio.Task[None]] = set()
        loop.on_offer = self._offer

    @property
    def waiting(self) -> int:
        """Prompts whose vision tokens are on their way."""
        return len(self._waiting)

    def accept(self, sender: str, request: PrefillRequest, _: Sequence[Payload]) -> None:
        """Take in a prompt; items said to be in the token cache are fetched from there."""
        now = self._clock()
        rid, attempt = request.request_id, request.attempt
        if self._loop.attempts.get(rid, -1) >= attempt:
            return
        self.cancel(rid, attempt)
        self._source.cancel(rid, attempt)
        self._loop.begin(rid, attempt)
        waiting = _Waiting(request, now + request.ttl, now)
        self._waiting[rid] = waiting
        for item in range(len(request.items)):
            if early := self._early.pop((rid, attempt, item), None):
                waiting.tokens[item] = early[1]
            elif request.from_cache[item]:
                self._fetch(request, item)
        self._start_if_complete(rid)

    def _fetch(self, request: PrefillRequest, item: int) -> None:
        task = asyncio.get_running_loop().create_task(self._from_cache(request, item))
        self._fetches.add(task)
        task.add_done_callback(self._fetches.discard)

    async def _from_cache(self, request: PrefillRequest, item: int) -> None:
        value = await self._cache.get(request.items[item].cache_key)
        waiting = self._waiting.get(request.request_id)
        if waiting is None or waiting.request is not request or item in waiting.tokens:
            return
        if value is None:
            self._ask(waiting, [item])
            return
        waiting.tokens[item] = [Blob(*part) for part in value.tensors]
        self._start_if_complete(request.request_id)

    def _ask(self, waiting: _Waiting, items: list[int]) -> None:
        waiting.asked = self._clock()
        request = waiting.request
        self._host.emit(
            MissingItems(request_id=request.request_id, attempt=request.attempt, items=items)
        )

    def vision_tokens(
        self, sender: str, message: VisionTokens, payloads: Sequence[Payload]
    ) -> None:
        """Take in the vision tokens of one image, before or after the prompt itself."""
        if not payloads:
            return
        rid, attempt, item = message.request_id, message.attempt, message.item
        tokens = list(payloads)
        self._host.post(sender, VisionTokensReceived(request_id=rid, attempt=attempt, item=item))
        waiting = self._waiting.get(rid)
        if waiting is not None and waiting.request.attempt == attempt:
            if 0 <= item < len(waiting.request.items):
                waiting.tokens[item] = tokens
                self._start_if_complete(rid)
        elif self._loop.attempts.get(rid, -1) < attempt and len(self._early) < _EARLY_LIMIT:
            self._early[rid, attempt, item] = (self._clock(), tokens)

    def _start_if_complete(self, rid: str) -> None:
        waiting = self._waiting.get(rid)
        if waiting is None or waiting.missing:
            return
        del self._waiting[rid]
        request = waiting.request
        if request.consumer != self._host.name:
            self._consumers[rid] = (request.attempt, request.consumer, waiting.deadline)
        self._loop.submit(lambda: self._add(waiting))

    def _add(self, waiting: _Waiting) -> Callable[[], None] | None:
        """In the compute thread: choose the tokens that stay, and give the prompt to the core."""
        request = waiting.request
        if self._loop.attempts.get(request.request_id) != request.attempt:
            return None
        try:
            chosen = self._choose(waiting)
            kept = [one for _, one in chosen]
            self._loop.core.add(self._sequence(waiting, kept), [tokens for tokens, _ in chosen])
        except Exception as error:
            return lambda e=error: self._loop.fail(request.request_id, e, retryable=False)  # type: ignore[misc]
        return None

    def _choose(self, waiting: _Waiting) -> list[tuple[torch.Tensor, KeptTokens | None]]:
        request, count = waiting.request, len(waiting.request.items)
        queries = (request.queries + [""] * count)[:count]
        # copied to the device here: on the event loop that waits for whatever the GPU does
        images = [[as_tensor(p, self._device) for p in waiting.tokens[i]] for i in range(count)]
        return self._selector.select_all(images, request.pruning, queries, request.budget)

    def _sequence(self, waiting: _Waiting, kept: list[KeptTokens | None]) -> NewSequence:
        request, pruning = waiting.request, waiting.request.pruning
        sequence = NewSequence(
            request_id=request.request_id,
            attempt=request.attempt,
            prompt_token_ids=request.prompt_token_ids,
            image_token_id=self._image_token_id,
            mm_keys=[item.cache_key for item in request.items],
            sampling=request.sampling,
            output_token_ids=request.output_token_ids,
            salt=request.salt,
            deadline=waiting.deadline,
            handoff=request.consumer != self._host.name,
        )
        return sequence if pruning is None else pruned(sequence, pruning, kept)

    def _offer(self, handoff: KVHandoff) -> None:
        rid = handoff.request_id
        attempt, consumer, deadline = self._consumers.pop(rid, (-1, "", 0.0))
        if self._loop.attempts.get(rid) != attempt:
            return
        if not self._source.offer(handoff, attempt, consumer=consumer, deadline=deadline):
            gone = UnavailableError("the decode worker cannot be reached")
            self._loop.fail(rid, gone, retryable=True)

    def cancel(self, rid: str, attempt: int) -> None:
        """Forget every attempt at a request up to `attempt` that is not in the core yet."""
        waiting = self._waiting.get(rid)
        if waiting is not None and waiting.request.attempt <= attempt:
            del self._waiting[rid]
        for key in [k for k in self._early if k[0] == rid and k[1] < attempt]:
            del self._early[key]
        if self._consumers.get(rid, (attempt + 1,))[0] <= attempt:
            del self._consumers[rid]

    def hand_back(self, wanted: Callable[[PrefillRequest], bool]) -> None:
        """Give the prompts that are `wanted` and not in the core back to the gateway."""
        for rid, waiting in list(self._waiting.items()):
            if wanted(waiting.request):
                del self._waiting[rid]
                self._loop.hand_back(rid, waiting.request.attempt)

    def reset(self) -> None:
        """Forget every request that is not in the core."""
        self._waiting.clear()
        self._early.clear()
        self._consumers.clear()

    def sweep(self, alive: Callable[[str], bool]) -> None:
        """Expire what waited too long; call about twice a second. `alive` tells live workers."""
        now = self._clock()
        for rid, waiting in list(self._waiting.items()):
            if now >= waiting.deadline:
                del self._waiting[rid]
                self._fail(rid, DeadlineError("the deadline passed before the images were ready"))
            elif now - waiting.asked > _ASK_AGAIN:
                self._ask(waiting, waiting.missing)
        for key, (arrived, _) in list(self._early.items()):
            if now - arrived > LEASE_SECONDS:
                del self._early[key]

    def _fail(self, rid: str, error: EPDError) -> None:
        self._loop.fail(rid, error, retryable=False)
