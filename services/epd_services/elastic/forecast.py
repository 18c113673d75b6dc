"""How long requests will take with a given split of the workers: a fluid forecast.

Encode and prefill are queues of work that drain at the speed of their workers while more arrives;
near full use the wait of a random stream is added (Sakasegawa's approximation of M/M/n, 1977).
A decode step grows with its batch, so a decode worker slows down long before it is full. Decodes
under way stay where they are when workers join: only what arrives later gains.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from epd.roles import Stage
from epd_services.elastic.load import Measured, Snapshot, Split

__all__ = ["Forecast", "forecast"]

_NEVER = 1e6


@dataclass(frozen=True, slots=True)
class Forecast:
    """Mean seconds that a request of the next `horizon` seconds spends in each stage."""

    encode: float
    prefill: float
    decode: float

    @property
    def total(self) -> float:
        """Mean seconds in all stages."""
        return self.encode + self.prefill + self.decode

    @property
    def bottleneck(self) -> Stage:
        """The stage that takes the longest."""
        return max(Stage, key=lambda stage: self.stage(stage))

    def stage(self, stage: Stage) -> float:
        """The seconds in one stage."""
        return {Stage.ENCODE: self.encode, Stage.PREFILL: self.prefill}.get(stage, self.decode)

    def mixed(self, other: Forecast, share: float) -> Forecast:
        """This forecast for a `share` of the time and `other` for the rest of it."""
        return Forecast(*(
            share * self.stage(stage) + (1 - share) * other.stage(stage) for stage in Stage
        ))  # fmt: skip


def forecast(snapshot: Snapshot, split: Split, *, horizon: float) -> Forecast:
    """What the requests in flight and those of the next `horizon` seconds would wait and take."""
    backlog, rates, times = snapshot.backlog, snapshot.rates, snapshot.times
    images = _queue(
        backlog.images, rates.requests * rates.images,
        service=times.encode, workers=split[Stage.ENCODE], horizon=horizon,
    )  # fmt: skip
    prompts = _queue(
        backlog.prompts, rates.requests,
        service=times.prefill, workers=split[Stage.PREFILL], horizon=horizon,
    )  # fmt: skip
    with_images = min(1.0, rates.images) if rates.requests else min(1.0, float(backlog.images))
    return Forecast(images * with_images, prompts, _decode(snapshot, split, horizon))


def _queue(queued: float, rate: float, *, service: float, workers: float, horizon: float) -> float:
    """Mean seconds in a first-come-first-served stage."""
    coming = rate * horizon
    if queued + coming == 0:
        return 0.0
    if workers <= 0:
        return _NEVER
    before = queued * service / workers
    growth = rate * service / workers - 1.0
    waits = queued * before / 2 + coming * _mean_wait(before, growth, horizon)
    return service + waits / (queued + coming) + _random_wait(rate, service, workers)


def _mean_wait(before: float, growth: float, horizon: float) -> float:
    """The mean over the horizon of a wait that starts at `before` and changes by `growth`."""
    after = before + growth * horizon
    if after >= 0:
        return (before + after) / 2
    return before * (before / -growth) / (2 * horizon)


def _random_wait(rate: float, service: float, workers: float) -> float:
    use = rate * service / workers
    if use >= 1:
        return 0.0
    servers = max(1.0, workers)
    exponent = math.sqrt(2 * (servers + 1)) - 1
    return float(service / workers * use**exponent / (1 - use))


def _decode(snapshot: Snapshot, split: Split, horizon: float) -> float:
    backlog, rates, times = snapshot.backlog, snapshot.rates, snapshot.times
    workers, now = split[Stage.DECODE], snapshot.split[Stage.DECODE]
    coming = rates.requests * horizon
    if backlog.requests + coming == 0:
        return 0.0
    if workers <= 0:
        return _NEVER
    staying = min(workers, now) if now else workers
    held = backlog.tokens * times.step(backlog.requests / staying)
    later = coming * rates.tokens * times.step(_batch(snapshot, workers, horizon))
    return (held + later) / (backlog.requests + coming)


def _batch(snapshot: Snapshot, workers: float, horizon: float) -> float:
    """Sequences per decode worker that a request of the near future meets.

    The steady state B = rate * tokens * step(B) where there is one, on the way from now.
    """
    rates, here = snapshot.rates, float(snapshot.backlog.requests)
    steady = workers * _steady_batch(rates.requests * rates.tokens / workers, snapshot.times)
    if steady >= here:
        return min(steady, here + rates.requests * horizon) / workers
    return (here + steady) / 2 / workers


def _steady_batch(tokens: float, times: Measured) -> float:
    spare = 1.0 - tokens * times.decode_per_sequence
    return tokens * times.decode_base / spare if spare > 0 else math.inf
