"""What every service process does with signals and with the end of its supervisor."""

from __future__ import annotations

import asyncio
import os
import signal
from typing import Any

__all__ = ["SUPERVISOR_VARIABLE", "ended_before_stop", "on_stop_signal"]

SUPERVISOR_VARIABLE = "EPD_SUPERVISOR_PID"


def on_stop_signal() -> asyncio.Event:
    """An event that SIGTERM, SIGINT or the end of the supervisor sets.

    A second signal ends the process at once.
    """
    stop = asyncio.Event()

    def stopping() -> None:
        if stop.is_set():
            os._exit(130)
        stop.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopping)
    if supervisor := os.environ.get(SUPERVISOR_VARIABLE):
        loop.call_later(0.5, _check_parent, loop, int(supervisor), stop)
    return stop


def _check_parent(loop: asyncio.AbstractEventLoop, supervisor: int, stop: asyncio.Event) -> None:
    if os.getppid() != supervisor:
        stop.set()
    else:
        loop.call_later(0.5, _check_parent, loop, supervisor, stop)


async def ended_before_stop(serving: asyncio.Task[Any]) -> bool:
    """True when `serving` ended by itself, False when this process was told to stop first."""
    stop = on_stop_signal()
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    return serving.done()
