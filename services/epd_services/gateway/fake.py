"""A scripted `Dispatcher`: the pipeline's stand-in for tests, demos of the page and load rigs."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from epd.errors import CapacityError, EPDError, UnavailableError
from epd.request import FinishReason, TokenOutput, Usage
from epd_services.gateway.dispatch_api import Submission, TokensEvent

__all__ = ["FakeDispatcher", "FakeGeneration", "Script"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Script:
    """How one submission is answered: tokens, pauses, and an error after `fail_after` tokens.

    `per_event` tokens travel in one event; `repeat` sends every event twice, as a retry may.
    """

    token_ids: Sequence[int] = ()
    finish_reason: FinishReason = FinishReason.STOP
    first_delay: float = 0.0
    delay: float = 0.0
    per_event: int = 1
    repeat: bool = False
    fail_after: int | None = None
    error: EPDError | None = None
    top: Sequence[tuple[int, float]] = ()


class FakeGeneration:
    """Plays one script; `cancelled` tells whether somebody asked it to stop."""

    def __init__(self, submission: Submission, script: Script, image_tokens: int) -> None:
        self.submission = submission
        self.cancelled = asyncio.Event()
        self.sent = 0
        self._script = script
        self._image_tokens = image_tokens * len(submission.images)

    def cancel(self) -> None:
        """Stop at the next event."""
        self.cancelled.set()

    async def __aiter__(self) -> AsyncIterator[TokensEvent]:
        """The scripted events, cut at `max_tokens` and at `cancel`."""
        script = self._script
        limit = self.submission.sampling.max_tokens
        ids = list(script.token_ids[:limit])
        reason = FinishReason.LENGTH if len(script.token_ids) > limit else script.finish_reason
        await self._pause(script.first_delay)
        for start in range(0, max(len(ids), 1), script.per_event):
            if script.error is not None and start >= (script.fail_after or 0):
                raise script.error
            if self.cancelled.is_set():
                return
            end = min(start + script.per_event, len(ids))
            event = self._event(ids, start, end, reason if end == len(ids) else None)
            self.sent = end
            yield event
            if script.repeat and event.finish_reason is None:
                yield event
            await self._pause(script.delay)

    async def _pause(self, seconds: float) -> None:
        if seconds > 0:
            await asyncio.wait([asyncio.ensure_future(self.cancelled.wait())], timeout=seconds)

    def _event(
        self, ids: list[int], start: int, end: int, reason: FinishReason | None
    ) -> TokensEvent:
        wanted = self.submission.sampling.logprobs
        tokens = [
            TokenOutput(
                index=i,
                token_id=ids[i],
                logprob=None if wanted is None else -0.5,
                top=list(self._script.top[: wanted or 0]),
            )
            for i in range(start, end)
        ]
        usage = Usage(
            prompt_tokens=len(self.submission.prompt_token_ids) + self._image_tokens,
            completion_tokens=end,
            image_tokens=self._image_tokens,
        )
        timings = {"queue": 0.001, "encode": 0.02, "transfer": 0.003, "prefill": 0.03}
        timings["decode"] = self._script.delay * max(end - 1, 0)
        return TokensEvent(tokens, reason, usage, timings)


@dataclass(slots=True)
class FakeDispatcher:
    """Answers every submission with `script`, or what `choose` returns for it, and remembers it."""

    script: Script = field(default_factory=Script)
    choose: Callable[[Submission], Script] | None = None
    capacity: int | None = None
    retry_after: float = 1.0
    image_tokens: int = 0
    is_ready: bool = True
    started: bool = False
    refuse: EPDError | None = None
    generations: deque[FakeGeneration] = field(default_factory=lambda: deque(maxlen=4096))
    submitted: int = 0

    def submit(self, submission: Submission) -> FakeGeneration:
        """A scripted generation; `CapacityError` once `capacity` submissions were taken."""
        if self.refuse is not None:
            raise self.refuse
        if not self.is_ready:
            raise UnavailableError("no worker hosts the decode stage", self.retry_after)
        if self.capacity is not None and self.submitted >= self.capacity:
            raise CapacityError("the encode queue is full", self.retry_after)
        self.submitted += 1
        script = self.choose(submission) if self.choose else self.script
        generation = FakeGeneration(submission, script, self.image_tokens)
        self.generations.append(generation)
        return generation

    def ready(self) -> tuple[bool, str]:
        """`is_ready`, with a reason."""
        return self.is_ready, "ready" if self.is_ready else "no worker hosts the decode stage"

    def pipeline(self) -> dict[str, Any]:
        """Three invented workers."""
        workers = [
            {
                "name": f"{stages.lower()}-0",
                "stages": stages,
                "state": "serving" if self.is_ready else "lost",
                "epoch": 1,
                "queue": 0,
                "running": 0,
                "heartbeat_age_s": 0.1,
            }
            for stages in "EPD"
        ]
        cache = {"backend": "memory", "queries": 4, "hits": 1}
        return {"topology": "1E1P1D", "workers": workers, "token_cache": cache}

    async def start(self) -> None:
        """Mark as started."""
        self.started = True

    async def stop(self) -> None:
        """Mark as stopped."""
        self.started = False
