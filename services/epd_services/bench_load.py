"""Requests that arrive when they arrive, whether or not the service keeps up: an open loop.

Latencies count from the moment a request was due, so a client that falls behind hides nothing.
"""

from __future__ import annotations

import asyncio
import io
import math
import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from PIL.Image import Image

from epd_services.bench_rows import Row, percentile
from epd_services.client import ChatClient, Reply

if TYPE_CHECKING:
    from epd_services.progress import Advance

__all__ = ["Arrival", "Load", "Outcome", "Picture", "drive", "plan_load", "summarise"]

STAGES = ("queue", "encode", "transfer", "prefill", "decode")
SLO_TTFT, SLO_TPOT = 0.2, 0.05


@dataclass(frozen=True, slots=True)
class Picture:
    """A question about one picture; `png` is the file's bytes."""

    question: str
    image: Image
    png: bytes

    @classmethod
    def of(cls, question: str, image: Image) -> Picture:
        """A picture as a PNG file would hold it."""
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return cls(question, image, buffer.getvalue())


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when it is due, in seconds after the start, and which picture it asks about."""

    due: float
    picture: int


@dataclass(frozen=True, slots=True)
class Load:
    """A named series of arrivals. `rate` is infinite for a burst."""

    name: str
    rate: float
    arrivals: tuple[Arrival, ...]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A request's reply, how late the client sent it, and whether the text is the right one."""

    reply: Reply
    late: float
    right: bool


def plan_load(
    rate: float, count: int, *, repeat: float, first_picture: int, rng: random.Random
) -> Load:
    """`count` Poisson arrivals at `rate` a second (infinite: all at once).

    A share `repeat` of them, on average, asks about a picture of an earlier one; the others take
    the next picture, from `first_picture` on.
    """
    arrivals: list[Arrival] = []
    due, fresh = 0.0, first_picture
    for _ in range(count):
        if fresh > first_picture and rng.random() < repeat:
            picture = rng.randrange(first_picture, fresh)
        else:
            picture, fresh = fresh, fresh + 1
        arrivals.append(Arrival(due, picture))
        due += 0.0 if math.isinf(rate) else rng.expovariate(rate)
    name = f"burst of {count}" if math.isinf(rate) else f"{rate:g}/s"
    return Load(name, rate, tuple(arrivals))


async def drive(
    client: ChatClient,
    load: Load,
    pictures: Sequence[Picture],
    expected: Sequence[str],
    *,
    output_tokens: int,
    advance: Advance,
) -> tuple[list[Outcome], float]:
    """Send a load and wait for every end: outcomes in order of arrival, and seconds in all."""
    done, begin = 0, time.perf_counter()

    async def one(arrival: Arrival) -> Outcome:
        nonlocal done
        await asyncio.sleep(max(0.0, begin + arrival.due - time.perf_counter()))
        late = time.perf_counter() - begin - arrival.due
        picture = pictures[arrival.picture]
        reply = await client.ask(
            picture.question, [picture.png], max_tokens=output_tokens, ignore_eos=True,
            temperature=0,
        )  # fmt: skip
        done += 1
        advance(done, "")
        return Outcome(reply, late, reply.complete and reply.text == expected[arrival.picture])

    outcomes = await asyncio.gather(*(one(arrival) for arrival in load.arrivals))
    return list(outcomes), time.perf_counter() - begin


def summarise(outcomes: Sequence[Outcome], seconds: float, *, output_tokens: int) -> Row:
    """The columns of one row: counts, rates, latencies in milliseconds, and where the time went."""
    whole = [o for o in outcomes if o.reply.complete]
    first = [1000 * (o.late + o.reply.ttft) for o in whole if o.reply.ttft is not None]
    gaps = [1000 * o.reply.tpot for o in whole if o.reply.tpot is not None]
    tokens = sum(o.reply.usage.get("completion_tokens", 0) for o in whole)
    return {
        "requests": len(outcomes),
        "complete": len(whole),
        "refused": sum(o.reply.code is not None for o in outcomes),
        "lost": sum(not o.reply.terminal for o in outcomes),
        "duplicate": sum(_repeated(o, output_tokens) for o in outcomes),
        "wrong": sum(o.reply.complete and not o.right for o in outcomes),
        "requests_per_s": len(whole) / seconds,
        "tokens_per_s": tokens / seconds,
        "ttft_p50_ms": percentile(first, 50),
        "ttft_p99_ms": percentile(first, 99),
        "tpot_p50_ms": percentile(gaps, 50),
        "tpot_p99_ms": percentile(gaps, 99),
        "within_slo": sum(_within_slo(o) for o in whole) / max(len(outcomes), 1),
        **{f"{stage}_ms": _mean(o.reply.timings.get(stage) for o in whole) for stage in STAGES},
    }


def _repeated(outcome: Outcome, output_tokens: int) -> bool:
    reply = outcome.reply
    return bool(reply.repeats) or reply.usage.get("completion_tokens", 0) > output_tokens


def _within_slo(outcome: Outcome) -> bool:
    """Whether the first token and the ones after it came as fast as a chat wants them."""
    reply = outcome.reply
    if reply.ttft is None or reply.ttft + outcome.late > SLO_TTFT:
        return False
    return reply.tpot is None or reply.tpot <= SLO_TPOT


def _mean(values: Iterable[float | None]) -> float:
    """Milliseconds; requests that skipped the stage count as zero."""
    each = [1000 * (value or 0.0) for value in values]
    return fmean(each) if each else math.nan
