"""Measures what the forecast needs from what happens: arrivals, service times, answer lengths."""

from __future__ import annotations

import math

from epd_services.elastic.load import Measured, Rates

__all__ = ["Observer"]

_FORGET = 0.02
_RECENT = 32
_PRIOR_WEIGHT = 4.0


class Observer:
    """Arrivals fade with `memory` seconds, what they ask also with every thirty-two new ones,
    service times with every fifty.

    `prior` stands in until a stage was measured. Requests ask for a number of tokens; how much of
    that they take is measured on those that ended.
    """

    def __init__(self, prior: Measured, *, memory: float = 5.0) -> None:
        self._prior = prior
        self._memory = memory
        self._encode, self._prefill = prior.encode, prior.prefill
        self._since: float | None = None
        self._at = 0.0
        self._count = self._weight = self._images = self._tokens = 0.0
        self._asked = self._produced = 1.0
        self._fit = _StepFit(prior)
        self._seen = [False, False]
        self.switch = prior.switch

    @property
    def measured(self) -> bool:
        """Whether a prompt and a decode step were measured."""
        return all(self._seen)

    def arrived(self, at: float, *, images: int, asked: int) -> None:
        """Count a request."""
        self._fade(at)
        self._count += 1
        keep = 1 - 1 / _RECENT
        self._weight = keep * self._weight + 1
        self._images = keep * self._images + images
        self._tokens = keep * self._tokens + asked

    def encoded(self, seconds: float) -> None:
        """Take in the service time of an image."""
        self._encode += 2 * _FORGET * (seconds - self._encode)

    def prefilled(self, seconds: float) -> None:
        """Take in the service time of a prompt."""
        self._seen[0] = True
        self._prefill += 2 * _FORGET * (seconds - self._prefill)

    def stepped(self, batch: int, seconds: float) -> None:
        """Take in a decode step."""
        self._seen[1] = True
        self._fit.add(batch, seconds)

    def finished(self, *, asked: int, produced: int) -> None:
        """Take in how long an answer became."""
        self._asked += _FORGET * (asked - self._asked)
        self._produced += _FORGET * (produced - self._produced)

    def expected(self, asked: int) -> float:
        """How many tokens a request that may take `asked` is expected to take."""
        return asked * min(1.0, self._produced / self._asked)

    def rates(self, at: float) -> Rates:
        """What arrives lately."""
        self._fade(at)
        if self._since is None or self._count < 1e-3:
            return Rates()
        seen = 1 - math.exp(-max(at - self._since, 0.5) / self._memory)
        return Rates(
            requests=self._count / (self._memory * seen),
            images=self._images / self._weight,
            tokens=self.expected(1) * self._tokens / self._weight,
        )

    def times(self) -> Measured:
        """Service times as measured so far."""
        base, per_sequence = self._fit.line()
        return Measured(
            encode=self._encode, prefill=self._prefill, decode_base=base,
            decode_per_sequence=per_sequence, decode_batch=self._prior.decode_batch,
            switch=self.switch,
        )  # fmt: skip

    def _fade(self, at: float) -> None:
        if self._since is None:
            self._since = self._at = at
        keep = math.exp(-max(0.0, at - self._at) / self._memory)
        self._count, self._weight = self._count * keep, self._weight * keep
        self._images, self._tokens = self._images * keep, self._tokens * keep
        self._at = max(self._at, at)


class _StepFit:
    """A fading least-squares line through (batch, seconds), tied to a prior while data is thin."""

    def __init__(self, prior: Measured) -> None:
        self._sums = [0.0] * 5
        for batch in (1, 32):
            self._push(batch, prior.step(batch), _PRIOR_WEIGHT)

    def add(self, batch: int, seconds: float) -> None:
        self._sums = [(1 - _FORGET / 4) * value for value in self._sums]
        self._push(batch, seconds, 1.0)

    def _push(self, x: float, y: float, weight: float) -> None:
        values = (1.0, x, y, x * x, x * y)
        self._sums = [s + weight * value for s, value in zip(self._sums, values, strict=True)]

    def line(self) -> tuple[float, float]:
        """Intercept and slope, neither negative."""
        n, x, y, xx, xy = self._sums
        spread = n * xx - x * x
        slope = max(0.0, (n * xy - x * y) / spread) if spread > 1e-9 * n * xx else 0.0
        base = (y - slope * x) / n
        return (base, slope) if base > 0 else (1e-6, xy / xx)
