"""Simulated time: callbacks in order of their moment, then of their making."""

from __future__ import annotations

import heapq
from collections.abc import Callable

__all__ = ["EventLoop"]


class EventLoop:
    """`now` is the simulated clock, in seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0

    def at(self, moment: float, action: Callable[[], None]) -> None:
        """Do something at a moment that is not past."""
        assert moment >= self.now
        heapq.heappush(self._heap, (moment, self._count, action))
        self._count += 1

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        """Do something later."""
        self.at(self.now + seconds, action)

    def run(self, limit: float = float("inf")) -> None:
        """Let time pass until nothing is left to do, or up to `limit`."""
        while self._heap and self._heap[0][0] <= limit:
            self.now, _, action = heapq.heappop(self._heap)
            action()
