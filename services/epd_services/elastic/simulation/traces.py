"""Arrivals to simulate: the published shift, and the shapes that make a bad controller flap.

`shifts` counts how often a trace really changes what the best split is, its start not counted.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

__all__ = ["Arrival", "Trace", "burst", "noise", "ramp", "shift", "square"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request: when, how many images, how many tokens it asks for."""

    at: float
    images: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """Arrivals in order of time."""

    name: str
    arrivals: tuple[Arrival, ...]
    shifts: int


def shift(rate: float, *, short: int = 10, long: int = 90) -> Trace:
    """One image each at a steady rate: `short` requests ask 50 tokens, then `long` ask 500."""
    count = short + long
    arrivals = (Arrival(i / rate, 1, 50 if i < short else 500) for i in range(count))
    return Trace(f"shift {short}x50 then {long}x500 at {rate:g}/s", tuple(arrivals), 1)


def square(rate: float, *, half: float, waves: int, seed: int = 0) -> Trace:
    """Poisson arrivals that ask 20 tokens about six images, then 500 about one, turn by turn.

    Halves that are shorter than a minute are no shifts: no switch pays within them.
    """
    rng = random.Random(seed)
    arrivals: list[Arrival] = []
    for turn in range(2 * waves):
        images, tokens = (6, 20) if turn % 2 == 0 else (1, 500)
        arrivals += _poisson(rng, rate, turn * half, (turn + 1) * half, images, tokens)
    shifts = 2 * waves - 1 if half >= 60 else 0
    return Trace(f"square wave, halves of {half:g} s", tuple(arrivals), shifts)


def ramp(rate: float, *, seconds: float = 240.0, seed: int = 0) -> Trace:
    """Answers that grow from 20 to 500 tokens: one shift, spread over the whole trace."""
    rng = random.Random(seed)
    arrivals = [
        Arrival(a.at, 1, round(20 + 480 * a.at / seconds))
        for a in _poisson(rng, rate, 0.0, seconds, 1, 1)
    ]
    return Trace("ramp from 20 to 500 tokens", tuple(arrivals), 1)


def burst(rate: float, *, size: int = 60, seed: int = 0) -> Trace:
    """Steady load of 200 tokens each, twice `size` requests with four images all at once."""
    rng = random.Random(seed)
    arrivals = _poisson(rng, rate, 0.0, 180.0, 1, 200)
    for moment in (60.0, 120.0):
        arrivals += [Arrival(moment, 4, 20) for _ in range(size)]
    arrivals.sort(key=lambda arrival: arrival.at)
    return Trace(f"two bursts of {size}", tuple(arrivals), 0)


def noise(rate: float, *, seconds: float = 300.0, seed: int = 0) -> Trace:
    """Stationary: Poisson, zero to three images, lengths log-normal around 150 tokens."""
    rng = random.Random(seed)
    arrivals = [
        Arrival(a.at, rng.randrange(4), max(1, min(1000, round(rng.lognormvariate(5.0, 0.8)))))
        for a in _poisson(rng, rate, 0.0, seconds, 1, 1)
    ]
    return Trace("noise", tuple(arrivals), 0)


def _poisson(
    rng: random.Random, rate: float, start: float, end: float, images: int, tokens: int
) -> list[Arrival]:
    arrivals: list[Arrival] = []
    at = start + rng.expovariate(rate)
    while at < end:
        arrivals.append(Arrival(at, images, tokens))
        at += rng.expovariate(rate) if rate < math.inf else 0.0
    return arrivals
