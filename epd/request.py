"""What a user asks for and what comes back, without tensors: sampling, images, tokens, timings."""

from __future__ import annotations

import math
from collections.abc import Callable
from enum import Enum

import msgspec

from epd.errors import InvalidRequestError

__all__ = [
    "FinishReason",
    "MMItem",
    "Request",
    "RequestTimeline",
    "SamplingParams",
    "TokenOutput",
    "Usage",
]


class FinishReason(Enum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How tokens are drawn. `temperature` 0 is greedy; every field is checked by `validate`."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    max_tokens: int = 256
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def validate(self) -> None:
        """Raise `InvalidRequestError` naming the first field that is out of range."""
        for field, low, high in _RANGES:
            value = getattr(self, field)
            if not math.isfinite(value) or not low <= value <= high:
                raise InvalidRequestError(f"{field} must be within [{low}, {high}]", field)
        if self.top_p == 0.0:
            raise InvalidRequestError("top_p must be above 0", "top_p")
        if self.logprobs is not None and not 0 <= self.logprobs <= 20:
            raise InvalidRequestError("logprobs must be within [0, 20]", "logprobs")
        if len(self.stop) > 16 or any(not 0 < len(s) <= 256 for s in self.stop):
            raise InvalidRequestError("stop takes up to 16 strings of 1 to 256 characters", "stop")
        if len(self.stop_token_ids) > 16 or any(i < 0 for i in self.stop_token_ids):
            raise InvalidRequestError("stop_token_ids takes up to 16 token ids", "stop_token_ids")


_RANGES = (
    ("temperature", 0.0, 2.0),
    ("top_p", 0.0, 1.0),
    ("top_k", 0, 1 << 20),
    ("min_p", 0.0, 1.0),
    ("repetition_penalty", 0.01, 100.0),
    ("presence_penalty", -2.0, 2.0),
    ("frequency_penalty", -2.0, 2.0),
    ("seed", 0, (1 << 63) - 1),
    ("max_tokens", 1, 1 << 20),
)


class MMItem(msgspec.Struct, frozen=True, kw_only=True):
    """One image of a request.

    `mm_hash` digests its canonical pixels, `cache_key` names its vision tokens.
    """

    mm_hash: str
    cache_key: str
    width: int
    height: int


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """A tokenised request: one image placeholder token per item of `mm_items`, in order."""

    request_id: str
    prompt_token_ids: list[int]
    mm_items: list[MMItem] = []
    sampling: SamplingParams = SamplingParams()
    salt: str = ""


class TokenOutput(msgspec.Struct, frozen=True, array_like=True):
    """One sampled token: its position in the answer, its id, and log-probabilities when asked for.

    `top` holds (token id, log-probability) pairs, best first.
    """

    index: int
    token_id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """Token counts of a request. `image_tokens` is part of `prompt_tokens`; what the images took
    before pruning is `image_tokens_before`.
    """

    prompt_tokens: int
    completion_tokens: int
    image_tokens: int = 0
    cached_tokens: int = 0
    image_tokens_before: int = 0


class RequestTimeline:
    """Named events of one request on one clock, from which every latency is derived. Seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._start = clock()
        self.events: dict[str, float] = {}
        self.durations: dict[str, float] = {}
        self._token_times: list[float] = []

    def mark(self, event: str) -> None:
        """Record the first occurrence of `event`, in seconds since the request arrived."""
        self.events.setdefault(event, self._clock() - self._start)

    def add(self, stage: str, seconds: float) -> None:
        """Add a duration measured by a worker on its own clock."""
        self.durations[stage] = self.durations.get(stage, 0.0) + seconds

    def token(self) -> None:
        """Record the arrival of one output token."""
        self._token_times.append(self._clock() - self._start)

    @property
    def elapsed(self) -> float:
        """Seconds since the request arrived."""
        return self._clock() - self._start

    @property
    def ttft(self) -> float | None:
        """Time to first token: arrival to the first output token."""
        return self._token_times[0] if self._token_times else None

    @property
    def tpot(self) -> float | None:
        """Time per output token: mean gap between output tokens after the first."""
        if len(self._token_times) < 2:
            return None
        return (self._token_times[-1] - self._token_times[0]) / (len(self._token_times) - 1)
