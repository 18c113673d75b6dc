"""Named points at which a process can be made to fail, for tests of what happens then.

A point does nothing unless it is armed: `EPD_FAILPOINTS="switch.load=exit,admin.ready=pause:2"`.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping

from epd.errors import ConfigError, EPDError

__all__ = ["POINTS", "FailpointError", "Failpoints"]

POINTS = (
    "switch.received", "switch.drain", "switch.move", "switch.unload", "switch.load",
    "switch.ready", "switch.commit", "admin.accepted", "admin.ready", "admin.committed",
)  # fmt: skip
_KILLED = 137


class FailpointError(EPDError):
    """What an armed point raises."""

    code = "failpoint"


class Failpoints:
    """Points armed with `exit` (at once, as a kill would), `raise` or `pause:SECONDS`.

    `hits` counts the visits of every point. Raises `ConfigError` for an unknown point or action.
    """

    def __init__(
        self,
        actions: Mapping[str, str] | None = None,
        *,
        leave: Callable[[int], object] = os._exit,
    ) -> None:
        self.hits: Counter[str] = Counter()
        self._actions: dict[str, str] = {}
        self._leave = leave
        for name, action in (actions or {}).items():
            self.arm(name, action)

    @classmethod
    def parse(cls, text: str | None) -> Failpoints:
        """The points that a setting arms: `NAME=ACTION`, separated by commas."""
        pairs = [part.partition("=") for part in (text or "").split(",") if part.strip()]
        return cls({name.strip(): action.strip() for name, _, action in pairs})

    def arm(self, name: str, action: str) -> None:
        """Have a point act from now on. Raises `ConfigError`."""
        if name not in POINTS:
            raise ConfigError(f"{name[:64]!r} is no failpoint; there are {', '.join(POINTS)}")
        if action not in ("exit", "raise"):
            _pause(action)
        self._actions[name] = action

    def disarm(self) -> None:
        """Have no point act any more."""
        self._actions.clear()

    def hit(self, name: str) -> None:
        """Pass a point; a pause holds up the whole thread."""
        time.sleep(self._act(name))

    async def reached(self, name: str) -> None:
        """Pass a point; a pause lets the event loop go on."""
        await asyncio.sleep(self._act(name))

    def _act(self, name: str) -> float:
        """Seconds to pause."""
        self.hits[name] += 1
        action = self._actions.get(name)
        if action is None:
            return 0.0
        if action == "exit":
            self._leave(_KILLED)
        if action in ("exit", "raise"):
            raise FailpointError(f"failpoint {name}")
        return _pause(action)


def _pause(action: str) -> float:
    kind, _, seconds = action.partition(":")
    try:
        pause = float(seconds)
    except ValueError:
        pause = -1.0
    if kind != "pause" or not 0.0 <= pause < 3600.0:
        raise ConfigError(f"a failpoint can exit, raise or pause:SECONDS, not {action[:32]!r}")
    return pause
