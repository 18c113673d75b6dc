"""The ledger: one record per request from acceptance to its single terminal state."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from epd.errors import EPDError
from epd.pruning_spec import PruningSpec
from epd.request import FinishReason, Request, RequestTimeline, TokenOutput, Usage
from epd.wire import Blob
from epd_services.gateway.dispatch_api import ImagePixels, TokensEvent

__all__ = ["LedgerGeneration", "Record"]


@dataclass(slots=True, eq=False)
class Record:
    """What the gateway knows about one request.

    `attempt` rises with every dispatch; `outputs` never shrinks. `budget` was set on arrival, so
    that every attempt keeps the same vision tokens. `pixels` are images ready to post. `prefill` is
    the worker the KV comes from: when a running answer moves, that is the one that decoded it so
    far.
    """

    request: Request
    images: list[ImagePixels]
    deadline: float
    timeline: RequestTimeline
    pruning: PruningSpec | None = None
    queries: list[str] = field(default_factory=list)
    budget: int | None = None
    events: asyncio.Queue[TokensEvent | EPDError] = field(default_factory=asyncio.Queue)
    outputs: list[TokenOutput] = field(default_factory=list)
    early: dict[int, tuple[TokenOutput, FinishReason | None]] = field(default_factory=dict)
    attempt: int = 0
    failures: int = 0
    returned: int = 0
    prefill: str = ""
    decode: str = ""
    encoders: dict[int, str] = field(default_factory=dict)
    pixels: dict[int, Blob] = field(default_factory=dict)
    prefilled: bool = False
    adopted: bool = False
    usage: Usage | None = None
    done: bool = False
    timer: asyncio.TimerHandle | None = None

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self.request.request_id

    def workers(self) -> set[str]:
        """The workers the current attempt involves."""
        return {self.prefill, self.decode, *self.encoders.values()} - {""}

    def decoding(self) -> bool:
        """Whether the current attempt has got to its decode worker."""
        return self.adopted or (self.prefilled and self.prefill == self.decode)

    def needs(self, worker: str) -> bool:
        """Whether the current attempt cannot end without `worker` (encoders apart)."""
        return worker == self.decode or (worker == self.prefill and not self.adopted)

    def take(self, output: TokenOutput, reason: FinishReason | None) -> bool:
        """Take in a token of the current attempt; whether the answer is complete now.

        The first token comes from the prefill worker and the next from the decode worker, over
        different connections: one that overtakes another waits for it.
        """
        self.early[output.index] = (output, reason)
        while (turn := self.early.pop(len(self.outputs), None)) is not None:
            self._token(*turn)
            if turn[1] is not None:
                return True
        return False

    def _token(self, output: TokenOutput, reason: FinishReason | None) -> None:
        """Append the next token and tell whoever waits."""
        self.outputs.append(output)
        self.timeline.token()
        # the first event carries them too: an answer may be cut by a stop string
        tells = reason is not None or len(self.outputs) == 1
        usage, timings = (self.final_usage(), self.timings()) if tells else (None, None)
        self.events.put_nowait(TokensEvent([output], reason, usage, timings))

    def final_usage(self) -> Usage:
        """Token counts so far."""
        seen = self.usage or Usage(prompt_tokens=0, completion_tokens=0)
        return Usage(
            prompt_tokens=seen.prompt_tokens,
            completion_tokens=len(self.outputs),
            image_tokens=seen.image_tokens,
            cached_tokens=seen.cached_tokens,
            image_tokens_before=seen.image_tokens_before,
        )

    def timings(self) -> dict[str, float]:
        """Seconds per stage as the workers measured them, plus TTFT, TPOT and total on this
        clock.
        """
        line = self.timeline
        own = {"ttft": line.ttft, "tpot": line.tpot, "total": line.elapsed}
        if line.ttft is not None:
            own["decode"] = line.elapsed - line.ttft
        return {**line.durations, **{k: v for k, v in own.items() if v is not None}}


class LedgerGeneration:
    """The answer of one record as it grows: iterate once; `cancel` at any time."""

    def __init__(self, record: Record, cancel: Callable[[Record], None]) -> None:
        self._record = record
        self._cancel = cancel

    async def __aiter__(self) -> AsyncIterator[TokensEvent]:
        while True:
            event = await self._record.events.get()
            if isinstance(event, EPDError):
                raise event
            yield event
            if event.finish_reason is not None:
                return

    def cancel(self) -> None:
        """Stop the request in every stage; idempotent."""
        self._cancel(self._record)
