"""Failpoints: silent unless armed, and then exactly what was asked."""

import asyncio
import time

import pytest

from epd.errors import ConfigError
from epd.failpoints import FailpointError, Failpoints


def test_an_unarmed_point_only_counts() -> None:
    points = Failpoints()
    points.hit("switch.load")
    asyncio.run(points.reached("switch.load"))
    assert points.hits == {"switch.load": 2}


def test_armed_points_raise_leave_or_pause() -> None:
    left: list[int] = []
    points = Failpoints(
        {"switch.load": "raise", "switch.ready": "exit", "switch.drain": "pause:0.05"},
        leave=left.append,
    )
    with pytest.raises(FailpointError, match=r"switch\.load"):
        points.hit("switch.load")
    with pytest.raises(FailpointError):
        points.hit("switch.ready")
    assert left == [137]
    began = time.monotonic()
    points.hit("switch.drain")
    assert time.monotonic() - began >= 0.05


def test_an_awaited_pause_lets_the_event_loop_go_on() -> None:
    async def run() -> list[str]:
        order: list[str] = []
        points = Failpoints.parse("switch.drain=pause:0.02")

        async def pausing() -> None:
            await points.reached("switch.drain")
            order.append("paused")

        task = asyncio.create_task(pausing())
        await asyncio.sleep(0)
        order.append("went on")
        await task
        return order

    assert asyncio.run(run()) == ["went on", "paused"]


def test_a_setting_arms_several_points() -> None:
    points = Failpoints.parse("switch.load=raise, switch.ready=raise,")
    for name in ("switch.load", "switch.ready"):
        with pytest.raises(FailpointError):
            points.hit(name)
    points.hit("switch.unload")


@pytest.mark.parametrize(
    "text", ["switch.nowhere=exit", "switch.load=explode", "switch.load=pause:long",
             "switch.load", "switch.load=pause:-1", "switch.load=pause:nan"],
)  # fmt: skip
def test_what_cannot_be_armed_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        Failpoints.parse(text)
