"""A circuit breaker as a pure state machine: no tasks, no sleeping, the clock is an argument."""

from __future__ import annotations

import time
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Breaker", "BreakerState"]


class BreakerState(Enum):
    """CLOSED lets calls through, OPEN none, HALF_OPEN waits for the one probe it admitted."""

    CLOSED = "closed"
    OPEN = "open"
    HALF_OPEN = "half_open"


class Breaker:
    """Opens after `threshold` errors in a row or one timeout, for `open_for` seconds.

    Ordinary calls report `success`, `error` or `timeout`; these count only while closed, so a
    late straggler cannot disturb the probe. The probe alone reports through `settle`.
    """

    def __init__(
        self,
        *,
        threshold: int = 3,
        open_for: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._threshold = threshold
        self._open_for = open_for
        self._clock = clock
        self._errors = 0
        self._opened_at = 0.0
        self.state = BreakerState.CLOSED

    def admits(self) -> bool:
        """Whether an ordinary call may go through."""
        return self.state is BreakerState.CLOSED

    def success(self) -> None:
        """An ordinary call succeeded."""
        if self.state is BreakerState.CLOSED:
            self._errors = 0

    def error(self) -> None:
        """An ordinary call failed at once."""
        if self.state is BreakerState.CLOSED:
            self._errors += 1
            if self._errors >= self._threshold:
                self._open()

    def timeout(self) -> None:
        """An ordinary call got no answer in time: the next one must not wait as well."""
        if self.state is BreakerState.CLOSED:
            self._open()

    def remaining(self) -> float:
        """Seconds until a probe may go out; 0 when it may."""
        return max(0.0, self._opened_at + self._open_for - self._clock())

    def probe(self) -> bool:
        """True for exactly one caller once the open time is over; it must call `settle`."""
        if self.state is not BreakerState.OPEN or self.remaining() > 0:
            return False
        self.state = BreakerState.HALF_OPEN
        return True

    def settle(self, success: bool) -> None:
        """The probe's result: close, or open again for the full time."""
        if self.state is not BreakerState.HALF_OPEN:
            return
        if success:
            self._errors = 0
            self.state = BreakerState.CLOSED
        else:
            self._open()

    def _open(self) -> None:
        self.state = BreakerState.OPEN
        self._opened_at = self._clock()
