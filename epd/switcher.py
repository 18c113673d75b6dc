"""Carries out role switches on a worker: drains, exchanges weights, waits for the commit, or goes
back.

Until the commit the old role counts: nothing of the new one is visible. Whatever goes wrong before
ends in the old role under the old epoch; if that cannot be loaded either, the worker ends.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Protocol

import structlog

from epd.errors import EPDError
from epd.failpoints import Failpoints
from epd.messages import (
    Message,
    SwitchAbort,
    SwitchCommit,
    SwitchFailed,
    SwitchPhase,
    SwitchReady,
    SwitchRole,
)
from epd.roles import StageSet, format_stages, parse_stages
from epd.stages.hosted import HostedStages
from epd.stages.parts import StageLoader
from epd.switching import RoleSwitch, SwitchOrder, SwitchState

__all__ = ["SwitchHost", "Switcher"]

_log = structlog.get_logger("epd.switch")
_LOOK_AGAIN = 0.01


class SwitchHost(Protocol):
    """The worker as its switcher sees it."""

    def emit(self, message: Message) -> None:
        """Send to the gateway."""

    def beat(self) -> None:
        """Send a heartbeat now."""

    def take_role(self, stages: StageSet, epoch: int) -> None:
        """From now on send under these stages and this epoch."""


class Switcher:
    """One switch at a time. `order`, `commit`, `abort` and `abandon` return at once."""

    def __init__(
        self,
        host: SwitchHost,
        role: RoleSwitch,
        hosted: HostedStages,
        loader: StageLoader,
        *,
        clock: Callable[[], float],
        failpoints: Failpoints,
    ) -> None:
        self._host = host
        self._role = role
        self._hosted = hosted
        self._loader = loader
        self._clock = clock
        self._failpoints = failpoints
        self._news = asyncio.Event()
        self._group: asyncio.TaskGroup | None = None

    @property
    def switch_id(self) -> str | None:
        """The switch under way."""
        return self._role.switch_id

    def begin(self, group: asyncio.TaskGroup) -> None:
        """Run switches in `group`."""
        self._group = group

    def order(self, message: SwitchRole) -> None:
        """Begin a switch, or refuse it and change nothing."""
        try:
            stages = parse_stages(message.stages)
            self._loader.check(stages)
            order = self._role.begin(
                message.switch_id, stages, epoch=message.epoch,
                drain_seconds=message.drain_seconds,
            )  # fmt: skip
        except EPDError as error:
            self._failed(message.switch_id, "refused", error)
            return
        if order is not None:
            assert self._group is not None
            self._group.create_task(self._run(order))

    def commit(self, message: SwitchCommit) -> None:
        """Publish the new role, if it is ready."""
        if self._role.commit(message.switch_id):
            self._news.set()

    def abort(self, message: SwitchAbort) -> None:
        """Call the switch off, unless it is committed."""
        self.abandon("the gateway called it off", message.switch_id)

    def abandon(self, why: str, switch_id: str | None = None) -> None:
        """Call off the switch under way, if it can be."""
        if self._role.abandon(why, switch_id):
            self._news.set()

    async def _run(self, order: SwitchOrder) -> None:
        try:
            await self._failpoints.reached("switch.received")
            await self._drain(order)
            await self._exchange(order)
            await self._publish(order)
        except Exception as error:
            await self._return(order, error)

    async def _drain(self, order: SwitchOrder) -> None:
        self._host.beat()
        self._hosted.close(order.ending, order.new)
        await self._failpoints.reached("switch.drain")
        while self._clock() < order.drain_until:
            self._role.check()
            if not await self._hosted.pending(order.ending, order.new):
                break
            await asyncio.sleep(_LOOK_AGAIN)
        await self._hosted.hand_back(order.ending, order.new)
        self._phase_ended(order)

    async def _exchange(self, order: SwitchOrder) -> None:
        """Unload what only the old role needs, load what the new one needs."""
        await self._failpoints.reached("switch.unload")
        await self._hosted.retire(order.ending, order.new)
        await asyncio.to_thread(self._loader.unload, order.new)
        self._phase_ended(order)
        await self._failpoints.reached("switch.load")
        await asyncio.to_thread(self._loader.load, order.new)
        self._phase_ended(order)
        await self._failpoints.reached("switch.ready")
        resident = self._loader.resident_bytes
        self._host.emit(SwitchReady(switch_id=order.switch_id, resident_bytes=resident))

    def _phase_ended(self, order: SwitchOrder) -> None:
        phase, seconds = self._role.advance()
        _log.info("switch phase", switch_id=order.switch_id, phase=phase, seconds=round(seconds, 4))
        self._host.emit(
            SwitchPhase(switch_id=order.switch_id, phase=phase, seconds=min(seconds, 1e9))
        )

    async def _publish(self, order: SwitchOrder) -> None:
        while self._role.state is SwitchState.READY:
            self._role.check()
            self._news.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._news.wait(), self._role.commit_left)
            if self._role.state is SwitchState.READY and self._role.commit_left <= 0.0:
                self._role.abandon("no commit came in time")
        await self._failpoints.reached("switch.commit")
        stages, epoch = self._role.publish()
        self._hosted.install(self._loader.parts, stages)
        self._host.take_role(stages, epoch)
        _log.info("switched", switch_id=order.switch_id, stages=format_stages(stages), epoch=epoch)
        self._host.beat()

    async def _return(self, order: SwitchOrder, error: Exception) -> None:
        """Take up the old role again; raises if that is impossible."""
        phase = self._role.turn_back()
        await asyncio.to_thread(self._loader.unload, order.old)
        await asyncio.to_thread(self._loader.load, order.old)
        self._hosted.install(self._loader.parts, order.old)
        self._role.returned()
        self._failed(order.switch_id, phase, error)
        self._host.beat()

    def _failed(self, switch_id: str, phase: str, error: Exception) -> None:
        text = str(error) if isinstance(error, EPDError) else type(error).__name__
        _log.warning("switch failed", switch_id=switch_id, phase=phase, error=text[:200])
        self._host.emit(SwitchFailed(switch_id=switch_id, phase=phase, message=text[:512]))
