"""One generation as text: tokens in, deltas out; repeats dropped, stop strings cut."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any, Protocol

from epd.errors import EPDError, UnavailableError
from epd.request import FinishReason, TokenOutput, Usage
from epd_services.gateway.dispatch_api import Generation, TokensEvent
from epd_services.gateway.metrics import Exchange

__all__ = [
    "Answer",
    "Delta",
    "Detokenizing",
    "Tokenizing",
    "completion_head",
    "logprobs_json",
    "usage_json",
]

_REASONS = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class Tokenizing(Protocol):
    """The part of a tokenizer that log-probabilities need."""

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`."""
        ...


class Detokenizing(Protocol):
    """Text from tokens as they come, cut at the first stop string."""

    stopped: str | None

    def push(self, token_ids: list[int]) -> str:
        """Text that can no longer change."""
        ...

    def finish(self) -> str:
        """The rest."""
        ...


@dataclass(frozen=True, slots=True)
class Delta:
    """What one event added to the answer. `finish_reason` is set on the last one."""

    text: str
    tokens: list[TokenOutput]
    finish_reason: str | None = None


class Answer:
    """Iterate `deltas` once; `usage` and `timings` are complete afterwards."""

    def __init__(
        self,
        generation: Generation,
        detokenizer: Detokenizing,
        exchange: Exchange,
        *,
        prompt_tokens: int,
        timings: dict[str, float],
    ) -> None:
        self._generation = generation
        self._detokenizer = detokenizer
        self._exchange = exchange
        self._prompt_tokens = prompt_tokens
        self._timings = timings
        self._usage: Usage | None = None
        self._count = 0
        self._ended = False

    def cancel(self) -> bool:
        """Stop the generation unless it has ended; whether that was needed."""
        if self._ended:
            return False
        self._ended = True
        self._generation.cancel()
        return True

    async def deltas(self) -> AsyncIterator[Delta]:
        """The answer piece by piece. Raises `EPDError`."""
        async for event in self._generation:
            delta = self._delta(event)
            if delta.finish_reason is not None or delta.text or delta.tokens:
                yield delta
            if delta.finish_reason is not None:
                return
        raise EPDError("the generation ended without a finish reason")

    def _delta(self, event: TokensEvent) -> Delta:
        fresh = self._fresh(event.tokens)
        self._usage = event.usage or self._usage
        self._timings.update(event.timings or {})
        text = self._detokenizer.push([token.token_id for token in fresh])
        if event.finish_reason is not None:
            self._ended = True
            if event.finish_reason not in _REASONS and self._detokenizer.stopped is None:
                raise UnavailableError("The request was ended by the service.")
            text += self._detokenizer.finish()
        if self._detokenizer.stopped is not None:
            self.cancel()
            return Delta(text, fresh, "stop")
        reason = _REASONS[event.finish_reason] if event.finish_reason else None
        return Delta(text, fresh, reason)

    def _fresh(self, tokens: list[TokenOutput]) -> list[TokenOutput]:
        """Tokens not seen before: a retried attempt may repeat some, none may be missing."""
        fresh = [token for token in tokens if token.index >= self._count]
        if [token.index for token in fresh] != list(range(self._count, self._count + len(fresh))):
            raise EPDError("a token of the answer is missing")
        self._count += len(fresh)
        self._exchange.tokens(len(fresh))
        return fresh

    @property
    def usage(self) -> Usage:
        """Token counts; without a report of the pipeline, image tokens are unknown."""
        seen = self._usage or Usage(prompt_tokens=self._prompt_tokens, completion_tokens=0)
        return Usage(
            prompt_tokens=seen.prompt_tokens or self._prompt_tokens,
            completion_tokens=self._count,
            image_tokens=seen.image_tokens,
            cached_tokens=seen.cached_tokens,
            image_tokens_before=seen.image_tokens_before,
        )

    @property
    def timings(self) -> dict[str, float]:
        """Seconds per stage, with TTFT, TPOT and total as this process saw them."""
        merged = {**self._timings, **self._exchange.timings()}
        return {name: round(seconds, 6) for name, seconds in merged.items()}


def usage_json(usage: Usage) -> dict[str, Any]:
    """Usage as OpenAI spells it."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "image_tokens": usage.image_tokens,
            "image_tokens_before": usage.image_tokens_before,
        },
    }


def logprobs_json(tokens: list[TokenOutput], tokenizer: Tokenizing) -> dict[str, Any]:
    """Log-probabilities as OpenAI spells them."""

    def entry(token_id: int, logprob: float | None) -> dict[str, Any]:
        text = tokenizer.decode([token_id], skip_special_tokens=False)
        # a token may hold part of a character: its bytes are unknown here
        data = None if "\N{REPLACEMENT CHARACTER}" in text else list(text.encode())
        return {"token": text, "logprob": _finite(logprob), "bytes": data}

    content = [
        {
            **entry(token.token_id, token.logprob),
            "top_logprobs": [entry(token_id, logprob) for token_id, logprob in token.top],
        }
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _finite(logprob: float | None) -> float:
    # JSON has no infinities; OpenAI's own floor
    return max(logprob, -9999.0) if logprob is not None else -9999.0


def completion_head(request_id: str, model: str, kind: str) -> dict[str, Any]:
    """The fields every response object and every chunk begins with."""
    return {
        "id": f"chatcmpl-{request_id}",
        "object": kind,
        "created": int(time.time()),
        "model": model,
    }
