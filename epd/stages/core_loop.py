"""Drives the engine core of a worker: queued operations, then one step, then what came of it, over
and over.

The core is single-threaded: everything that touches it runs in one compute thread, so the event
loop keeps answering heartbeats through the longest prefill.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import structlog

from epd.core import CoreStats, EngineCore, StepResult
from epd.errors import EPDError
from epd.kv.handoff import KVHandoff
from epd.messages import Evicted, KVLayout, PrefillDone, RequestFailed, Returned, StepToken, Tokens
from epd.sequence import Sequence
from epd.stages.base import Host

__all__ = ["CoreLoop", "Operation"]

_log = structlog.get_logger("epd.core")
_BLOCKED_SECONDS = 0.02
Operation = Callable[[], Callable[[], None] | None]
"""Runs in the compute thread; the function it returns, if any, runs on the event loop
afterwards.
"""


@dataclass(slots=True)
class _Round:
    then: list[Callable[[], None]] = field(default_factory=list)
    step: StepResult | None = None
    offers: list[KVHandoff] = field(default_factory=list)
    stats: CoreStats | None = None


class CoreLoop:
    """Owns an `EngineCore`. `attempts` holds the attempt of every request the core knows."""

    def __init__(self, host: Host, core: EngineCore) -> None:
        self.attempts: dict[str, int] = {}
        self.on_offer: Callable[[KVHandoff], None] = lambda _: None
        self.before_turn: list[Callable[[], Operation | None]] = []
        self.stats = core.stats()
        self._host = host
        self._core = core
        self._operations: list[Operation] = []
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="llm")

    @property
    def core(self) -> EngineCore:
        """The core; to be touched inside operations only."""
        return self._core

    @property
    def kv_layout(self) -> KVLayout:
        """How the core holds KV; never changes."""
        facts = self._core.facts
        return KVLayout(list(facts.kv_formats), list(facts.layer_group))

    def submit(self, operation: Operation) -> None:
        """Run an operation before the next step."""
        self._operations.append(operation)
        self._wake.set()

    def wake(self) -> None:
        """Take another turn even if no operation waits."""
        self._wake.set()

    def begin(self, request_id: str, attempt: int) -> None:
        """Note the attempt that from now on owns the request; an older one is forgotten."""
        if request_id in self.attempts:
            self.submit(lambda: self._core.cancel(request_id))
        self.attempts[request_id] = attempt

    def cancel(self, request_id: str, attempt: int) -> None:
        """Forget a request if it is still this attempt or an older one."""
        if self.attempts.get(request_id, attempt + 1) <= attempt:
            del self.attempts[request_id]
            self.submit(lambda: self._core.cancel(request_id))

    def _forget(self, request_id: str, attempt: int) -> None:
        """Note that the core has ended this attempt; a newer one goes on."""
        if self.attempts.get(request_id) == attempt:
            del self.attempts[request_id]

    def fail(self, request_id: str, error: EPDError | Exception, *, retryable: bool) -> None:
        """Report a request as failed and forget it."""
        attempt = self.attempts.get(request_id)
        if attempt is None:
            return
        self.cancel(request_id, attempt)
        code = error.code if isinstance(error, EPDError) else "internal_error"
        text = str(error) if isinstance(error, EPDError) else type(error).__name__
        self._host.emit(
            RequestFailed(
                request_id=request_id,
                attempt=attempt,
                code=code,
                message=text[:512],
                retryable=retryable,
                param=getattr(error, "param", None),
            )
        )

    def hand_back(self, request_id: str, attempt: int, *, always: bool = False) -> None:
        """Forget a request, if it is still this attempt, and give it back to the gateway.

        With `always` the gateway is told in any case; it knows best whether the request has ended.
        """
        current = self.attempts.get(request_id) == attempt
        if current:
            self.cancel(request_id, attempt)
        if current or always:
            self._host.emit(Returned(request_id=request_id, attempt=attempt))

    def hand_back_all(self, wanted: Callable[[Sequence], bool]) -> None:
        """Give back the requests whose sequence, before the next step, is `wanted`."""

        def select() -> Callable[[], None]:
            found = self._core.find(wanted)
            for request_id, _ in found:
                self._core.cancel(request_id)
            return lambda: self._give_back(found)

        self.submit(select)

    def _give_back(self, found: list[tuple[str, int]]) -> None:
        for request_id, attempt in found:
            self.hand_back(request_id, attempt)

    async def count(self, wanted: Callable[[Sequence], bool]) -> int:
        """How many sequences of the core are `wanted`, after all that was submitted so far."""
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def select() -> Callable[[], None]:
            number = len(self._core.find(wanted))
            return lambda: None if found.cancelled() else found.set_result(number)

        self.submit(select)
        return await found

    async def stop(self) -> None:
        """Wait for the step under way and end the compute thread; `run` must be cancelled."""
        await asyncio.to_thread(self._thread.shutdown)
        self.on_offer = lambda _: None
        self.before_turn.clear()

    def reset(self) -> None:
        """Forget every request."""
        for request_id, attempt in list(self.attempts.items()):
            self.cancel(request_id, attempt)

    async def run(self) -> None:
        """Step while there is work; sleep otherwise."""
        loop = asyncio.get_running_loop()
        while True:
            await self._wake.wait()
            busy = True
            while busy:
                # cleared every turn: a flag left set would make every pause an empty one
                self._wake.clear()
                operations, self._operations = self._operations, []
                operations += self._prepared()
                round_ = await loop.run_in_executor(self._thread, self._turn, operations)
                self._publish(round_)
                idle = round_.step is None or not round_.step.num_tokens
                # what was refused for want of room is asked again, also when nothing runs any more
                busy = bool(self._operations or self._core.has_work() or self._prepared())
                if busy and idle and not self._operations:
                    await self._pause()

    def _prepared(self) -> list[Operation]:
        return [operation for prepare in self.before_turn if (operation := prepare())]

    async def _pause(self) -> None:
        """All work waits for blocks: look again when something happens, or soon."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_BLOCKED_SECONDS):
                await self._wake.wait()

    def _turn(self, operations: list[Operation]) -> _Round:
        round_ = _Round()
        for operation in operations:
            try:
                then = operation()
            except Exception:
                _log.exception("operation failed")
                continue
            if then is not None:
                round_.then.append(then)
        if self._core.has_work():
            round_.step = self._core.step()
            round_.offers = [self._core.offer(name) for name in round_.step.handoffs]
        round_.stats = self._core.stats()
        return round_

    def _publish(self, round_: _Round) -> None:
        for then in round_.then:
            then()
        if round_.stats is not None:
            self.stats = round_.stats
        step = round_.step
        if step is None:
            return
        for done in step.prefilled:
            self._host.emit(
                PrefillDone(
                    request_id=done.request_id,
                    attempt=done.attempt,
                    prompt_tokens=done.prompt_tokens,
                    image_tokens=done.image_tokens,
                    image_tokens_before=done.image_tokens_before,
                    cached_tokens=done.cached_tokens,
                    queue_seconds=max(0.0, done.queue_seconds),
                    prefill_seconds=max(0.0, done.prefill_seconds),
                )
            )
        self._publish_tokens(step)
        attempts = {token.request_id: token.attempt for token in step.tokens}
        for handoff in round_.offers:
            # a newer attempt may have begun while this one was computed
            if self.attempts.get(handoff.request_id) == attempts[handoff.request_id]:
                self.on_offer(handoff)
        for failure in step.failed:
            self._forget(failure.request_id, failure.attempt)
            self._host.emit(
                RequestFailed(
                    request_id=failure.request_id,
                    attempt=failure.attempt,
                    code=failure.code,
                    message=failure.message[:512],
                    retryable=False,
                )
            )
        for request_id in step.evicted:
            attempt = self.attempts.pop(request_id, None)
            if attempt is not None:
                self._host.emit(Evicted(request_id=request_id, attempt=attempt))

    def _publish_tokens(self, step: StepResult) -> None:
        tokens = []
        for token in step.tokens:
            reason = token.finish_reason
            tokens.append(
                StepToken(token.request_id, token.attempt, token.output, reason and reason.value)
            )
            if reason is not None:
                self._forget(token.request_id, token.attempt)
        if tokens:
            self._host.emit(Tokens(tokens=tokens))
