"""What the gateway asks of the pipeline behind it: the only door between HTTP and the stages."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from epd.pruning_spec import PruningSpec
from epd.request import FinishReason, SamplingParams, TokenOutput, Usage

__all__ = ["Dispatcher", "Generation", "ImagePixels", "Submission", "TokensEvent"]


@dataclass(frozen=True, slots=True)
class ImagePixels:
    """One decoded image: canonical 8-bit RGB, row-major, `3 * width * height` bytes."""

    width: int
    height: int
    rgb: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A tokenised request, one placeholder token per image in order. `request_id` is unique.

    `pruning` drops vision tokens of its images; `queries` has the question that belongs to each.
    """

    request_id: str
    prompt_token_ids: list[int]
    images: list[ImagePixels]
    sampling: SamplingParams
    salt: str
    timeout_s: float
    pruning: PruningSpec | None = None
    queries: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class TokensEvent:
    """New tokens of an answer. `usage` and `timings` may come with any event; the latest count.

    `timings` maps `queue`, `encode`, `transfer`, `prefill`, `decode` to seconds. Sending `usage`
    early lets an answer cut by a stop string report how many prompt tokens its images took.
    """

    tokens: list[TokenOutput]
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: dict[str, float] | None = None


class Generation(Protocol):
    """The answer to one submission, as it grows."""

    def __aiter__(self) -> AsyncIterator[TokensEvent]:
        """Events up to the one with a finish reason; raises `EPDError` subclasses."""
        ...

    def cancel(self) -> None:
        """Stop the work in every stage. Idempotent, also after the end."""
        ...


class Dispatcher(Protocol):
    """The pipeline: accepts submissions and says how it is doing.

    `pipeline` returns plain JSON data. The gateway reads `topology` (text), `workers` (a list of
    flat objects) and, for its metrics, `token_cache.queries` and `token_cache.hits`; all optional.
    """

    def submit(self, submission: Submission) -> Generation:
        """The running generation. Raises `CapacityError` or `UnavailableError` at once."""
        ...

    def ready(self) -> tuple[bool, str]:
        """Whether requests can be served, and why not."""
        ...

    def pipeline(self) -> dict[str, Any]:
        """Topology, workers, queues and cache as plain JSON data."""
        ...

    async def start(self) -> None:
        """Connect to the workers."""
        ...

    async def stop(self) -> None:
        """Drain, then disconnect."""
        ...
